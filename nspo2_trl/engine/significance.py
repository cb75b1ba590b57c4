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
    (Silverstein and Choi 1995): with weights w of N rows in d dimensions it is the minimum over c in (0, 1/max w) of
    (d + Σ w c / (1 - w c)) / c. Added are 2 Tracy-Widom scales (Johnstone 2001).

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


def groups(rank: int) -> list[int]:
    """Sizes of the groups in which `rank` directions are tested: 1, 1, 2, 4, 8, … and the rest."""
    sizes: list[int] = []
    while sum(sizes) < rank:
        sizes.append(min(max(1, sum(sizes)), rank - sum(sizes)))
    return sizes


def unseen_rank(sums: torch.Tensor, groups: Sequence[int], dim: int) -> torch.Tensor:
    """How many leading directions take more noise than white noise would, of micro-batches that they have not seen.

    A share is compared with that of all that is left, evenly. Its standard error is that of a ratio of sums over
    micro-batches (delta method). Leading groups have to stand out by 2 of them, of few micro-batches by more, as the
    quantile of Student's distribution grows; the last direction that counts, among theirs, by 1. Of less than two
    micro-batches in effect, (Σ w E)² / Σ w² E², so that one that outweighs all others counts as one, none does.

    Args:
        sums: (B, 3, k + G + 1) over micro-batches of weights w: Σ w e, Σ w² e² and Σ w² e E, where e is the energy
            along each of k directions, in each of G groups of them, or the whole energy E. Those of squares times
            n / (n - 1) for n in a step.
        groups: their sizes, which add up to k. dim: d.

    Returns:
        (B,) whole numbers from 0 to k.
    """
    sizes = torch.tensor([1] * sum(groups) + list(groups), device=sums.device)
    energy, squares, products = sums.unbind(1)
    whole = energy[:, -1:].clamp_min(torch.finfo(sums.dtype).tiny)
    share = energy[:, :-1] / whole
    variance = squares[:, :-1] - 2 * share * products[:, :-1] + share.square() * squares[:, -1:]
    error = variance.clamp_min(0).sqrt() / whole
    count = whole.square() / squares[:, -1:].clamp_min(torch.finfo(sums.dtype).tiny)

    def stand_out(part: slice, errors: torch.Tensor | float) -> torch.Tensor:
        own, size = share[:, part], sizes[part]
        even = (1 - own.cumsum(1) + own) * size / (dim - size.cumsum(0) + size)
        return own - errors * error[:, part] > even

    k = sum(groups)
    among = torch.cumprod(stand_out(slice(k, None), 2 + 4 / count) & (count >= 2), 1).repeat_interleave(sizes[k:], 1)
    return (stand_out(slice(k), 1) * among * torch.arange(1, k + 1, device=sums.device)).amax(1)


@functools.lru_cache(maxsize=64)
def _edge(dim: int, limit: int, ages: tuple, rows: tuple, decay: float, overlapping: bool) -> torch.Tensor:
    weights, count = decay ** torch.tensor(ages, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64)
    if overlapping:
        weights, count = _overlapping(weights), count.mean().expand(len(weights))
    dims = dim - torch.arange(limit, dtype=torch.float64)
    # c max(w) = 1/(1 + e⁻ˣ) on a grid so fine that the minimum, where errors are squared, is off by 1/1000 at most
    c = torch.sigmoid(torch.linspace(-12, 12, 241, dtype=torch.float64)) / weights.max()
    share = weights * c[:, None]
    ratio = share / (1 - share)
    edge = ((dims[:, None] + ratio @ count) / c).min(1).values
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
