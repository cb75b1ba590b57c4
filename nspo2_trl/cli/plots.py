"""How runs are drawn: panels as inline SVG for light and dark pages, or side by side in a PNG. Needs matplotlib."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

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
STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
# In an SVG what is drawn in these colours takes the page's: one drawing for both themes.
INK = "#010203"
PLACEHOLDERS = [f"#0a0b{i:02x}" for i in range(len(COLORS))]
RC: dict[Any, Any] = {
    "font.size": 10.5,
    "path.simplify": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "axes.prop_cycle": cycler(color=[light for light, _ in COLORS]),
    "grid.alpha": 0.15,
    "grid.linewidth": 0.7,
}
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
SVG = RC | {"svg.fonttype": "none", "axes.prop_cycle": cycler(color=PLACEHOLDERS)}
SVG |= dict.fromkeys(INKED, INK)
# of the axes in every panel, so that they stand in line on the page; wide enough for labels such as −0.0025
PLACE = (0.19, 0.17, 0.78, 0.76)

# ---- on an axis ----


def line(axis: Any, x: Sequence[float], y: Sequence[float], index: int, points: bool = False, **look: Any) -> None:
    """A line of run `index`, with `points` or without; a value without neighbours would be none, so it gets one."""
    known = [False, *(math.isfinite(value) for value in y), False]
    if not any(known):
        return
    marked = [i for i in range(len(y)) if known[i + 1] and (points or not (known[i] or known[i + 2]))]
    every = marked[:: len(marked) // 40 + 1] if points else marked
    look = {"zorder": 3 if points else 2, "marker": "o", "markersize": 4, "markevery": every} | look
    axis.plot(x, y, color=_color(index), linestyle=_dashes(index), **look)


def band(axis: Any, x: Sequence[float], low: Sequence[float], high: Sequence[float], index: int) -> None:
    axis.fill_between(x, low, high, color=_color(index), alpha=0.18, linewidth=0)


def panel_on(axis: Any, panel: Panel, runs: Sequence[Run], by_time: bool = False) -> None:
    """Draw a panel; a key that has its standard error beside it (KEY_se) gets a band."""
    shown = [run for run in runs if run.clock or not by_time]
    ends = [run.seconds_at(run.steps) if by_time else run.steps for run in shown]
    unit, word = unit_of(max(ends)) if by_time else (1, "")
    axis.set(xlabel=f"training time, {word}" if by_time else "step", ylabel=panel.label)
    _ticks(axis, whole=not by_time)
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
            strong = held_out or len(panel.lines) == 1
            look = {"linewidth": 2.0 if strong else 0.9, "alpha": 1.0 if strong else 0.6}
            line(axis, x, values, run.index, points=held_out, **look)
            if strong and run.has(f"{key}_se"):
                errors = run.series(f"{key}_se")[1][-len(values) :]
                low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
                band(axis, x, low, high, run.index)
            if panel.level and run.has(panel.level) and run.has(key):
                steps, values = run.series(panel.level)
                line(axis, steps, values, run.index, linewidth=0.9)
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


def spectrum_on(axis: Any, runs: Sequence[Run]) -> None:
    """Eigenvalues of the noise at a few steps of each run, the later the stronger."""
    axis.set(xlabel="direction", ylabel="share of the noise")
    _ticks(axis, whole=True)
    for run in runs:
        for i, (_, values) in enumerate(run.spectra):
            strength = 1.0 if i == len(run.spectra) - 1 else 0.2 + 0.35 * i / (len(run.spectra) - 1)
            line(axis, range(1, len(values) + 1), values, run.index, linewidth=1.6, alpha=strength)
    _log_axis(axis)


def _ticks(axis: Any, whole: bool) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=whole))
    axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.grid(True)


def _log_axis(axis: Any) -> None:
    """Readable ticks over half a power of ten as well as over six; 10² would be a drawing of its own in SVG."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    between = (1, 2, 5) if high < 300 * low else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=between, numticks=12))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _color(index: int) -> str:
    return f"C{index % len(COLORS)}"


def _dashes(index: int) -> Any:
    return STYLES[(index + index // len(COLORS)) % len(STYLES)]


# ---- a picture ----


def draw(panel: Panel, runs: Sequence[Run], by_time: bool = False) -> str | None:
    """The SVG of a panel, or None where no run has anything to show."""
    if not any(run.has(key) for run in runs if run.clock or not by_time for key in panel.lines):
        return None
    label = f"{panel.title} against {'training time' if by_time else 'step'}"
    return _svg(lambda axis: panel_on(axis, panel, runs, by_time), label, f"{panel.key}-{by_time}")


def draw_spectrum(runs: Sequence[Run]) -> str | None:
    """The SVG of the eigenvalues, or None where no run has any."""
    found = any(run.spectra for run in runs)
    label = "Eigenvalues of the noise by direction"
    return _svg(lambda axis: spectrum_on(axis, runs), label, "spectrum") if found else None


def draw_noise(found: dict) -> str:
    """The SVGs of what `nspo2 measure` found: the noise scale over the run, and the modules' shares."""

    def over_time(axis: Any) -> None:
        parts = [(i + 0.5, part) for i, part in enumerate(found["parts"]) if part and part["value"]]
        where = [100 * x / len(found["parts"]) for x, _ in parts]
        errors = [part["error"] for _, part in parts]
        axis.set(xlabel="% of the steps", ylabel=found["unit"], xlim=(0, 100))
        axis.errorbar(where, [part["value"] for _, part in parts], errors, color=_color(0), marker="o", capsize=3)
        axis.axhline(found["batch"], color=_color(1), linestyle="--")
        axis.grid(True)
        _log_axis(axis)

    def shares(axis: Any) -> None:
        x = range(1, len(found["modules"]) + 1)
        signal, noise = ([entry[name] for entry in found["modules"]] for name in ("signal", "noise"))
        errors = [entry["signal_error"] for entry in found["modules"]]
        axis.errorbar(x, signal, errors, color=_color(0), marker="o", markersize=3, linestyle="", capsize=2)
        axis.plot(x, noise, color=_color(1), marker="x", markersize=4, linestyle="")
        axis.set(xlabel="module, most signal first", ylabel="share")
        _ticks(axis, whole=True)

    drawn = [("parts", "Noise scale over the run", over_time, "Bars: one standard error. Dashed: the batch now.")]
    if found["modules"]:
        drawn.append(("modules", "Shares of the modules", shares, "Points: signal. Crosses: noise."))
    figures = (
        f'<figure id="noise-{key}"><h3>{title}</h3>{_svg(part, title, key)}<figcaption>{words}</figcaption></figure>'
        for key, title, part, words in drawn
    )
    return f'<div class="panels">{"".join(figures)}</div>'


def swatch(index: int) -> str:
    """A short piece of a run's line, for the legend."""

    def piece(axis: Any) -> None:
        axis.axis("off")
        axis.set(xlim=(0, 1), ylim=(-1, 1))
        axis.plot([0, 1], [0, 0], color=_color(index), linestyle=_dashes(index), linewidth=2)

    return _svg(piece, "", f"swatch-{index}", (0.5, 0.14), (0, 0, 1, 1))


@matplotlib.rc_context(RC)
def picture(path: Path, title: str, parts: Sequence[tuple[str, Callable[[Any], None]]], runs: Sequence[Run]) -> None:
    """A PNG of panels side by side, each with its title and what draws it, and a legend of the `runs`."""
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, part) in zip(axes, parts):
        part(axis)
        axis.set_title(name)
    for axis in axes[len(parts) :]:
        axis.axis("off")
    handles = [axes[0].plot([], [], color=_color(run.index), linestyle=_dashes(run.index))[0] for run in runs]
    figure.legend(handles, [run.name for run in runs], loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


@matplotlib.rc_context(SVG)
def _svg(part: Callable, label: str, salt: str, size: tuple = (4.5, 2.9), place: tuple = PLACE) -> str:
    """What `part` draws as an element of a page: its colours are the page's, and no id is another figure's."""
    figure, buffer = Figure(figsize=size), io.StringIO()
    part(figure.add_axes(place))
    with matplotlib.rc_context({"svg.hashsalt": salt}):
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
