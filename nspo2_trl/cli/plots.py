"""The panels of a report, each one inline SVG for light and dark pages. Needs matplotlib."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .comparison import STYLES
from .panels import Panel
from .runs import Run, unit_of

# Of each run's lines, on a light and on a dark page; told apart without colour vision too, and by the dashes.
COLORS = [
    ("#0072b2", "#56b4e9"),
    ("#c95500", "#ff9a57"),
    ("#00805b", "#2fd0a0"),
    ("#b0578a", "#e39ac6"),
    ("#8a6500", "#f0c040"),
    ("#444444", "#c9ced6"),
]
# What is drawn in these colours takes the page's: one drawing for both themes.
INK = "#010203"
PLACEHOLDERS = [f"#0a0b{i:02x}" for i in range(len(COLORS))]
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "path.simplify": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@matplotlib.rc_context(RC)
def draw(panel: Panel, runs: Sequence[Run], by_time: bool = False) -> str | None:
    """The SVG, or None where no run has anything to show."""
    shown = [run for run in runs if run.clock or not by_time]
    if not any(run.has(key) for run in shown for key in panel.lines):
        return None
    ends = [run.seconds_at(run.steps) if by_time else run.steps for run in shown]
    unit, word = unit_of(max(ends)) if by_time else (1, "")
    against = f"training time, {word}" if by_time else "step"
    figure, axis = _axes(against, panel.label)
    end = max(ends) / unit or 1
    axis.set_xlim(-0.03 * end, 1.03 * end)
    levels = set()
    for run in shown:
        for key in panel.lines:
            steps, values = run.series(key)
            held_out = key.startswith("eval_")
            if panel.key == "accuracy" and held_out and steps[:1] == [0]:
                steps, values = steps[1:], values[1:]
            x = [run.seconds_at(step) / unit for step in steps] if by_time else steps
            # what was held out is not to drown in the noise of the training pairs
            look = (2.0, 1.0) if held_out or len(panel.lines) == 1 else (0.9, 0.6)
            _line(axis, x, values, run.index, *look, points=held_out)
            if panel.band and run.has(panel.band):
                _, error = run.series(panel.band)
                low, high = ([v + sign * e for v, e in zip(values, error)] for sign in (-1, 1))
                axis.fill_between(x, low, high, color=_color(run.index), alpha=0.18, linewidth=0)
            if panel.level and run.has(panel.level) and run.has(key):
                steps, values = run.series(panel.level)
                _line(axis, steps, values, run.index, 0.9)
                levels |= {value for value in values if math.isfinite(value)}
    for value in levels:
        at = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
        axis.annotate(f"batch size {value:g}", (1, value), (0, 4), **at)
    if panel.log:
        _log_axis(axis)
    elif not panel.by_time and axis.dataLim.y0 >= 0:
        top = axis.dataLim.y1 or 1.0
        axis.set_ylim(-0.04 * top, 1.08 * top)
    if panel.whole:
        axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return to_svg(figure, f"{panel.title} against {against}", f"{panel.key}-{by_time}")


@matplotlib.rc_context(RC)
def draw_spectrum(runs: Sequence[Run]) -> str | None:
    """Eigenvalues of the noise in a few checkpoints of each run, the later the stronger."""
    if not any(run.spectra for run in runs):
        return None
    figure, axis = _axes("direction", "share of the noise")
    for run in runs:
        for i, (_, values) in enumerate(run.spectra):
            strength = 1.0 if i == len(run.spectra) - 1 else 0.2 + 0.35 * i / (len(run.spectra) - 1)
            _line(axis, range(1, len(values) + 1), values, run.index, 1.6, alpha=strength)
    _log_axis(axis)
    return to_svg(figure, "Eigenvalues of the noise by direction", "spectrum")


@matplotlib.rc_context(RC)
def swatch(index: int) -> str:
    """A short piece of a run's line, for the legend."""
    figure = Figure(figsize=(0.5, 0.14))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(-1, 1))
    axis.plot([0, 1], [0, 0], color=_color(index), linestyle=_dashes(index), linewidth=2)
    return to_svg(figure, "", f"swatch-{index}")


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.5, 2.9))
    # the same place in every panel, so that axes stand in line on the page; wide enough for labels such as −0.0025
    axis = figure.add_axes((0.19, 0.17, 0.78, 0.76))
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=not x_label.startswith("training time")))
    axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.grid(color=INK, alpha=0.15, linewidth=0.7)
    return figure, axis


def _log_axis(axis: Any) -> None:
    """Readable ticks over half a power of ten as well as over six; 10² would be a drawing of its own in SVG."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    between = (1, 2, 5) if high < 300 * low else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=between, numticks=12))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _line(
    axis: Any,
    x: Sequence[float],
    y: Sequence[float],
    index: int,
    width: float,
    alpha: float = 1.0,
    points: bool = False,
) -> None:
    """One line; a value without neighbours would be none, so it gets a point."""
    known = [False, *(math.isfinite(value) for value in y), False]
    if not any(known):
        return
    marked = [i for i in range(len(y)) if known[i + 1] and (points or not (known[i] or known[i + 2]))]
    axis.plot(
        x,
        y,
        color=_color(index),
        linestyle=_dashes(index),
        linewidth=width,
        alpha=alpha,
        zorder=3 if points else 2,
        marker="o",
        markersize=4,
        markevery=marked[:: len(marked) // 40 + 1] if points else marked,
    )


def _color(index: int) -> str:
    return PLACEHOLDERS[index % len(PLACEHOLDERS)]


def _dashes(index: int) -> Any:
    return STYLES[(index + index // len(COLORS)) % len(STYLES)]


def to_svg(figure: Figure, label: str, salt: str) -> str:
    """`figure` as an element of a page: its colours are the page's, and no id is another figure's."""
    buffer = io.StringIO()
    with matplotlib.rc_context(RC | {"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)  # figure_1 and the like, in every figure
    box = re.findall(r'viewBox="[^"]*"', svg)[0]
    said = f'role="img" aria-label="{html.escape(label)}"' if label else 'aria-hidden="true"'
    title = f"<title>{html.escape(label)}</title>" if label else ""
    svg = re.sub(r"<svg[^>]*>", f"<svg {box} {said}>{title}", svg, count=1)
    svg = svg.replace(INK, "currentColor").replace("xlink:href", "href")
    for i, placeholder in enumerate(PLACEHOLDERS):
        svg = svg.replace(placeholder, f"var(--run-{i})")
    return svg
