"""Tables and a picture of the study `variance`: what filters take away, pooled over runs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .stats import of_sums, ratio_of_sums
from .tables import line, words
from .variance import PAIRS, POINTS, RANKS, STRATEGIES

BATCH = 4  # micro-batches of a step
SHOWN = [("keep-16", "adapter"), ("noise-16", "adapter"), ("random-16", "adapter")]
SHOWN += [("keep-4", "factored"), ("noise-4", "factored"), ("random-4", "factored")]
UNKNOWN = "not known"
COLOURS = {"keep": "#1f6fb4", "noise": "#b4341f", "hybrid": "#7a4fb4", "random": "#8a8a8a"}


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
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for covariance, style in (("adapter", "-o"), ("factored", "--s")):
        ranks = RANKS[covariance]
        for strategy in STRATEGIES:
            found = [scores["middle", covariance, f"{strategy}-{rank}"] for rank in ranks]
            look = {"color": COLOURS[strategy], "markersize": 4, "label": f"{strategy}, {covariance}"}
            for panel, name in zip(axes, ("variance", "signal")):
                panel.plot(ranks, [score[name][0] for score in found], style, **look)
                if found[0][name][1] is not None:
                    bounds = zip(*(score[name][1] for score in found))
                    panel.fill_between(ranks, *bounds, color=COLOURS[strategy], alpha=0.12, linewidth=0)
        which = "keep-16" if covariance == "adapter" else "keep-4"
        for name, mark in ((which, COLOURS["keep"]), (which.replace("keep", "noise"), COLOURS["noise"])):
            errors = [scores[point, covariance, name]["error"][0] for point in POINTS]
            axes[2].plot(list(POINTS), errors, style, color=mark, markersize=4, label=f"{name}, {covariance}")
    for panel, title in zip(axes, ("share of the variance removed", "share of the signal removed")):
        panel.set(title=f"{title}, middle of the run", xlabel="rank", xscale="log", ylim=(-0.05, 1))
        panel.set_xticks(RANKS["adapter"], [str(rank) for rank in RANKS["adapter"]])
    axes[2].axhline(1, color="#222222", linewidth=1)
    axes[2].set(
        title="squared error of a batch, as a share of the unfiltered", xlabel="point of the run", ylim=(0, 1.05)
    )
    axes[0].legend(fontsize=7, frameon=False)
    axes[2].legend(fontsize=7, frameon=False)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    figure.suptitle(f"{task}: filters fitted on some micro-batches, scored on others, {runs} runs")
    figure.savefig(path, dpi=110)
    plt.close(figure)
