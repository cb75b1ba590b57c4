"""One picture a task: held-out loss, paired difference to plain AdamW, gold score against KL."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .methods import METHODS
from .stats import interval
from .tables import reported

PLAIN, OURS, CONTROL, PEER = "#222222", "#1f6fb4", "#8a8a8a", "#d2691e"
CONTROLS = ("random", "norm-matched", "beta1-0.95", "batch-x1.31", "batch-x1.5")
STYLES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2)), (0, (1, 3)), (0, (8, 3)))


def colour(method: str) -> str:
    """By kind of method."""
    if method == "plain":
        return PLAIN
    return CONTROL if method in CONTROLS else PEER if "optimizer" in METHODS[method] else OURS


def look(method: str) -> dict:
    """Colour by kind of method, dashes within the kind."""
    same = [name for name in METHODS if colour(name) == colour(method)]
    return {"color": colour(method), "linestyle": STYLES[same.index(method) % len(STYLES)]}


def draw(records: list[dict], rows: list[dict], task: str, path: Path) -> None:
    """Means over seeds; bands are 95 % bootstrap intervals of the paired difference, for plain the seeds' range."""
    runs = reported(records, task)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5.2), layout="constrained")
    plain = runs["plain", rows[0]["lr"]]
    for row in rows:
        own, style = runs[row["method"], row["lr"]], look(row["method"])
        seeds = sorted(own.keys() & plain.keys())
        steps = own[seeds[0]]["curve"]["step"]
        curves = np.array([own[seed]["curve"]["loss"] for seed in seeds], dtype=float)
        left.plot(steps, curves.mean(0), linewidth=1.4, label=row["method"], **style)
        if row["method"] == "plain":
            left.fill_between(steps, curves.min(0), curves.max(0), color=PLAIN, alpha=0.1, linewidth=0)
            middle.axhline(0, color=PLAIN, linewidth=1.4)
        else:
            apart = curves - np.array([plain[seed]["curve"]["loss"] for seed in seeds], dtype=float)
            middle.plot(steps, apart.mean(0), linewidth=1.4, **style)
            bounds = [interval(apart[:, i]) for i in range(len(steps))]
            if row["method"] == "keep" and all(bounds):
                middle.fill_between(steps, *zip(*bounds), color=OURS, alpha=0.15, linewidth=0)
        if row["method"] != "plain":
            right.plot(row["kl"], row["gold"], "o", color=style["color"], markersize=5)
            right.annotate(row["method"], (row["kl"], row["gold"]), xytext=(4, 3), textcoords="offset points", size=7)
    frontier = sorted(
        tuple(np.mean([run["samples"].get(part, np.nan) for run in by_seed.values()]) for part in ("kl", "gold"))
        for (method, _), by_seed in runs.items()
        if method == "plain"
    )
    right.plot(*zip(*frontier), "s-", color=PLAIN, markersize=5, label="plain at the rates it was reported at")
    left.set(title="held-out loss, mean over seeds (plain: the seeds' range)", xlabel="step", ylabel="loss")
    middle.set(title="paired difference to plain (keep: 95 % interval)", xlabel="step", ylabel="loss less plain's")
    right.set(title="gold score against KL at the end", xlabel="KL from the reference, nats", ylabel="gold score")
    left.legend(fontsize=7, ncols=2, frameon=False)
    right.legend(fontsize=7, frameon=False)
    apart = np.abs([row["apart"].mean() for row in rows])
    spread = max(apart[np.isfinite(apart)]) or 0.01
    middle.set_ylim(-3 * spread, 3 * spread)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.suptitle(f"{task}: each method at its own best learning rate, {rows[0]['seeds']} paired seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
