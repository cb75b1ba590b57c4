"""TrustRegion: how much of the projection may be used so that the mean gradient moves by a bounded share."""

from __future__ import annotations

import torch


def trust_alpha(removed_norm: torch.Tensor, reference_norm: torch.Tensor, radius: float) -> torch.Tensor:
    """The largest α in [0, 1] with ‖m′ - m‖ ≤ radius · ‖m‖, where m′ - m = -α · (what full removal takes from m).

    Args:
        removed_norm: (B,) norm of what the filter at α = 1 removes from the reference m.
        reference_norm: (B,) ‖m‖.
        radius: bound, as a share of ‖m‖.

    Returns:
        (B,) α, 1 where nothing is removed from m.
    """
    bound = radius * reference_norm
    safe = torch.where(removed_norm > 0, removed_norm, 1.0)
    return torch.where(removed_norm > bound, bound / safe, torch.ones_like(bound))
