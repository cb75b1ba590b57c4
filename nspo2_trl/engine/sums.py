"""Figures of a run from the sums that the filters keep: pooled, unbiased, with a standard error where it matters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gauge import Gauge
from .signal_to_noise import SignalRemoved, pool


class FilterSums:
    """What one filter did, summed over its blocks and over steps; on the device, in float64.

    Parameters:
        tensor: (8,) in this order: energy of the noise rows, energy that was removed of them; of the running mean m
            and of what the filter makes of it, m′: m·m′, ‖m‖², ‖m′‖²; trust-region α, rank, number of blocks.
    """

    def __init__(self, device: torch.device):
        self.tensor = torch.zeros(8, dtype=torch.float64, device=device)

    def add_noise(self, energy: torch.Tensor, removed: torch.Tensor) -> None:
        """Of each block, (B,): energy of a step's noise rows, and what the filter in force takes away of it."""
        self.tensor[:2] += torch.stack([energy, removed]).sum(1)

    def add_filter(self, dot: torch.Tensor, raw: torch.Tensor, filtered: torch.Tensor, *others: torch.Tensor) -> None:
        """Of each block, (B,): m·m′, ‖m‖², ‖m′‖², and `others`, which are α and rank."""
        self.tensor[2:] += torch.stack([dot, raw, filtered, *others, torch.ones_like(dot)]).sum(1)

    def decay(self, share: float) -> None:
        self.tensor.mul_(share)

    def forget_filter(self) -> None:
        """The filter was changed: bias, α and rank of the old one say nothing about the new one."""
        self.tensor[2:] = 0

    def reset(self) -> None:
        self.tensor.zero_()


class Norms:
    """Mean norms of the gradient before and after the filter, and the share of steps in which it was active.

    Parameters:
        tensor: (4,) float64, Σ norm before, Σ norm after, steps, active ones. largest: mean norm before, so far.
    """

    def __init__(self) -> None:
        self.tensor, self.largest = torch.zeros(4, dtype=torch.float64), 0.0

    def add(self, squares: torch.Tensor, active: bool, decay: float) -> None:
        """A step: (2,) squared norms before and after; what was added before fades by `decay`."""
        self.tensor = self.tensor.to(squares.device) * decay
        self.tensor += torch.cat([squares.sqrt(), squares.new_tensor([1.0, active])])

    def figures(self) -> dict[str, float]:
        before, after, steps, active = self.tensor.tolist()
        if not steps:
            return {}
        self.largest = max(self.largest, before / steps)
        return {"grad_norm_raw": before / steps, "grad_norm": after / steps, "active": active / steps}


def summarize(
    sums: Sequence[FilterSums],
    gauges: Sequence[Gauge],
    removals: Sequence[SignalRemoved],
    batch_size: float = 1.0,
) -> dict[str, float]:
    """Pool what the filters of one model kept; one transfer from the device.

    Args:
        batch_size: examples in one step's gradient, over all micro-batches and ranks; `noise_scale` is in examples.

    Returns:
        `variance_reduction`: share of the noise energy Σ‖c‖² that the filter in force takes away, over rows that the
        basis had not seen; 1 - Σ‖Pc‖²/Σ‖c‖² at full strength. `bias`: 1 - cos(m, m′) over all blocks. `alpha`,
        `rank`: means over blocks. These four only where something was projected since the sums were reset.
        `noise_scale`: tr Cov(one example's gradient) / ‖E g‖² (McCandlish et al. 2018), where the signal estimate
        is at least twice its standard error. `signal_removed`, `signal_removed_se`: share of ‖E g‖² that the filter
        takes away, with its standard error (delta method), where that is below 0.2. Both are over the last 512 steps.
    """
    totals = torch.stack([part.tensor.cpu() for part in sums]).sum(0).tolist()
    energy, removed, dot, raw, filtered, alpha, rank, count = totals
    found = {}
    if energy > 0:
        found["variance_reduction"] = removed / energy
    if count > 0:
        norms = (raw * filtered) ** 0.5
        found["bias"] = max(0.0, 1 - dot / norms) if norms > 0 else 0.0
        found["alpha"], found["rank"] = alpha / count, rank / count
    return found | pool(gauges, removals, batch_size)


def spectrum(values: Sequence[torch.Tensor], traces: Sequence[torch.Tensor]) -> list[float]:
    """Tracked eigenvalues as shares of the noise, largest first, each the mean over the blocks that track as many.

    Args:
        values: of each stack (B, k). traces: of each (B,), of the whole covariance.
    """
    shares = [(own / trace[:, None].clamp_min(1e-30)).double().cpu() for own, trace in zip(values, traces)]
    most = max((share.shape[1] for share in shares), default=0)
    columns = ([share[:, i] for share in shares if share.shape[1] > i] for i in range(most))
    return [torch.cat(column).mean().item() for column in columns]
