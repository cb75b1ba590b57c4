"""What a trainer asks of a projection, and what it hands to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass
class Step:
    """One optimizer step whose gradient is complete.

    Parameters:
        samples: for each stack of the noise filter (n, B, m, d), gradients of the step's micro-batches, which stay as
            they are until `after_step`. Empty where the step is left out of the estimate, None where the step's own
            gradient is its one sample.
        others: entries of the gradients of parameters in no block; they are only looked at for bad numbers.
        progress: share of training done, None where it is not known.
    """

    samples: list[torch.Tensor] | None = None
    others: Sequence[torch.Tensor] = ()
    progress: float | None = None


class Projection(Protocol):
    """A projection of LoRA adapters. The trainer holds a list of them and calls each around every optimizer step."""

    def start(self) -> None:
        """Training begins, or goes on: the parameters are where they will be trained."""

    def before_step(self, step: Step) -> bool:
        """The gradient is complete, the optimizer about to step. False where it has NaN or Inf, and stays as it is."""

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def end(self) -> None:
        """Training has ended, the adapter is about to be saved."""

    def metrics(self, batch_size: float) -> dict[str, float]:
        """Figures since the last call, by their names in `metrics.METRICS`; `batch_size` in examples per step."""

    def state_dict(self, keep: bool) -> dict:
        """Tensors and plain numbers; every rank calls it, those that do not `keep` it may return less."""

    def load_state_dict(self, state: Mapping) -> None:
        """Raises `ValueError` where the state is of another run."""
