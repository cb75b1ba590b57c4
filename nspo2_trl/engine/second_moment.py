"""SecondMoment: the strongest directions of many rows, from a sum that is linear in them and small in memory."""

from __future__ import annotations

import torch

ROWS_AT_ONCE = 1024  # rows that are held in float64 at a time
FLOOR = 1e-12  # eigenvalues below this share of the largest are what is left of rounding


def random_probe(width: int, size: int, seed: int = 0) -> torch.Tensor:
    """(width, size): random orthonormal columns, the same on every machine. `size` <= `width`."""
    normal = torch.randn(width, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(normal).Q


class SecondMoment:
    """C = Σ w x xᵀ over rows x, seen through a probe Ω: only Y = C Ω is kept, and at the end C ≈ Y (ΩᵀY)⁺ Yᵀ.

    That is the Nyström approximation of a stream (Tropp, Yurtsever, Udell, Cevher 2017, arXiv:1706.05736); it is exact
    where C has no more directions than Ω. Y is a plain sum over rows, so it can be added up over batches and processes
    in any order, which a sketch that is cut off after each batch can not. The sum is in float64: rows that differ
    by 1e-5 of their length are still told apart.

    Memory: 2 width x size numbers; no width x width matrix exists.

    Args:
        probe: (width, size) Ω, from `random_probe`, or from `better_probe` of a second moment of some of the rows.
    """

    def __init__(self, probe: torch.Tensor):
        self.probe = probe
        self.sum = torch.zeros_like(probe, dtype=torch.float64)
        self.energy = torch.zeros((), dtype=torch.float64, device=probe.device)  # Σ w ‖x‖²

    def update(self, rows: torch.Tensor, weight: float = 1.0) -> None:
        """Add rows (n, width), each with this weight."""
        for part in rows.split(ROWS_AT_ONCE):
            part = part.double()
            self.sum += weight * (part.T @ (part @ self.probe.double()))
            self.energy += weight * part.square().sum()

    def directions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (k,), largest first, and eigenvectors (width, k) of C, both float64.

        k <= `count`: it is less where the rows span fewer directions, or the probe has fewer.
        """
        core = self.probe.double().T @ self.sum
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        fine = values > FLOOR * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        root = self.sum @ (vectors[:, fine] * values[fine].rsqrt())  # root rootᵀ = Y (ΩᵀY)⁺ Yᵀ
        left, singular, _ = torch.linalg.svd(root, full_matrices=False)
        values = singular.square()
        k = min(count, int((values > FLOOR * values[:1]).sum()))
        return values[:k], left[:, :k]

    def better_probe(self, seed: int = 0) -> torch.Tensor:
        """(width, size) orthonormal columns that span Y: a step of subspace iteration for the next look at the rows.

        A trace of noise stands where Y has fewer directions than columns, so that none is missed in the next look.
        """
        width, size = self.probe.shape
        noise = random_probe(width, size, seed + 1).to(self.sum)
        return torch.linalg.qr(self.sum + 1e-10 * self.sum.norm().clamp_min(1e-30) * noise).Q


def energy_along(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """(k,) Σ (xᵀu)² over rows x (n, width), for each column u of `basis` (width, k); float64."""
    return sum(
        ((part.double() @ basis.double()).square().sum(0) for part in rows.split(ROWS_AT_ONCE)),
        start=torch.zeros(basis.shape[1], dtype=torch.float64, device=rows.device),
    )
