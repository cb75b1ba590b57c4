"""What a grid of projections gave: the point to keep, a table, a picture. Drawing needs matplotlib."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .words import read_json

# One entry of `points`, as retain.json has it: rank, scale, form; loss, accuracy, margin where there are pairs; and
# `retained`, by name of the texts, with kl and loss_rise.
Entry = dict

PREFERENCE = {"loss": "pair loss", "accuracy": "accuracy", "margin": "margin"}
RETAINED = {"kl": "KL", "loss_rise": "loss rise"}


def choose(points: Sequence[Entry], names: Sequence[str], max_loss_increase: float) -> Entry:
    """The point of lowest mean KL on `names` whose loss is at most a share of `max_loss_increase` over the first's.

    The first point is the adapter as it was given, so there is always one.
    """
    limit = points[0]["loss"] * (1 + max_loss_increase)
    return min((p for p in points if p["loss"] <= limit), key=lambda p: sum(p["retained"][n]["kl"] for n in names))


def scaled_kl(points: Sequence[Entry], name: str, loss: float) -> float | None:
    """KL on texts `name` of the adapter merely scaled to this held-out loss; None where no two scales enclose it.

    Between two scales, log KL is taken to be linear in the loss; the lower KL counts where several do.
    """
    line = sorted((p for p in points if p["rank"] == 0), key=lambda p: p["scale"])
    found = []
    for a, b in zip(line, line[1:]):
        low, high = sorted([a["loss"], b["loss"]])
        kl = [max(p["retained"][name]["kl"], 1e-12) for p in (a, b)]
        if low <= loss <= high and high > low:
            part = (loss - a["loss"]) / (b["loss"] - a["loss"])
            found.append(math.exp(math.log(kl[0]) + part * math.log(kl[1] / kl[0])))
    return min(found, default=None)


def show(points: Sequence[Entry], chosen: Entry, console: Console) -> None:
    """A table of all points for each retained set, the chosen one in bold."""
    measured = [key for key in PREFERENCE if key in points[0]]
    titles = ["directions", "scale", *(PREFERENCE[key] for key in measured), *RETAINED.values()]
    for name in points[0]["retained"]:
        table = Table(title=f"{name}: nats per token on held-out texts, against the model without the adapter")
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
        for point in points:
            figures = [f"{point[key]:.4f}" for key in measured]
            figures += [f"{point['retained'][name][key]:.5f}" for key in RETAINED]
            label = str(point["rank"] or "only scaled")
            table.add_row(label, f"{point['scale']:g}", *figures, style="bold" if point is chosen else None)
        console.print(table)


def draw(points: Sequence[Entry], chosen: Entry, path: Path) -> None:
    """One PNG: loss, accuracy and margin against KL and rise of the loss of each retained set, a line a rank.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    from .plots import COLORS, STYLES

    rows = [(name, key) for name in points[0]["retained"] for key in RETAINED]
    figure = Figure(figsize=(4.2 * len(PREFERENCE), 3.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(PREFERENCE), squeeze=False)
    ranks = list(dict.fromkeys(point["rank"] for point in points))
    for line, (name, key) in zip(axes, rows):
        for axis, (figure_key, title) in zip(line, PREFERENCE.items()):
            for i, rank in enumerate(ranks):
                same = sorted((p for p in points if p["rank"] == rank), key=lambda p: p["scale"])
                axis.plot(
                    [point["retained"][name][key] for point in same],
                    [point[figure_key] for point in same],
                    color=COLORS[i % len(COLORS)][0],
                    linestyle=STYLES[i % len(STYLES)],
                    marker="o",
                    markersize=3,
                    label=f"{rank} directions" if rank else "only scaled",
                )
            axis.plot(chosen["retained"][name][key], chosen[figure_key], "o", mfc="none", mec="black", markersize=11)
            if key == "kl" and all(point["retained"][name][key] > 0 for point in points):
                axis.set_xscale("log")
            axis.set_xlabel(f"{RETAINED[key]}, nats per token: {name}")
            axis.set_ylabel(title)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def section(name: str, folder: Path) -> str:
    """HTML of what `nspo2 retain` left in `folder`: its table, the kept point in bold, and its picture."""
    result = read_json(folder / "retain.json", "points", "chosen")
    points, sets = result["points"], list(result["points"][0]["retained"])
    measured = [key for key in PREFERENCE if key in points[0]]
    head = ["directions", "scale", *(PREFERENCE[key] for key in measured)]
    head += [f"{title}, {texts}" for texts in sets for title in RETAINED.values()]
    rows = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    for point in points:
        cells = [
            str(point["rank"] or "only scaled"),
            f"{point['scale']:g}",
            *(f"{point[key]:.4f}" for key in measured),
        ]
        cells += [f"{point['retained'][texts][key]:.5f}" for texts in sets for key in RETAINED]
        kind = "th" if point == result["chosen"] else "td"
        rows += "</tr><tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in cells)
    picture, image = folder / "retain.png", ""
    if picture.is_file():
        code = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="Preference against KL and rise of the loss" src="data:image/png;base64,{code}">'
    return f"""<h2>What the model kept: {html.escape(name)}</h2>
<p>KL and loss rise are nats per token on held-out retained texts, against the model without the adapter. The point
that was kept is bold.</p>
<div class="wide"><table><tr>{rows}</tr></table></div>{image}"""
