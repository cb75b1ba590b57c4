"""Strategy: which directions are removed, how many, and which one stays.

`noise` removes the top-r noise directions. `keep` removes r directions of the noise space that are orthogonal to the
reference m, so that P m = m: it takes one more eigenvector and gives back the direction in which m lies. `hybrid`
does the first with the stronger half of the rank and the second with the other half.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch


def noise_edge(
    dim: int, limit: int, learned: Sequence[tuple[int, int]], decay: float, overlapping: bool
) -> torch.Tensor:
    """Largest eigenvalue of a decayed covariance of white noise, as a share of its trace, by dimensions left.

    The rows weigh decayᵃᵍᵉ, so the edge is not that of Marchenko and Pastur but of a separable covariance
    (Silverstein and Choi 1995): with weights w of N rows in d dimensions and c in (0, 1/max w) such that
    Σ (w c / (1 - w c))² = d, it is (d + Σ w c / (1 - w c)) / c. Added are 2 Tracy-Widom scales (Johnstone 2001).

    Args:
        dim: d. limit: how many directions may be taken out.
        learned: age and number of independent noise rows of each step that was learned from, newest first.
        decay: a step. overlapping: successive differences, one a step.

    Returns:
        (limit,) float64, for d, d - 1, … dimensions.
    """
    # steps that weigh less than 1/1000 of the newest are left out, and of more than 256 several are taken as one
    reach = learned[0][0] + (math.log(1e-3) / math.log(decay) if decay > 0 else 0)
    near = [step for step in learned if step[0] <= reach]
    size = math.ceil(len(near) / 256)
    parts = [near[i : i + size] for i in range(0, len(near), size)]
    ages = tuple(sum(age for age, _ in part) / len(part) for part in parts)
    return _edge(dim, limit, ages, tuple(sum(rows for _, rows in part) for part in parts), decay, overlapping)


@functools.lru_cache(maxsize=64)
def _edge(dim: int, limit: int, ages: tuple, rows: tuple, decay: float, overlapping: bool) -> torch.Tensor:
    weights, count = decay ** torch.tensor(ages, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64)
    if overlapping:
        weights, count = _overlapping(weights), count.mean().expand(len(weights))
    dims = dim - torch.arange(limit, dtype=torch.float64)
    low, high = torch.zeros_like(dims), torch.full_like(dims, 1 / weights.max().item())
    for _ in range(30):
        c = (low + high) / 2
        ratio = weights * c[:, None] / (1 - weights * c[:, None])
        above = (count * ratio.square()).sum(1) > dims
        low, high = torch.where(above, low, c), torch.where(above, c, high)
    ratio = weights * low[:, None] / (1 - weights * low[:, None])
    edge = (dims + (count * ratio).sum(1)) / low
    total = (count * weights).sum()
    root_n, root_d = torch.sqrt(total**2 / (count * weights.square()).sum()), dims.sqrt()
    fluctuation = (1 / root_n + 1 / root_d) ** (1 / 3) / (root_n + root_d)
    return edge * (1 + 2 * fluctuation) / (total * dims)


def _overlapping(weights: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (J,) of the covariance in time of successive differences that weigh `weights` (J,).

    Each shares a gradient with its neighbours (correlation -1/2), which widens the spectrum.
    """
    beside = torch.diag(torch.full((len(weights) - 1,), -0.5, dtype=weights.dtype), 1)
    matrix = torch.eye(len(weights), dtype=weights.dtype) + beside + beside.T
    return torch.linalg.eigvalsh(matrix * weights.sqrt()[:, None] * weights.sqrt()).clamp_min(0)


def significant_rank(eigenvalues: torch.Tensor, trace: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """How many leading eigenvalues stand out of what white noise alone would show with as many samples.

    The i-th is compared with the largest one of white noise that has the trace left after the i - 1 before it.

    Args:
        eigenvalues: (B, k) largest first. trace: (B,) of the whole covariance. edge: (limit,) of [`noise_edge`].

    Returns:
        (B,) integers from 0 to `limit`.
    """
    leading = eigenvalues[:, : len(edge)]
    left = (trace[:, None] - torch.cumsum(leading, 1) + leading).clamp_min(0)
    stands_out = leading > left * edge.to(leading)
    return torch.cumprod(stands_out.long(), 1).sum(1)


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
        strategy: `"noise"`, `"keep"` or `"hybrid"`. rank: (B,) directions to remove.
        reference: (B, m, k) coordinates of the reference m in K.

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
