"""How many eigenvalues of a noise covariance stand out of what the sample count alone would give."""

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
        dim: d. limit: how many directions may be taken out. decay: per step.
        learned: age and number of independent noise rows of each step that was learned from, newest first.
        overlapping: whether the rows are successive differences, one per step.

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
