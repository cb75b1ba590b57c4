"""SignalRemoved: how much of the signal the filter removes, without counting noise as signal; pooled figures.

The gradients between two eigensolves are multiplied with each other, in the directions removed by the filter at the
window's start, which has seen none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .gauge import HISTORY, MIN_STEPS, Gauge
from .projection import ProjectionHead, restrict
from .state import Saved

WINDOWS = 64  # from one eigensolve to the next, over which it is pooled
MAX_STANDARD_ERROR = 0.2
MIN_WINDOWS = 8  # fewer give no standard error worth the name


class SignalRemoved(Saved):
    """For B blocks of m vectors, with a filter of `width` directions."""

    _TENSORS = ("taken", "kept", "coords", "own", "windows")
    _NUMBERS = ("window_steps", "window_single", "window_count")

    def __init__(self, blocks: int, vectors: int, width: int, dtype: torch.dtype, device: torch.device):
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.taken = torch.zeros(blocks, width, **kind)  # the filter at the window's start
        self.kept = torch.zeros(blocks, vectors, width, **kind)
        self.coords = torch.zeros(blocks, vectors, width, **kind)  # Σ mean in K over the window
        self.own = torch.zeros(2, blocks, **kind)  # Σ self products in K', Σ share of them that is removed
        # a window: energy of E g that the filter removes, over all blocks
        self.windows = torch.zeros(WINDOWS, dtype=torch.float64, device=device)
        self.window_steps = self.window_single = self.window_count = 0

    def add_projected(self, head: ProjectionHead, mean: torch.Tensor, rows: torch.Tensor, single: bool) -> None:
        """Count a step's signal in K'.

        Args:
            head: the filter in force. mean: (B, m, d). rows: (B, n, m, k) the noise rows in K.
            single: whether the step has one sample only.
        """
        if self.window_steps == 0:
            self.taken, self.kept = head.taken, head.kept
        coords = head.coordinates(mean)
        own = restrict(coords[:, None] if single else rows, self.taken, self.kept)
        self.coords += coords
        self.own += torch.stack([torch.linalg.vector_norm(own, dim=(1, 2, 3)).square(), head.removed_share])
        self.window_steps += 1
        self.window_single += single

    def close_window(self) -> None:
        """The basis is about to change."""
        pairs = self.window_steps**2 - self.window_single
        if pairs > 0:
            inside = restrict(self.coords, self.taken, self.kept)
            energy = (torch.linalg.vector_norm(inside, dim=(1, 2)).square() - self.own[0]) / pairs
            self.windows[self.window_count % WINDOWS] = (energy * self.own[1] / self.window_steps).double().sum()
            self.window_count += 1
        self.coords.zero_()
        self.own.zero_()
        self.window_steps = self.window_single = 0

    def newest(self, count: int) -> torch.Tensor:
        """(count,) the newest windows, oldest first, on the host."""
        order = torch.arange(self.window_count - count, self.window_count, device=self.windows.device) % WINDOWS
        return self.windows[order].cpu()


def pool(gauges: Sequence[Gauge], removals: Sequence[SignalRemoved], batch_size: float) -> dict[str, float]:
    """`noise_scale`, `signal_removed` and `signal_removed_se` over all blocks, each only where there is evidence.

    Args:
        gauges, removals: of all stacks of blocks. batch_size: examples in one step's gradient.
    """
    count = min(min(gauge.steps, HISTORY) for gauge in gauges)
    if count < MIN_STEPS:
        return {}
    products, noise, weights, known = sum((gauge.newest(count) for gauge in gauges), torch.zeros(())).T
    weights = weights / sum(gauge.spans.shape[2] for gauge in gauges)
    if weights.sum() <= 0:
        return {}
    signal = (products.sum() / weights.sum()).item()
    # the products are uncorrelated but for the small part that the running mean's own noise has in common
    error = ((products - signal * weights).square().sum().sqrt() / weights.sum()).item()
    if signal < 2 * error or signal <= 0:
        return {}
    found = {"noise_scale": batch_size * noise.sum().item() / (known > 0).sum().item() / signal}
    count = min((min(part.window_count, WINDOWS) for part in removals), default=0)
    if count >= MIN_WINDOWS:
        removed = sum((part.newest(count) for part in removals), torch.zeros(()))
        share = removed.mean().item() / signal
        standard_error = ((removed.var().item() / count + (share * error) ** 2) ** 0.5) / signal
        if standard_error < MAX_STANDARD_ERROR:
            found["signal_removed"], found["signal_removed_se"] = share, standard_error
    return found
