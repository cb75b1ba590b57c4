"""NSPO2 by hand, in any loop, for the gradient of one block; and figures under their published names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import NSPO2Config, get_default_config
from .filter import NoiseFilter, figures


class NSPO2(NoiseFilter):
    """[`NoiseFilter`] for one gradient: `grad = nspo2.hook(grad)` once per micro-batch, then `nspo2.step_end()`.

    Without a `config` ([`NSPO2Config`] or a mapping with its fields) it takes the published defaults.

    Raises:
        ValueError: a bad option, or a gradient whose size is not `config.dim`.
    """

    def __init__(self, config: NSPO2Config | Mapping | None = None, **options: Any):
        super().__init__(get_default_config() if config is None else config, **options)

    def reset(self) -> None:
        super().reset()
        self._hooked: list[torch.Tensor] = []

    def hook(self, grad: torch.Tensor) -> torch.Tensor:
        """Filter one micro-batch's gradient of any shape, and keep it as a sample for `step_end`.

        A gradient with NaN or Inf in it comes back as it is; its step teaches nothing and is counted.
        """
        known = self.config.dim or (self._hooked or [grad])[0].numel()
        if self.gauge is not None:
            known = self.gauge.reference.numel()
        if grad.numel() != known:
            raise ValueError(
                f"`dim` is {known}, but the gradient has {grad.numel()} entries: set `dim` to that or leave it out, "
                "and use one NSPO2 for each gradient."
            )
        sample = grad.detach().to(torch.promote_types(grad.dtype, torch.float32), copy=True).reshape(1, 1, -1)
        self._hooked.append(sample)
        if not self.is_active or not torch.isfinite(torch.linalg.vector_norm(sample)):
            return grad
        return self.head().apply(sample).to(grad.dtype).view_as(grad)

    def step_end(self, metrics: Mapping | None = None) -> None:
        """Close the step: learn from the gradients that `hook` saw since the last call.

        Args:
            metrics: what the sentinel shall see, such as `{"loss": ...}` or `{"eval_loss": ...}`.
        """
        samples, self._hooked = self._hooked, []
        if not samples:
            return
        stacked = torch.stack(samples)
        if torch.isfinite(torch.linalg.vector_norm(stacked)):
            self.step(stacked, None)
        else:
            self.skipped_steps += 1
        due = self.gauge is not None and self.step_count % self.config.update_freq == 0
        if metrics or due:
            seen = {**(figures([self]) if due else {}), **(metrics or {})}
            if self.sentinel.check(seen, self.step_count) and self.gauge is not None:
                self.sums.forget_filter()

    def set_active(self, active: bool) -> None:
        """Switch the projection on or off; learning goes on."""
        self.active = bool(active)

    def get_metrics(self) -> dict:
        """Figures of recent steps under their published names, see [`published`]. Waits for the device."""
        return published([self], figures([self]) | {"skipped_steps": self.skipped_steps})


def published(filters: Sequence[NoiseFilter], known: Mapping[str, float]) -> dict:
    """`known` figures of recent steps under the names that NSPO2 was published with; NaN where one is missing.

    `noise_scale` is in units of one step's batch here, since an optimizer does not know how large that is.
    """
    found = defaultdict(lambda: math.nan, {"rank": 0.0} | dict(known))
    rank = round(found["rank"], 4)
    return {
        "recent_variance_reduction": found["variance_reduction"],
        "current_rank": int(rank) if rank == int(rank) else rank,
        "current_strategy": filters[0].sentinel.strategy,
        "bias": found["bias"],
        "trust_alpha": found["alpha"],
        "noise_scale": found["noise_scale"],
        "signal_removed": found["signal_removed"],
        "step_count": max(part.step_count for part in filters),
        "skipped_steps": known["skipped_steps"],
        "is_active": any(part.is_active for part in filters),
    }
