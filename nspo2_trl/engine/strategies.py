"""Strategy: which of the tracked directions are removed, which one stays, and how much the trust region allows.

`noise` removes the top-r noise directions. `keep` removes r directions of the noise space that are orthogonal to the
reference m, so that P m = m: it takes one more eigenvector and gives back the direction in which m lies. `hybrid`
does the first with the stronger half of the rank and the second with the other half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .eigensolvers import Total
from .projection import ProjectionHead


def split_rank(strategy: str, rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `rank` (B,) directions, how many are removed whatever the reference is, and how many orthogonal to it."""
    plain = {"noise": rank, "keep": torch.zeros_like(rank), "hybrid": (rank + 1) // 2}[strategy]
    return plain, rank - plain


def limit_bias(
    strategy: str, rank: torch.Tensor, reference: torch.Tensor, norm_squared: torch.Tensor, target_bias: float
) -> torch.Tensor:
    """The largest rank up to `rank` whose full projection has 1 - cos(m, m′) ≤ `target_bias`.

    With P an orthogonal projector cos(m, Pm) = ‖Pm‖/‖m‖, so the share of ‖m‖² that is removed must not be above
    1 - (1 - target_bias)².

    Args:
        rank: (B,). reference: (B, m, k) coordinates of m in K. norm_squared: (B,) ‖m‖².
    """
    if strategy == "keep":
        return rank
    allowed = 1 - (1 - target_bias) ** 2
    lost = torch.cumsum(reference.square().sum(1), 1)
    fits = (lost <= allowed * norm_squared[:, None]).long()
    plain = torch.cumprod(fits, 1).sum(1)
    return torch.minimum(rank, plain if strategy == "noise" else 2 * plain)


def select(strategy: str, rank: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions taken and the direction kept, as [`ProjectionHead`] wants them.

    Args:
        rank: (B,) directions to remove. reference: (B, m, k) coordinates of the reference m in K.

    Returns:
        taken (B, k) of 0 and 1, kept (B, m, k) unit or zero.
    """
    plain, orthogonal = split_rank(strategy, rank)
    index = torch.arange(reference.shape[2], device=reference.device)
    end = rank
    if reference.shape[1] == 1:  # take one more, since one is given back; of m vectors each, one dimension of m·k is
        end = rank + (orthogonal > 0).long()
    taken = (index < end[:, None]).to(reference.dtype)
    keeps = (index >= plain[:, None]) & (index < end[:, None])
    kept = torch.where(keeps[:, None, :], reference, 0.0)
    norm = torch.linalg.vector_norm(kept, dim=(1, 2), keepdim=True)
    return taken, torch.where(norm > 0, kept / torch.where(norm > 0, norm, 1.0), 0.0)


def trust_alpha(removed_norm: torch.Tensor, reference_norm: torch.Tensor, radius: float) -> torch.Tensor:
    """The largest α in [0, 1] with ‖m′ - m‖ ≤ radius · ‖m‖, where m′ - m = -α · (what full removal takes from m).

    Args:
        removed_norm: (B,) norm of what the filter at α = 1 removes from the reference m. reference_norm: (B,) ‖m‖.

    Returns:
        (B,) α, 1 where nothing is removed from m.
    """
    bound = radius * reference_norm
    safe = torch.where(removed_norm > 0, removed_norm, 1.0)
    return torch.where(removed_norm > bound, bound / safe, torch.ones_like(bound))


@dataclass
class Choice:
    """How a filter is made of the tracked directions: strategy, share of the component that is removed, the bounds
    (see [`trust_alpha`], [`limit_bias`]), and what the rank does not fall below.
    """

    strategy: str
    strength: float
    trust_radius: float
    target_bias: float
    min_rank: int

    def head(
        self,
        basis: torch.Tensor,
        rank: torch.Tensor,
        reference: torch.Tensor,
        energy: torch.Tensor,
        total: Total,
    ) -> tuple[ProjectionHead, list[torch.Tensor]]:
        """The filter, and for each block (B,) m·m′, ‖m‖², ‖m′‖², α and the rank in force.

        Args:
            basis: (B, k, d). rank: (B,) directions that may be removed.
            reference: (B, m, k) coordinates of the running mean m in the basis. energy: (B,) ‖m‖².
            total: sums over the ranks that share the columns of a block.
        """
        rank = limit_bias(self.strategy, rank, reference, energy, self.target_bias).clamp(min=self.min_rank)
        head = ProjectionHead(basis, *select(self.strategy, rank, reference), torch.ones_like(energy), total)
        lost = torch.linalg.vector_norm(head.restrict(reference), dim=(1, 2))
        alpha = trust_alpha(lost * self.strength, energy.sqrt(), self.trust_radius)
        head.gain = alpha * self.strength
        # m·m′ and ‖m′‖², with m′ = m - gain R m and R m orthogonal to m - R m
        dot = energy - head.gain * lost.square()
        filtered = (energy - head.removed_share * lost.square()).clamp_min(0)
        return head, [dot, energy, filtered, alpha, rank.to(alpha.dtype)]
