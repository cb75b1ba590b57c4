"""Diverged: from which step on each loss or gradient had NaN or Inf, without waiting for the device."""

from __future__ import annotations

import math

import torch


class Diverged:
    """Steps count from 1."""

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None  # since when each loss was bad; Inf while the newest was not
        self.gradient = math.inf

    def see_loss(self, loss: torch.Tensor, step: int) -> None:
        known = torch.full_like(loss, math.inf, dtype=torch.float32) if self.loss is None else self.loss
        self.loss = torch.where(torch.isfinite(loss), math.inf, known.clamp(max=step))

    def see_gradient(self, finite: bool, step: int) -> None:
        self.gradient = math.inf if finite else min(self.gradient, step)

    def since(self, step: int, dropped: bool) -> int | None:
        """The first of the bad steps up to `step`, which is the last one taken; waits for the device.

        Args:
            dropped: whether bad gradients are: then one bad step at the end has done no harm.
        """
        first = min(self.gradient, math.inf if self.loss is None else self.loss.max().item())
        harmless = dropped and first == step > 1
        return int(first) if first <= step and not harmless else None
