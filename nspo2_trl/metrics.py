"""Figures of a run from the sums that the blocks keep: pooled, unbiased, with a standard error where it matters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .signal import pool

if TYPE_CHECKING:
    from .core import NSPO2


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
    sums = torch.stack([part.sums.cpu() for part in parts]).sum(0).tolist()
    energy, removed, dot, raw, filtered, alpha, rank, count = sums
    found = {}
    if energy > 0:
        found["variance_reduction"] = removed / energy
    if count > 0:
        norms = (raw * filtered) ** 0.5
        found["bias"] = max(0.0, 1 - dot / norms) if norms > 0 else 0.0
        found["alpha"], found["rank"] = alpha / count, rank / count
    return found | pool([part.signal for part in parts], batch_size)


def published(parts: list[NSPO2], skipped_steps: int) -> dict:
    """Figures of recent steps under the names that NSPO2 was published with; NaN where nothing was measured yet.

    `noise_scale` is in units of one step's batch here, since an optimizer does not know how large that is.
    """
    found = summarize(parts) if all(part.cov is not None for part in parts) else {}
    rank = round(found.get("rank", 0.0), 4)
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


def forget_filter(parts: list[NSPO2]) -> None:
    """The sentinel changed the filter: bias, α and rank of the old one say nothing about the new one."""
    for part in parts:
        if part.cov is not None:
            part.sums[2:] = 0


def reset_sums(parts: list[NSPO2]) -> None:
    """Start the averages of `summarize` anew; windows of the signal estimate stay."""
    for part in parts:
        if part.cov is not None:
            part.sums.zero_()
