"""Figures of a run from the sums that the blocks keep: pooled, unbiased, with a standard error where it matters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .core import NSPO2

MAX_STANDARD_ERROR = 0.2
MIN_STEPS, MIN_WINDOWS = 16, 8  # fewer give no standard error worth the name


def summarize(parts: list[NSPO2], batch_size: float = 1.0) -> dict[str, float]:
    """Pool `parts` (groups of blocks of one model); one transfer from the device.

    Args:
        batch_size: examples in one step's gradient, over all micro-batches and ranks; `noise_scale` is in examples.

    Returns:
        `variance_reduction`: share of the noise energy Σ‖c‖² that the filter in force takes away, over rows that the
        basis had not seen; 1 - Σ‖Pc‖²/Σ‖c‖² at full strength. `bias`: 1 - cos(m, m′) over all blocks. `alpha`,
        `rank`: means over blocks. These four only where something was projected since `reset_sums`.
        `noise_scale`: tr Cov(one example's gradient) / ‖E g‖² (McCandlish et al. 2018), where the signal estimate
        is at least twice its standard error. `signal_removed`, `signal_removed_se`: share of ‖E g‖² that the filter
        takes away, with its standard error (delta method), where that is below 0.2. Both are over the last 512 steps.
    """
    sums = torch.stack([part.sums.double().cpu() for part in parts]).sum(0).tolist()
    energy, removed, dot, raw, filtered, alpha, rank, count = sums
    found = {}
    if energy > 0:
        found["variance_reduction"] = removed / energy
    if count > 0:
        norms = (raw * filtered) ** 0.5
        found["bias"] = max(0.0, 1 - dot / norms) if norms > 0 else 0.0
        found["alpha"], found["rank"] = alpha / count, rank / count
    return found | _signal(parts, batch_size)


def published(parts: list[NSPO2], skipped_steps: int) -> dict:
    """Figures of recent steps under the names that NSPO2 was published with; NaN where nothing was measured yet.

    `noise_scale` is in units of one step's batch here, since an optimizer does not know how large that is.
    """
    found = summarize(parts) if all(part.cov is not None for part in parts) else {}
    rank = found.get("rank", 0.0)
    return {
        "recent_variance_reduction": found.get("variance_reduction", math.nan),
        "current_rank": int(rank) if rank == int(rank) else rank,
        "current_strategy": parts[0].sentinel.strategy,
        "bias": found.get("bias", math.nan),
        "trust_alpha": found.get("alpha", math.nan),
        "noise_scale": found.get("noise_scale", math.nan),
        "signal_removed": found.get("signal_removed", math.nan),
        "step_count": max(part.step_count for part in parts),
        "skipped_steps": skipped_steps,
        "is_active": any(part.is_active for part in parts),
    }


def reset_sums(parts: list[NSPO2]) -> None:
    """Start the averages of `summarize` anew; windows of the signal estimate stay."""
    for part in parts:
        if part.cov is not None:
            part.sums.zero_()


def _signal(parts: list[NSPO2], batch_size: float) -> dict[str, float]:
    """Signal from products of each gradient with the running mean of earlier ones, pooled over blocks."""
    count = min(min(part.step_count, len(part.history)) for part in parts)
    if count < MIN_STEPS:
        return {}
    products, noise = sum(_newest(part.history, part.step_count, count) for part in parts).T
    steps = max(part.step_count for part in parts)
    weights = 1 - parts[0].config.cov_momentum ** torch.arange(steps - count, steps, dtype=torch.float64)
    signal = (products.sum() / weights.sum()).item()  # the running mean, still growing from 0, has these weights
    # the products are uncorrelated but for the small part that the running mean's own noise has in common
    error = ((products - signal * weights).square().sum().sqrt() / weights.sum()).item()
    if signal < 2 * error or signal <= 0:
        return {}
    found = {"noise_scale": batch_size * noise.sum().item() / (noise > 0).sum().item() / signal}
    count = min(min(part.window_count, len(part.windows)) for part in parts)
    if count >= MIN_WINDOWS:
        removed = sum(_newest(part.windows[:, None], part.window_count, count)[:, 0] for part in parts)
        share = removed.mean().item() / signal
        standard_error = ((removed.var().item() / count + (share * error) ** 2) ** 0.5) / signal
        if standard_error < MAX_STANDARD_ERROR:
            found["signal_removed"], found["signal_removed_se"] = share, standard_error
    return found


def _newest(ring: torch.Tensor, written: int, count: int) -> torch.Tensor:
    """The newest `count` entries of a ring (N, q, B), oldest first, summed over blocks: (count, q) on the host."""
    order = torch.arange(written - count, written, device=ring.device) % len(ring)
    return ring[order].double().sum(-1).cpu()
