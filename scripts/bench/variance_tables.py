"""Tables and a picture of the study `variance`: what filters take away, pooled over runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nspo2_trl.cli.plots import band, picture
from nspo2_trl.cli.plots import line as line_on
from nspo2_trl.cli.runs import Run

from .stats import of_sums, ratio_of_sums
from .tables import line, words
from .variance import PAIRS, POINTS, RANKS, STRATEGIES

BATCH = 4  # micro-batches of a step
SHOWN = [(f"{name}-{r}", how) for how, r in (("adapter", 16), ("factored", 4)) for name in ("keep", "noise", "random")]
UNKNOWN = "not known"


READING = f"""Command: `python scripts/benchmark.py variance`. At each point some micro-batches of {PAIRS} pairs give
directions and reference, others the scores. The rank is used as given, without the significance test and the bounds of
training. Brackets: 95 % over the runs, percentile bootstrap.

- Relative variance: variance divided by the squared mean, of what is left, as a share of the raw gradient's. Above 1
  the filter makes the gradient noisier for its length.
- Error of a batch: mean squared distance between the filtered gradient of {BATCH} micro-batches and the mean over all
  data, as a share of the raw one's."""


def pooled(records: list[dict], point: str, covariance: str, which: str) -> dict[str, tuple[float, tuple | None]]:
    """Scores of a filter over all runs, each with its 95 % interval: ratios of sums over runs.

    variance: share of the trace of the covariance that is removed. signal: share of the mean's square, without bias.
    relative: variance over the mean's square, of what is left, as a share of the unfiltered. error: mean squared
    distance of a filtered batch's gradient to the mean over all data, as a share of the unfiltered batch's.
    """
    cells = [record["taken"][f"{point} {covariance}"] for record in records]
    noise, signal = zip(*(cell["unfiltered"] for cell in cells))
    less_noise, less_signal = zip(*(cell[which] for cell in cells))
    left = [a - b for a, b in zip(noise, less_noise)]
    kept = [a - b for a, b in zip(signal, less_signal)]
    found = {"variance": ratio_of_sums(less_noise, noise), "signal": ratio_of_sums(less_signal, signal)}
    found["relative"] = of_sums(lambda a, b, c, d: a * d / (b * c), left, kept, noise, signal)
    wrong = [a / BATCH + b for a, b in zip(left, less_signal)]
    return found | {"error": ratio_of_sums(wrong, [a / BATCH for a in noise])}


def scores_of(records: list[dict]) -> dict[tuple[str, str, str], dict]:
    """[`pooled`] for all that is shown, by point, covariance and filter."""
    middle = [("middle", how, f"{name}-{rank}") for how in RANKS for name in STRATEGIES for rank in RANKS[how]]
    over = [(point, how, which) for which, how in SHOWN for point in POINTS]
    return {key: pooled(records, *key) for key in dict.fromkeys(middle + over)}


def is_known(score: tuple[float, tuple[float, float] | None]) -> bool:
    """Whether the interval is narrow enough to mean something."""
    return score[1] is not None and score[1][1] - score[1][0] < 0.4


def told(name: str, scores: dict) -> str:
    """A score in words, or that it is not known: where the signal is lost in noise."""
    value, bounds = scores[name]
    if name in ("signal", "relative") and bounds is not None and not is_known(scores["signal"]):
        return UNKNOWN
    percent = name in ("variance", "signal")
    return words(value, bounds, ".0f", 100, " %") if percent else words(value, bounds, ".2f")


def section(records: list[dict], scores: dict, task: str, plot: str) -> list[str]:
    cell = records[0]["cell"]
    lines = [
        f"{len(records)} runs of plain AdamW (rate {cell['lr']:g}, {cell['steps']} steps), stopped at four points; "
        f"{cell['fit']} micro-batches fit the filter, {cell['fresh']} score it.",
        "",
        "In the middle of the run:",
        "",
        line(["covariance", "filter", "variance removed", "signal removed", "relative variance", "error of a batch"]),
        "|---|---|---|---|---|---|",
    ]
    for covariance, ranks in RANKS.items():
        for strategy in STRATEGIES:
            for rank in ranks:
                found = scores["middle", covariance, f"{strategy}-{rank}"]
                figures = [told(name, found) for name in ("variance", "signal", "relative", "error")]
                lines.append(line([f"`{covariance}`", f"`{strategy}`, rank {rank}", *figures]))
    lines += ["", "Over the run, variance removed / signal removed:", "", line(["filter", *POINTS])]
    lines += ["|---|" + "---|" * len(POINTS)]
    for which, covariance in SHOWN:
        figures = []
        for point in POINTS:
            found = scores[point, covariance, which]
            figures.append(f"{told('variance', found)} / {told('signal', found)}")
        lines.append(line([f"`{which.replace('-', '`, rank ')}, `{covariance}`", *figures]))
    scales = []
    for point in POINTS:
        noise, signal = zip(*(record["taken"][f"{point} adapter"]["unfiltered"] for record in records))
        low = ratio_of_sums(signal, noise)[1]  # the signal may be lost in noise: then there is only a lower bound
        if low is None or low[0] <= 0:
            scales.append(UNKNOWN if low is None else f"above {PAIRS / low[1]:,.0f}")
        else:
            scales.append(f"{PAIRS * sum(noise) / sum(signal):,.0f} [{PAIRS / low[1]:,.0f}, {PAIRS / low[0]:,.0f}]")
    lines += [line(["noise scale, pairs", *scales]), ""]
    return [*lines, f"![{task}: variance and signal removed against the rank]({plot})", ""]


def draw(scores: dict, runs: int, task: str, path: Path) -> None:
    """Variance and signal removed against the rank in the middle of the run; error of a batch over the run."""
    kinds = [(strategy, covariance) for covariance in RANKS for strategy in STRATEGIES]

    def removed(axis: Any, name: str) -> None:
        for index, (strategy, covariance) in enumerate(kinds):
            ranks = RANKS[covariance]
            found = [scores["middle", covariance, f"{strategy}-{rank}"][name] for rank in ranks]
            line_on(axis, ranks, [value for value, _ in found], index, points=True)
            if found[0][1] is not None:
                band(axis, ranks, *zip(*(bounds for _, bounds in found)), index)
        axis.set(xlabel="rank", ylabel="share", xscale="log", ylim=(-0.05, 1))
        axis.set_xticks(RANKS["adapter"], RANKS["adapter"], minor=False)

    def errors(axis: Any) -> None:
        for which, covariance in SHOWN:
            if (kind := (which.split("-")[0], covariance))[0] != "random":
                found = [scores[point, covariance, which]["error"][0] for point in POINTS]
                line_on(axis, range(len(POINTS)), found, kinds.index(kind), points=True)
        axis.axhline(1, color="#222222", linewidth=1)
        axis.set(xlabel="point of the run", ylabel="share of the unfiltered", ylim=(0, 1.05))
        axis.set_xticks(range(len(POINTS)), list(POINTS))

    parts = [(f"{name} removed, middle of the run", partial(removed, name=name)) for name in ("variance", "signal")]
    parts += [("squared error of a batch, rank 16 and 4", errors)]
    title = f"{task}: filters fitted on some micro-batches, scored on others, {runs} runs"
    picture(path, title, parts, [Run(", ".join(kind), index, 0, [], []) for index, kind in enumerate(kinds)])
