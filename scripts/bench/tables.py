"""Tables of the grid, from its raw files alone: paired differences with bootstrap intervals, and words for them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from .grid import best_rate, final_loss, losses_by_rate
from .methods import WORDS
from .stats import START, adjusted, gold_at_equal_kl, interval, least_found, p_value, ratio_of_sums, steps_to, verdict

SHARES = (0.25, 0.5, 1.0)  # points of plain's run
UNFILTERED = ("norm-matched",)  # it measures a filter that it does not apply

# ---- what is compared ----


def reported(records: list[dict], task: str) -> dict[tuple[str, float], dict[int, dict]]:
    """Reported runs of a task by method and rate, then by seed."""
    found: dict[tuple[str, float], dict[int, dict]] = {}
    for record in records:
        cell = record["cell"]
        if cell["task"] == task and cell["role"] == "report":
            found.setdefault((cell["method"], cell["lr"]), {})[cell["seed"]] = record
    return found


def _samples(by_seed: dict[int, dict], seeds: list[int], figure: str) -> np.ndarray:
    """(seeds,) a figure of the samples, nan where the run diverged."""
    return np.array([by_seed[seed]["samples"].get(figure, math.nan) for seed in seeds])


def compare(records: list[dict], task: str) -> list[dict]:
    """Rows of figures, one for each method at the rate that the choosing seeds picked, in the order of WORDS.

    Empty where plain AdamW, which all are compared with, is not there.
    """
    runs, rows = reported(records, task), []
    rates = {name: losses_by_rate(records, task, name) for name in WORDS}
    best = {name: best_rate(losses) for name, losses in rates.items() if losses}
    plain = runs.get(("plain", best["plain"][0]), {}) if "plain" in best else {}
    for name, (lr, edge) in best.items():
        own = runs.get((name, lr), {})
        seeds = sorted(own.keys() & plain.keys())
        if not seeds:
            continue
        mine, theirs = [own[seed] for seed in seeds], [plain[seed] for seed in seeds]
        losses, others = (np.array([final_loss(run) for run in part]) for part in (mine, theirs))
        row = {"method": name, "lr": lr, "edge": edge, "seeds": len(seeds)}
        bounds, level = interval(losses - others), others.mean()
        share = (losses - others).mean() / level, bounds and (bounds[0] / level, bounds[1] / level)
        row |= {"loss": losses.mean(), "apart": losses - others, "interval": bounds, "gap": share}
        row["rivals"] = {
            rate: np.array([final_loss(own[seed]) - final_loss(part[seed]) for seed in seeds if seed in part])
            for (other, rate), part in runs.items()
            if other == "plain" and part is not plain
        }
        for figure in ("accuracy", "margin"):
            row[figure] = np.array([run["curve"][figure][-1] for run in mine], float).mean()  # nan where one diverged
        for figure in ("gold", "kl"):
            row[figure] = _samples(own, seeds, figure).mean()
        measured = [run["nspo2"] for run in mine if "variance_reduction" in run["nspo2"] and name not in UNFILTERED]
        row["removed"] = [figures["variance_reduction"] for figures in measured]
        row["rank"] = statistics.fmean(figures["rank"] for figures in measured) if measured else None
        row["pairs"] = mine[0]["pairs_a_step"]
        row["ms"] = statistics.median(run["ms_a_step"] for run in mine)
        rows.append(row)
    tested = [row for row in rows if row["method"] != "plain"]
    for row, corrected in zip(tested, adjusted([p_value(row["apart"]) for row in tested])):
        row["corrected"] = corrected
    return rows


def add_speed_and_frontier(rows: list[dict], records: list[dict], task: str) -> None:
    """Into rows of [`compare`]: steps to plain's loss at SHARES of its run, gold score less plain's at its KL."""
    runs = reported(records, task)
    plain = next(runs["plain", row["lr"]] for row in rows if row["method"] == "plain")
    for row in rows:
        own = runs[row["method"], row["lr"]]
        seeds = sorted(own.keys() & plain.keys())
        curves, theirs = ([part[seed]["curve"] for seed in seeds] for part in (own, plain))
        row["frontier"] = None if row["method"] == "plain" else frontier(runs, own, seeds)
        mean = np.mean([np.array(curve["loss"], float) for curve in theirs], 0)
        for at in SHARES:
            steps = theirs[0]["step"]
            target = float(np.interp(at * steps[-1], [0, *steps], [START, *mean]))
            if target >= START:  # plain has learned nothing yet
                row[at] = math.nan, None, 0
                continue
            needed, reached = zip(*(steps_to(curve, target) for curve in curves))
            row[at] = *ratio_of_sums(needed, [steps_to(curve, target)[0] for curve in theirs]), sum(reached)


def frontier(runs: dict, own: dict[int, dict], seeds: list[int], but: float | None = None):
    """Gold score of `own` less that of plain at the same KL, between its rates (without the rate `but`)."""
    around = [by_seed for (name, lr), by_seed in runs.items() if name == "plain" and lr != but]
    common = [seed for seed in seeds if all(seed in by_seed for by_seed in around)]
    if not common or not around:
        return None
    of_plain = (np.array([_samples(by_seed, common, figure) for by_seed in around]) for figure in ("kl", "gold"))
    return gold_at_equal_kl(_samples(own, common, "kl"), _samples(own, common, "gold"), *of_plain)


# ---- Markdown ----


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def words(
    value: float, bounds: tuple[float, float] | None, form: str = "+.4f", scale: float = 1, unit: str = ""
) -> str:
    """A figure with its interval, if it has one."""
    ends = "" if bounds is None else f" [{', '.join(f'{scale * end:{form}}' for end in bounds)}]"
    return f"{scale * value:{form}}{unit}{ends}"


def difference(row: dict) -> list[str]:
    """Difference to plain with its interval, and what it shows.

    A method that beats plain at the rate chosen for it has not won where plain does as well at another,
    or where seeds are missing that would tell.
    """
    if row["method"] == "plain":
        return ["", ""]
    shown = verdict(row["apart"], row.get("corrected"))
    if shown.endswith("better"):
        lost = {rate: apart.mean() for rate, apart in row["rivals"].items() if verdict(apart) != "better"}
        if lost:
            shown += f", but not than `plain` at {max(lost, key=lost.get):g}"
        elif not row["rivals"]:
            shown += ", but `plain` has one rate only"
    return [words(row["apart"].mean(), row["interval"]), shown]


def loss_table(rows: list[dict]) -> list[str]:
    head = ["method", "learning rate", "held-out loss", "difference to plain [95 %]", "", "accuracy", "margin"]
    lines = [line([*head, "noise removed", "pairs per step", "CPU ms per step"]), "|---" * 10 + "|"]
    for row in rows:
        rate = f"{row['lr']:g}" + (" (at the edge of the grid)" if row["edge"] else "")
        removed = f"{100 * statistics.fmean(row['removed']):.0f} %, rank {row['rank']:.1f}" if row["removed"] else ""
        figures = [f"{row['accuracy']:.3f}", f"{row['margin']:.2f}", removed, str(row["pairs"]), f"{row['ms']:.0f}"]
        lines.append(line([f"`{row['method']}`", rate, f"{row['loss']:.4f}", *difference(row), *figures]))
    return lines


def gold_table(rows: list[dict]) -> list[str]:
    head = ["method", "gold score", "KL", "gold score less plain's at the same KL [95 %]"]
    head += [f"steps to plain's loss at {100 * at:.0f} % of its run" for at in SHARES]
    lines = [line(head), "|---" * 7 + "|"]
    for row in rows:
        gain = "" if row["method"] == "plain" else "KL outside of plain's"
        if row["frontier"]:
            gain = words(*row["frontier"], form="+.2f")
        steps = []
        for ratio, bounds, reached in (row[at] for at in SHARES):
            missed = row["seeds"] - reached
            note = f" ({missed} of {row['seeds']} never)" if missed else ""
            steps.append(words(ratio, None if row["method"] == "plain" else bounds, ".0f", 100, " %") + note)
        lines.append(line([f"`{row['method']}`", f"{row['gold']:.2f}", f"{row['kl']:.1f}", gain, *steps]))
    return lines


READING = """- Each method runs at the rate with the lowest mean held-out loss over other seeds and other pairs of the
  test split. The outermost rates were tried only where the best one was at the edge.
- Differences are paired by seed: same order of the data, same start of LoRA. Intervals are over seeds, on the same
  held-out pairs. They are percentile bootstraps, which cover the truth in 89 % of simulations with 10 seeds.
- Better, worse: an exact sign-flip permutation test has p < 0.05 after correction for the number of comparisons in the
  table (Benjamini and Hochberg). Perhaps better, perhaps worse: only without the correction.
- Plain AdamW was also run at half and double its rate and at the rates of the others. A method that beats it only at
  the rate chosen for it has not won, and the table says so. These rates are not in the correction.
- Noise removed: on micro-batches that the basis had not seen, mean over the filtered steps, with the mean rank.
- CPU ms: in the benchmark's own loop, two runs at a time. `overhead` measures what NSPO2 costs.
- KL: mean over samples of log p - log p of the reference, in nats.
- Gold score at the same KL: plain's is interpolated between its rates. The curve is concave, so this flatters the
  methods in between. The gain of plain's own runs is given under each table: a gain below it shows nothing.
- Steps: until a run's held-out loss is as low as the mean of plain's runs at that point. Sums over seeds, as a share
  of plain's sum; a run that never gets there counts in full. Gold score, KL and steps are not corrected."""


def power(rows: list[dict]) -> str:
    """From which size on true differences would have been found."""
    found = [(row, least_found(row["apart"])) for row in rows if row["method"] in ("keep", "noise", "hybrid")]
    texts = [
        f"{100 * least / (row['loss'] - row['apart'].mean()):.1f} % for `{row['method']}`"
        for row, least in found
        if least
    ]
    return f"A true difference would be found 4 times in 5 from about {', '.join(texts)} on." if texts else ""


def section(records: list[dict], rows: list[dict], task: str, plot: str) -> list[str]:
    own = [record for record in records if record["cell"]["task"] == task]
    cell = next(record["cell"] for record in own if record["cell"]["role"] == "report")
    chosen = [record["cell"] for record in own if record["cell"]["role"] == "select"]
    rates = ", ".join(f"{lr:g}" for lr in sorted({cell["lr"] for cell in chosen}))
    runs, plain = reported(records, task), rows[0]
    itself = frontier(runs, runs["plain", plain["lr"]], sorted(runs["plain", plain["lr"]]), but=plain["lr"])
    number, seeds = plain["seeds"], len({cell["seed"] for cell in chosen})
    about = f"""{cell["steps"]} steps, {number} seeds, {cell["held_out"]} held-out pairs, {cell["samples"]} samples.
Learning rates: {rates}, chosen with {seeds} seeds. {power(rows)}"""
    notes = f"Plain's own runs at its best rate gain {words(*itself, form='+.2f')} over the chord." if itself else ""
    picture = f"![{task}: held-out loss, paired difference to plain AdamW, gold score against KL]({plot})"
    return [about, "", *loss_table(rows), "", *gold_table(rows), "", notes, "", picture]
