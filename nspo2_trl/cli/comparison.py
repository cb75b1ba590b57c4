"""Plots and the page of a comparison. Needs matplotlib: `pip install -e ".[plot]"`."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Of one run: the key in `Run.series`, the panel's title, the label of its axis.
PANELS = [
    ("loss", "Loss", "loss"),
    ("accuracy", "Held-out accuracy", "share of pairs"),
    ("distance", "Distance to the optimum", "‖w − w*‖"),
    ("variance_reduction", "Gradient noise removed", "share of the variance"),
    ("bias", "Bias of the running mean", "1 − cos(m, m′)"),
    ("rank", "Rank in force", "directions a block"),
]
COLORS = ["#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]  # readable without colour vision too
STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
PAGE_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
img { width: 100%; background: white; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
td:first-child, th:first-child { text-align: left; }
pre { overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #e4e6ea; } }"""


@dataclass
class Run:
    """What was measured in one run.

    Parameters:
        name: of the method; runs of one name differ in their seed.
        seed: of the run.
        series: values by step, for the keys of `PANELS`; `{"loss": [(step, value), …]}`.
        spectrum: by step, the tracked eigenvalues as shares of the noise.
        seconds: wall time.
    """

    name: str
    seed: int
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    spectrum: list[tuple[int, list[float]]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, key: str, step: int, value: float) -> None:
        self.series.setdefault(key, []).append((step, value))

    def mean(self, key: str, share: float = 1.0) -> float | None:
        """Mean over the last `share` of what was recorded, at least the last value; None where there is nothing."""
        values = [value for _, value in self.series.get(key, [])]
        values = values[-max(1, int(share * len(values))) :]
        return sum(values) / len(values) if values else None


def draw(runs: Sequence[Run], path: Path, title: str) -> None:
    """One PNG with a panel for everything that was measured; lines are means over seeds, bands their range.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('The plots need matplotlib: pip install -e ".[plot]".') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in PANELS if any(panel[0] in run.series for run in runs)]
    columns = 3
    rows = -(-(len(panels) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), layout="constrained")
    names = list(dict.fromkeys(run.name for run in runs))
    for axis, (key, heading, label) in zip(axes.flat, panels):
        for name, color, style in zip(names, COLORS, STYLES):
            lines = [run.series[key] for run in runs if run.name == name and key in run.series]
            if lines:
                steps = [step for step, _ in lines[0]]
                values = list(zip(*([value for _, value in line] for line in lines)))
                mean = [sum(column) / len(column) for column in values]
                axis.plot(steps, mean, color=color, linestyle=style, label=name, linewidth=1.8)
                if len(lines) > 1:
                    axis.fill_between(steps, *zip(*((min(v), max(v)) for v in values)), color=color, alpha=0.12, lw=0)
        axis.set(title=heading, xlabel="optimizer step", ylabel=label)
        drawn = [value for run in runs for _, value in run.series.get(key, [])]
        if key in ("loss", "distance") and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axis = axes.flat[len(panels)]
    _draw_spectrum(axis, next((run for run in reversed(runs) if run.spectrum), None))
    for empty in axes.flat[len(panels) + 1 :]:
        empty.axis("off")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_spectrum(axis: Any, run: Run | None) -> None:
    axis.set(title="Eigenvalues of the noise over time", xlabel="direction", ylabel="share of the noise")
    if run is None:
        axis.text(0.5, 0.5, "no basis was fitted", ha="center", transform=axis.transAxes)
        return
    picked = [run.spectrum[round(i * (len(run.spectrum) - 1) / 4)] for i in range(5)]
    for i, (step, values) in enumerate(dict(picked).items()):
        positive = [value for value in values if value > 0]
        axis.plot(range(1, len(positive) + 1), positive, color=str(0.75 - 0.18 * i), marker=".", label=f"step {step}")
    axis.set_yscale("log")
    axis.set_title(f"Eigenvalues of the noise over time ({run.name})")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=8)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a method: means over seeds, of the loss and the like over the last fifth of a run."""
    last = [key for key in ("loss", "accuracy", "distance") if any(key in run.series for run in runs)]
    means = {"variance_reduction": "noise removed", "bias": "bias", "rank": "rank"}
    header = ["method", "seeds", *(f"end {key}" for key in last), *means.values(), "seconds"]
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        figures = [[run.mean(key, 0.2) for run in mine] for key in last] + [
            [run.mean(key) for run in mine] for key in means
        ]
        cells = [
            "-" if None in values else f"{sum(value or 0.0 for value in values) / len(values):.4g}"
            for values in figures
        ]
        rows.append([name, str(len(mine)), *cells, f"{sum(run.seconds for run in mine) / len(mine):.1f}"])
    return header, rows


def write_page(runs: Sequence[Run], folder: Path, title: str, settings: dict) -> list[Path]:
    """`comparison.png`, `comparison.html` (self-contained) and `comparison.json` (settings and all figures)."""
    folder.mkdir(parents=True, exist_ok=True)
    png, page, raw = (folder / f"comparison.{ending}" for ending in ("png", "html", "json"))
    draw(runs, png, title)
    raw.write_text(json.dumps({"title": title, "settings": settings, "runs": [asdict(run) for run in runs]}, indent=1))
    header, rows = table(runs)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    image = base64.b64encode(png.read_bytes()).decode()
    page.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width">
<style>
{PAGE_STYLE}
</style></head><body>
<h1>{html.escape(title)}</h1>
<img alt="loss, noise removed, bias, rank and spectrum of each method" src="data:image/png;base64,{image}">
<table><tr>{"".join(f"<th>{html.escape(name)}</th>" for name in header)}</tr>{lines}</table>
<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre>
</body></html>
"""
    )
    return [png, page, raw]
