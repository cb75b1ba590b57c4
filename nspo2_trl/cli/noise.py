"""What `nspo2 measure` found, as a table and on the page of `nspo2 report`."""

from __future__ import annotations

import html
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .words import read_json

NOISE = "noise.json"
MODULES = 8  # that the table shows


def show(found: dict, console: Console) -> None:
    """The table of modules, and the sentences."""
    table = Table("module", "signal", "noise", title=f"Shares of signal and noise, {found['steps']} steps")
    for entry in found["modules"][:MODULES]:
        error = f"{100 * entry['signal']:.0f} ± {100 * entry['signal_error']:.0f} %"
        table.add_row(entry["name"], error, f"{entry['noise']:.0%}")
    if rest := found["modules"][MODULES:]:
        shares = (f"{sum(entry[name] for entry in rest):.0%}" for name in ("signal", "noise"))
        table.add_row(f"{len(rest)} others", *shares)
    if found["modules"]:
        console.print(table)
    for sentence in found["sentences"]:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)


def section(name: str, folder: Path) -> str:
    """HTML of what `nspo2 measure` left in `folder`. Needs matplotlib."""
    from .plots import draw_noise

    found = read_json(folder / NOISE, "sentences", "modules")
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found["sentences"])
    return f"<h2>Noise and signal: {html.escape(name)}</h2>\n<ul>{sentences}</ul>\n{draw_noise(found)}"
