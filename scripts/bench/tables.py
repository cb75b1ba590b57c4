"""Tables of the grid, from its raw files alone: paired differences with bootstrap intervals, and words for them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from .grid import best_rate, final_loss, losses_by_rate
from .methods import METHODS
from .stats import gold_at_equal_kl, interval, step_shares, verdict

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
    """One row of figures a method, in the order of METHODS; empty where plain AdamW is not there."""
    runs, rows = reported(records, task), []
    rates = {name: losses_by_rate(records, task, name) for name in METHODS}
    best = {name: best_rate(losses) for name, losses in rates.items() if losses}
    plain = runs.get(("plain", best["plain"][0]), {}) if "plain" in best else {}
    around = [by_seed for (name, _), by_seed in runs.items() if name == "plain"]
    for name in METHODS:
        own = runs.get((name, best[name][0]), {}) if name in best else {}
        seeds = sorted(own.keys() & plain.keys())
        if not seeds:
            continue
        mine, theirs = [own[seed] for seed in seeds], [plain[seed] for seed in seeds]
        losses = np.array([final_loss(run) for run in mine])
        apart = losses - np.array([final_loss(run) for run in theirs])
        row = {"method": name, "lr": best[name][0], "edge": best[name][1], "seeds": len(seeds), "losses": losses}
        row |= {
            "frontier": None,
            "loss": losses.mean(),
            "apart": apart.mean(),
            "bounds": None if name == "plain" else interval(apart),
        }
        for figure in ("accuracy", "margin"):
            row[figure] = np.array([run["curve"][figure][-1] for run in mine], float).mean()  # nan where one diverged
        for figure in ("gold", "kl", "forgotten"):
            row[figure] = _samples(own, seeds, figure).mean()
        common = [seed for seed in seeds if all(seed in by_seed for by_seed in around)]
        of_plain = {figure: [_samples(by_seed, common, figure) for by_seed in around] for figure in ("kl", "gold")}
        if name != "plain" and common:
            row["frontier"] = gold_at_equal_kl(
                _samples(own, common, "kl"),
                _samples(own, common, "gold"),
                np.array(of_plain["kl"]),
                np.array(of_plain["gold"]),
            )
        for at in (0.25, 0.5, 1.0):
            shares = [step_shares(a["curve"], b["curve"], at) for a, b in zip(mine, theirs)]
            row[f"steps_{at:g}"] = [share for share in shares if share is not None]
        row["removed"] = [run["nspo2"]["variance_reduction"] for run in mine if "variance_reduction" in run["nspo2"]]
        row["pairs"] = mine[0]["pairs_a_step"]
        row["ms"] = statistics.median(run["ms_a_step"] for run in mine)
        rows.append(row)
    return rows


# ---- Markdown ----


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _range(bounds: tuple[float, float] | None, digits: int) -> str:
    return "" if bounds is None else f" [{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def _edge(row: dict) -> str:
    return f"{row['lr']:g}" + (" (at the edge of the grid)" if row["edge"] else "")


def _steps(shares: list[float], seeds: int) -> str:
    if not shares:
        return "not reached"
    missed = seeds - len(shares)
    return f"{100 * statistics.fmean(shares):.0f} %" + (f" ({missed} of {seeds} not reached)" if missed else "")


def loss_table(rows: list[dict]) -> list[str]:
    head = ["method", "learning rate", "held-out loss", "difference to plain [95 %]", "", "accuracy", "margin"]
    lines = [
        line([*head, "noise removed", "pairs a step", "CPU ms a step"]),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = row["method"] == "plain"
        apart = "" if plain else f"{row['apart']:+.4f}{_range(row['bounds'], 4)}"
        removed = f"{100 * statistics.fmean(row['removed']):.0f} %" if row["removed"] else ""
        figures = [f"{row['accuracy']:.3f}", f"{row['margin']:.2f}", removed, str(row["pairs"]), f"{row['ms']:.0f}"]
        word = "" if plain else verdict(row["bounds"])
        lines.append(line([f"`{row['method']}`", _edge(row), f"{row['loss']:.4f}", apart, word, *figures]))
    return lines


def gold_table(rows: list[dict]) -> list[str]:
    head = ["method", "gold score", "KL", "gold score less plain's at the same KL [95 %]", ""]
    head += [f"steps to plain's loss at {share} of its run" for share in ("25 %", "50 %", "100 %")]
    lines = [line(head), "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        gain, word = "", ""
        if row["method"] != "plain":
            gain, word = "KL outside of plain's", "not comparable"
        if row["frontier"]:
            gain = f"{row['frontier'][0]:+.2f}{_range(row['frontier'][1], 2)}"
            word = verdict(row["frontier"][1], more_is_better=True)
        shares = [_steps(row[f"steps_{at}"], row["seeds"]) for at in ("0.25", "0.5", "1")]
        lines.append(line([f"`{row['method']}`", f"{row['gold']:.2f}", f"{row['kl']:.1f}", gain, word, *shares]))
    return lines


def section(records: list[dict], rows: list[dict], task: str, plot: str) -> list[str]:
    run = next(r for r in records if r["cell"]["task"] == task and r["cell"]["role"] == "report")
    tried = {r["cell"]["lr"] for r in records if r["cell"]["task"] == task and r["cell"]["role"] == "select"}
    choosing = {r["cell"]["seed"] for r in records if r["cell"]["task"] == task and r["cell"]["role"] == "select"}
    compared = len(rows) - 1
    words = [
        f"{run['cell']['steps']} steps, {rows[0]['seeds']} seeds, {run['cell']['held_out']} held-out pairs, "
        f"{run['cell']['samples']} samples a run. Each method at the best of its learning rates "
        f"({', '.join(f'{rate:g}' for rate in sorted(tried))}; the outer ones only where the best was at the edge), "
        f"chosen by the mean held-out loss of {len(choosing)} other seeds on other pairs. Differences are paired by "
        f"seed: same order of the data, same start of LoRA. {compared} comparisons are made: about "
        f"{0.05 * compared:.1f} of them "
        "would show a difference at 95 % if there were none, and more, since a bootstrap of few seeds is narrow.",
        "",
        *loss_table(rows),
        "",
        "KL: mean over samples of log p - log p of the reference, in nats. Plain's gold score at another KL is "
        "interpolated between its runs at half, once and twice its best rate. Steps: the first time that a run's "
        "held-out loss is as low as plain's (same seed), as a share of plain's own steps to there; means over the "
        "seeds that reached it.",
        "",
        *gold_table(rows),
        "",
        f"![{task}: held-out loss, paired difference to plain AdamW, gold score against KL]({plot})",
    ]
    return words
