"""One picture per task: held-out loss, paired difference to plain AdamW, gold score against KL."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nspo2_trl.cli.panels import Panel
from nspo2_trl.cli.plots import panel_on, picture
from nspo2_trl.cli.runs import Run, average, number, of

from .tables import reported

LOSS = Panel("loss", "", "loss", ("eval_loss",), by_time=True)
APART = Panel("apart", "", "loss less plain's", ("eval_apart",), by_time=True)


def mean_of(own: dict[int, dict], plain: dict[int, dict], name: str, index: int) -> Run:
    """Means over the seeds that both have; with standard errors for `keep` alone, or bands would hide the lines."""
    logs = []
    for seed in sorted(own.keys() & plain.keys()):
        curves = (own[seed]["curve"]["step"], own[seed]["curve"]["loss"], plain[seed]["curve"]["loss"])
        points = ((step, number(loss), number(other)) for step, loss, other in zip(*curves))
        entries = [{"step": step, "eval_loss": loss, "eval_apart": loss - other} for step, loss, other in points]
        logs.append(of(entries, name))
    run = average(logs, name, index)
    if name != "keep":
        run.evals = [{key: entry[key] for key in ("step", "eval_loss", "eval_apart")} for entry in run.evals]
    return run


def draw(records: list[dict], rows: list[dict], task: str, path: Path) -> None:
    runs = reported(records, task)
    plain = runs["plain", rows[0]["lr"]]
    drawn = [mean_of(runs[row["method"], row["lr"]], plain, row["method"], i) for i, row in enumerate(rows)]
    apart = np.abs([row["apart"].mean() for row in rows])
    spread = max(apart[np.isfinite(apart)]) or 0.01
    frontier = sorted(
        tuple(np.mean([run["samples"].get(part, np.nan) for run in by_seed.values()]) for part in ("kl", "gold"))
        for (method, _), by_seed in runs.items()
        if method == "plain"
    )

    def difference(axis: Any) -> None:
        panel_on(axis, APART, drawn)
        axis.set_ylim(-3 * spread, 3 * spread)

    def gold(axis: Any) -> None:
        axis.plot(*zip(*frontier), "s-", color="C0", markersize=5)
        for run, row in zip(drawn[1:], rows[1:]):
            axis.plot(row["kl"], row["gold"], "o", color=f"C{run.index % 6}", markersize=5)
            axis.annotate(row["method"], (row["kl"], row["gold"]), xytext=(4, 3), textcoords="offset points", size=7)
        axis.set(xlabel="KL from the reference, nats", ylabel="gold score")
        axis.grid(True)

    parts = [
        ("held-out loss, mean over seeds", partial(panel_on, panel=LOSS, runs=drawn)),
        ("paired difference to plain (band: standard error)", difference),
        ("gold score and KL at the end; plain at its rates", gold),
    ]
    title = f"{task}: each method at its own best learning rate, {rows[0]['seeds']} paired seeds"
    picture(path, title, parts, drawn)
