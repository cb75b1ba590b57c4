"""Statistics of paired seeds: bootstrap intervals, words for them, steps to a loss, gold score at equal KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 9999
START = math.log(2)  # held-out loss before training, when policy and reference are the same


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval (BCa) of the mean of paired differences, one a seed.

    None for fewer than 3 seeds, and where a run diverged.

    With 10 seeds such an interval covers the truth in some 90 % of cases.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 3 or not np.isfinite(values).all():
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(0), method="BCa")
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def of_sums(statistic: Callable, *figures: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """`statistic` of the sums of `figures`, and its 95 % bootstrap interval (percentile), all resampled together.

    The interval is None for fewer than 3 of each, and where one is not finite.
    """
    values = [np.asarray(figure, dtype=float) for figure in figures]
    found = float(statistic(*(value.sum() for value in values)))
    if len(values[0]) < 3 or not np.isfinite(values).all():
        return found, None

    def resampled(*values, axis):
        return statistic(*(value.sum(axis) for value in values))

    how = {"paired": True, "method": "percentile", "n_resamples": RESAMPLES, "rng": np.random.default_rng(0)}
    bounds = bootstrap(values, resampled, **how).confidence_interval
    return found, (float(bounds.low), float(bounds.high))


def ratio_of_sums(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Σ parts / Σ wholes, and its interval as [`of_sums`] gives it."""
    return of_sums(np.divide, parts, wholes)


def verdict(bounds: tuple[float, float] | None, more_is_better: bool = False) -> str:
    """What an interval of differences to plain shows."""
    if bounds is None:
        return "cannot be said"
    if bounds[0] <= 0 <= bounds[1]:
        return "no difference shown"
    return "better" if (bounds[0] > 0) == more_is_better else "worse"


def crossing(steps: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """The first step, interpolated, at which the held-out loss is `target` or below; None where it never is."""
    before_step, before = 0, START
    for step, loss in zip(steps, losses):
        if loss is not None and loss <= target:
            known = before is not None and before > loss
            share = (before - target) / (before - loss) if known else 1.0
            return before_step + max(share, 0.0) * (step - before_step)
        before_step, before = step, loss
    return None


def step_shares(own: dict, plain: dict, at: float) -> float | None:
    """Steps of a run to the loss that plain had at share `at` of its run, as a share of plain's steps to it."""
    steps, losses = plain["step"], plain["loss"]
    if None in losses:
        return None
    target = float(np.interp(at * steps[-1], [0, *steps], [START, *losses]))
    needed = crossing(own["step"], own["loss"], target)
    return None if needed is None else needed / crossing(steps, losses, target)


def gold_at_equal_kl(kl: np.ndarray, gold: np.ndarray, plain_kl: np.ndarray, plain_gold: np.ndarray):
    """Gold score less plain's at the same KL, interpolated linearly between plain's rates, and its 95 % interval.

    Seeds are resampled, all rates and both methods together.

    Args:
        kl, gold: (seeds,) of the method. plain_kl, plain_gold: (rates, seeds).

    Returns:
        None where the KL lies outside of plain's.
    """

    def gain(seeds) -> float:
        seeds = np.asarray(seeds, dtype=int)
        place = plain_kl[:, seeds].mean(1)
        order = np.argsort(place)
        return gold[seeds].mean() - np.interp(kl[seeds].mean(), place[order], plain_gold[:, seeds].mean(1)[order])

    reach = plain_kl.mean(1)
    if len(reach) < 2 or len(kl) < 3 or not reach.min() <= kl.mean() <= reach.max():
        return None
    seeds = np.arange(len(kl))
    found = bootstrap(
        (seeds,), gain, n_resamples=1999, vectorized=False, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return gain(seeds), (float(found.low), float(found.high))
