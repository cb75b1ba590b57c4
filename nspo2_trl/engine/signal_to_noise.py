"""SignalEstimate: how much signal there is, and how much of it the filter removes, without counting noise as signal.

Both are made of products of different samples only, whose noise is independent: of each step's gradient with the
running mean of earlier ones for ‖E g‖², and of the gradients between two eigensolves with each other for the part of
‖E g‖² in the directions removed, which is projected with the filter at the window's start, that has seen none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .projection import ProjectionHead, restrict
from .state import load_tensors

HISTORY = 512  # steps over which signal and noise are pooled
WINDOWS = 64  # the same for the signal removed, in windows from one eigensolve to the next
MAX_STANDARD_ERROR = 0.2
MIN_STEPS, MIN_WINDOWS = 16, 8  # fewer give no standard error worth the name


class SignalEstimate:
    """For B blocks of m vectors, with a filter of `width` directions."""

    _TENSORS = ("history", "taken", "kept", "coords", "own", "windows")
    _NUMBERS = ("steps", "window_steps", "window_single", "window_count")

    def __init__(self, blocks: int, vectors: int, width: int, dtype: torch.dtype, device: torch.device):
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        # a step: <mean, reference>, noise energy, weight of the gradients in the reference
        self.history = torch.zeros(HISTORY, 3, blocks, **kind)
        self.taken = torch.zeros(blocks, width, **kind)  # the filter at the window's start
        self.kept = torch.zeros(blocks, vectors, width, **kind)
        self.coords = torch.zeros(blocks, vectors, width, **kind)  # Σ mean in K over the window
        self.own = torch.zeros(2, blocks, **kind)  # Σ self products in K', Σ share of them that is removed
        self.windows = torch.zeros(WINDOWS, blocks, **kind)  # a window: energy of E g that the filter removes
        self.steps = self.window_steps = self.window_single = self.window_count = 0

    def add_step(self, product: torch.Tensor, energy: torch.Tensor | None, weight: float) -> None:
        """Count a step: inner product (B,) of its gradient with the running mean of earlier ones, energy (B,) of its
        noise rows, and what the gradients in the running mean weigh together, below 1 while it grows from 0.
        """
        energy = torch.zeros_like(product) if energy is None else energy
        self.history[self.steps % HISTORY] = torch.stack([product, energy, torch.full_like(product, weight)])
        self.steps += 1

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
            self.windows[self.window_count % WINDOWS] = energy * self.own[1] / self.window_steps
            self.window_count += 1
        self.coords.zero_()
        self.own.zero_()
        self.window_steps = self.window_single = 0

    def state_dict(self) -> dict:
        """Tensors and plain numbers only."""
        tensors = {name: getattr(self, name).clone() for name in self._TENSORS}
        return tensors | {name: getattr(self, name) for name in self._NUMBERS}

    def load_state_dict(self, state: dict) -> None:
        """Raises `ValueError` where the state is of other blocks or another rank."""
        load_tensors(self, self._TENSORS, state)
        for name in self._NUMBERS:
            setattr(self, name, state[name])


def pool(parts: Sequence[SignalEstimate], batch_size: float) -> dict[str, float]:
    """`noise_scale`, `signal_removed` and `signal_removed_se` over all blocks, each only where there is evidence.

    Args:
        parts: of all groups of blocks. batch_size: examples in one step's gradient.
    """
    count = min(min(part.steps, HISTORY) for part in parts)
    if count < MIN_STEPS:
        return {}
    products, noise, weights = sum((_newest(part.history, part.steps, count) for part in parts), torch.zeros(())).T
    weights = weights / sum(part.history.shape[2] for part in parts)
    if weights.sum() <= 0:
        return {}
    signal = (products.sum() / weights.sum()).item()
    # the products are uncorrelated but for the small part that the running mean's own noise has in common
    error = ((products - signal * weights).square().sum().sqrt() / weights.sum()).item()
    if signal < 2 * error or signal <= 0:
        return {}
    found = {"noise_scale": batch_size * noise.sum().item() / (noise > 0).sum().item() / signal}
    count = min(min(part.window_count, WINDOWS) for part in parts)
    if count >= MIN_WINDOWS:
        windows = (_newest(part.windows[:, None], part.window_count, count)[:, 0] for part in parts)
        removed = sum(windows, torch.zeros(()))
        share = removed.mean().item() / signal
        standard_error = ((removed.var().item() / count + (share * error) ** 2) ** 0.5) / signal
        if standard_error < MAX_STANDARD_ERROR:
            found["signal_removed"], found["signal_removed_se"] = share, standard_error
    return found


def _newest(ring: torch.Tensor, written: int, count: int) -> torch.Tensor:
    """The newest `count` entries of a ring (N, q, B), oldest first, summed over blocks: (count, q) on the host."""
    order = torch.arange(written - count, written, device=ring.device) % len(ring)
    return ring[order].double().sum(-1).cpu()
