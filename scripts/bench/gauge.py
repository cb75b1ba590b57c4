"""Does `nspo2 measure` say what the estimator of `variance` says, at the same step of the same run?

A run is stopped after 60 % of its steps, and its parameters are taken three ways. The estimator: fresh micro-batches
at these parameters. The gauge on a run at rate 0 from there: `measure` as a user has it, where nothing moves. The
gauge on the run that led there: its last third, while the gradient turned.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from nspo2_trl.cli.measure import OWN, measure
from nspo2_trl.training.summary import told

from .stats import p_value
from .tables import line
from .tasks import LOOKS, make_trainer, short
from .variance import PAIRS, gradients, moments

PARTS = 16  # of the fresh micro-batches, for the standard error
OPTIONS = {"nspo2_enabled": True, "nspo2_projection_rank": 0, OWN[0].removeprefix("--"): OWN[1]}
READING = """Command: `python scripts/benchmark.py gauge`. After 60 % of runs of the quick start the noise scale, in
pairs, is estimated from {fresh} fresh micro-batches (standard error: jackknife), and by `nspo2 measure` on {steps}
steps at rate 0 from there. z is their difference, in standard errors of it. The last column is what `measure` says of
the last third of the run up to there, in which the parameters moved; "above" is two standard errors of the signal
away."""


def noise_scale(parts: Sequence[torch.Tensor]) -> float:
    """Trace of the covariance of a pair's gradient over the squared mean, of micro-batches in `parts` (n, d)."""
    noise, signal = moments(part[None] for part in parts)
    return PAIRS * noise / signal


def estimate(trainer, rows: list[int]) -> tuple[float, float]:
    """The noise scale at the parameters of `trainer`, and its standard error by leaving out parts of the rows."""
    parts = [grad.flatten(1).double() for grad in gradients(trainer, rows).values()]
    left = torch.arange(len(parts[0])) % PARTS
    logs = [math.log(scale) for i in range(PARTS) if (scale := noise_scale([part[left != i] for part in parts])) > 0]
    value, spread = noise_scale(parts), statistics.variance(logs) * (PARTS - 1) ** 2 / PARTS
    return value, value * math.sqrt(spread)


def run_cell(cell: dict, folders: dict[str, str]) -> dict:
    """Three readings of one run; its record."""
    start = time.process_time()
    trainer = make_trainer(cell, folders, range(50), stride=LOOKS, options=OPTIONS)
    moving = measure(trainer, round(0.6 * cell["steps"]))
    order = torch.randperm(len(trainer.train_dataset), generator=torch.Generator().manual_seed(cell["seed"])).tolist()
    value, error = estimate(trainer, order[: cell["fresh"] * PAIRS])
    still = make_trainer(cell | {"lr": 0.0}, folders, range(50), stride=LOOKS, options=OPTIONS)
    pairs = zip(*([p for p in made.model.parameters() if p.requires_grad] for made in (still, trainer)))
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    readings = {"estimator": {"value": value, "error": error}, "still": measure(still)["noise_scale"]}
    readings["moving"] = moving["last_third"]
    return short({"cell": cell, "readings": readings, "seconds": time.process_time() - start})


def section(records: Sequence[dict]) -> list[str]:
    """A line per run, and how the differences are spread."""
    cell = records[0]["cell"]
    lines = ["### The gauge against the estimator", "", READING.format(**cell), ""]
    lines += [
        line(["seed", "estimator", "`measure`, rate 0", "z", "`measure`, last third before"]),
        "|---" * 5 + "|",
    ]
    scores = []
    for record in sorted(records, key=lambda record: record["cell"]["seed"]):
        estimator, still, moving = (record["readings"][name] for name in ("estimator", "still", "moving"))
        score = ""
        if still and still["value"]:
            scores.append((still["value"] - estimator["value"]) / math.hypot(still["error"], estimator["error"]))
            score = f"{scores[-1]:+.1f}"
        lines.append(line([str(record["cell"]["seed"]), told(estimator), told(still), score, told(moving)]))
    if len(scores) > 1:
        p = p_value(scores)
        lines += ["", f"z: mean {statistics.fmean(scores):+.2f}, standard deviation {statistics.stdev(scores):.2f}"]
        lines[-1] += "." if p is None else f", sign-flip p {p:.2f}."
    return [*lines, ""]
