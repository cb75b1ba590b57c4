"""What more texts and more time gain: a picture of a study that has both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nspo2_trl.cli.plots import COLORS

from .retain_about import cost
from .retain_judge import METHODS, Row, is_rival, judge, logs, lowest_loss, read, settings
from .retain_page import studies
from .stats import interval, p_value

READING = (
    "Means and 95 % intervals over seeds; of fewer than 6, median and range. The time is that of training, with K's "
    "added where it is used. Left out is what has no share in the table above."
)


def by_texts(judged: Sequence[Row], kind: str) -> list[tuple[int, list[float]]]:
    """The number of texts that K is of, and the logarithms of the shares of KL on texts of a `kind`, one per seed."""
    groups = [group for group in settings(judged) if group[0]["control"].startswith("texts")]
    known = [(int(group[0]["control"].removeprefix("texts")), logs(group, kind)) for group in groups]
    return [(number, values) for number, values in known if values]


def by_time(about: dict, judged: Sequence[Row], kind: str) -> list[tuple[str, float, list[float]]]:
    """Of each adapter its name, processor time as a share of plain's training, and shares as in `by_texts`.

    At the scale of lowest held-out loss, where plain has a scale of that loss. K's time is added where it is used.
    """
    plain, with_k = cost(about["runs"]), cost(about["runs"], about["seconds_of_k"])
    found = []
    for group in lowest_loss(settings(judged)):
        method, rank = group[0]["method"], group[0]["rank"]
        time = (with_k if rank else plain).get(method)
        if time and not group[0]["control"] and (values := logs(group, kind)):
            name = METHODS[method].words + (f", {rank} directions" if rank else "")
            found.append((name, time, [0.0] if is_rival(group[0]) else values))
    return found


def point(axis: Any, x: float, values: list[float], marker: str = "o", **style: Any) -> None:
    few = p_value(values) is None
    middle = statistics.median(values) if few else statistics.fmean(values)
    low, high = (None if few else interval(values)) or (min(values), max(values))
    bars = [[max(0.0, math.exp(middle) - math.exp(low))], [max(0.0, math.exp(high) - math.exp(middle))]]
    axis.errorbar([x], [math.exp(middle)], yerr=bars, fmt=marker, markersize=5, **style)


def draw(about: dict, rows: Sequence[Row], path: Path) -> None:
    """Left: share of plain's KL against the number of texts; right: against time, for the first kind of text."""
    from matplotlib.figure import Figure

    kinds, judged = list(rows[0]["retained"]), judge(rows)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, kind in enumerate(kinds):
        for j, (number, values) in enumerate(by_texts(judged, kind)):
            point(left, number, values, color=COLORS[i][0], label=None if j else kind)
    left.set_xscale("log", base=2)
    left.set(xlabel="retained texts", ylabel="KL, share of plain's at equal held-out loss")
    rank = max(row["rank"] for row in rows if row["control"].startswith("texts"))
    left.set_title(f"{rank} directions after training, of so many texts")
    left.legend()
    for i, (name, time, values) in enumerate(by_time(about, judged, kinds[0])):
        color, marker = COLORS[i % len(COLORS)][0], "osD^v"[i // len(COLORS)]
        point(right, time, values, color=color, marker=marker, label=name)
    right.set(xlabel="processor time of training, and of K, as a share of plain's", ylabel=f"KL on {kinds[0]}, share")
    right.set_title("each at the scale of lowest held-out loss")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.set_yscale("log")
        axis.grid(True, alpha=0.3)
    figure.savefig(path, dpi=110)


def section(raw: Path, docs: Path) -> tuple[list[str], list[Path]]:
    """The part of the page on the studies in RAW/retain-*.jsonl.gz that timed K and varied its texts; pictures."""
    lines, paths = [], []
    for name, path in studies(raw):
        about, rows = read(path)
        if "seconds_of_k" in about and any(row["control"].startswith("texts") for row in rows):
            paths.append(docs / f"retain_{name}_gain.png")
            draw(about, rows, paths[-1])
            lines += ["", f"### More texts, more time: {name}", "", f"{READING} K took {about['seconds_of_k']:.0f} s."]
            lines += ["", f"![{name}: share of plain's KL against texts and against time]({paths[-1].name})"]
    return [*lines, ""] if lines else [], paths
