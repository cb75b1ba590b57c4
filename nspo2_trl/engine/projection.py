"""ProjectionHead: the filter F = I - gain · K' K'ᵀ, where K' spans a part of the tracked noise directions K.

A block's gradient is m vectors of d entries: m = 1 where a block is one vector, m = LoRA rank for one factor of a
LoRA matrix. K' is not formed: in coordinates c = g Kᵀ its projector is c -> w·c - u <u, c>, with w the directions
taken and u the unit direction that is left in (the reference, for the strategies that keep it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .eigensolvers import Total, same


def coordinates(grad: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`grad` (B, …, d) in the directions of `basis` (B, k, d): (B, …, k)."""
    return (grad.flatten(1, -2) @ basis.mT).unflatten(1, grad.shape[1:-1])


def restrict(coords: torch.Tensor, taken: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Project coordinates (B, m, k) or (B, n, m, k) onto K': w·c - u <u, c>, an orthogonal projector.

    Args:
        taken: (B, k) w, of 0 and 1. kept: (B, m, k) u, unit or zero, and zero outside `taken`.
    """
    if coords.ndim == 4:
        kept = kept[:, None]
    taken = taken.view(len(taken), *[1] * (coords.ndim - 2), -1)
    return taken * coords - kept * (kept * coords).sum((-2, -1), keepdim=True)


@dataclass
class ProjectionHead:
    """The filter in force for B blocks.

    Parameters:
        basis: (B, k, d) orthonormal rows, zero rows allowed.
        taken: (B, k) 1 for the directions that may be removed, 0 for the others.
        kept: (B, m, k) unit coordinates of the direction that stays in; zero where nothing is kept.
        gain: (B,) share of the component that is removed: trust-region α times strength.
        total: sums over the ranks that share the columns of a block.
    """

    basis: torch.Tensor
    taken: torch.Tensor
    kept: torch.Tensor
    gain: torch.Tensor
    total: Total = same

    def coordinates(self, grad: torch.Tensor) -> torch.Tensor:
        """`grad` (B, …, d) in K, over all columns: (B, …, k)."""
        return self.total(coordinates(grad, self.basis))

    def restrict(self, coords: torch.Tensor) -> torch.Tensor:
        """Coordinates in K projected onto K', see [`restrict`]."""
        return restrict(coords, self.taken, self.kept)

    def apply(self, grad: torch.Tensor) -> torch.Tensor:
        """F g for `grad` (B, m, d); a new tensor."""
        removed = self.restrict(self.coordinates(grad)) * self.gain[:, None, None]
        return torch.baddbmm(grad, removed, self.basis, alpha=-1)

    @property
    def removed_share(self) -> torch.Tensor:
        """(B,) 1 - (1 - gain)²: the share of the energy within K' that the filter takes away."""
        return self.gain * (2 - self.gain)
