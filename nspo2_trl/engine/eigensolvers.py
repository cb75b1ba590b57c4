"""EigSolver: top eigenvectors of a covariance given by its weighted sample rows, for many equal blocks at once.

The covariance is C = Xᵀ W² X with X (N, d) a few dozen rows and W their weights. `gram` and `randomized` work in
sample space (N x N) and never form a d x d matrix; `exact` does, and is there for small blocks and for tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

EXACT_MAX_DIM = 4096
_CHUNK = 1 << 13  # columns recombined at a time, so that no second copy of the rows is needed

Total = Callable[[torch.Tensor], torch.Tensor]  # sums over the ranks that share the columns of a block
Spread = Callable[[Callable, torch.Tensor], tuple]  # has each rank do some of the matrices, see `Shards.spread`


def alone(function: Callable, matrix: torch.Tensor) -> tuple:
    """The [`Spread`] of one process."""
    return function(matrix)


def same(part: torch.Tensor) -> torch.Tensor:
    """The [`Total`] of one process that has all columns."""
    return part


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (B, N) and eigenvectors (B, N, N) of symmetric `matrix` (B, N, N), largest first.

    Solved in float64: on exactly singular matrices LAPACK's float32 driver was seen to underflow and return NaN.
    Blocks are scaled to trace 1 before, so that overflow is no danger, and a block with bad numbers gives zeros
    instead of stopping the others.
    """
    small = matrix.double()
    scale = torch.diagonal(small, dim1=-2, dim2=-1).sum(-1)
    usable = torch.isfinite(scale) & (scale > 0)
    scale = torch.where(usable, scale, 1.0)
    scaled = torch.where(usable[:, None, None], small / scale[:, None, None], 0.0)
    values, vectors = torch.linalg.eigh(torch.nan_to_num(scaled))
    usable &= torch.isfinite(values).all(-1) & torch.isfinite(vectors).all(-1).all(-1)
    values = torch.where(usable[:, None], values.flip(-1) * scale[:, None], 0.0)
    vectors = torch.where(usable[:, None, None], vectors.flip(-1), 0.0)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _recombine_(stack: torch.Tensor, coefficients: torch.Tensor) -> None:
    """`stack[:, :k] = coefficients @ stack`, in place. `stack` (B, N, d), `coefficients` (B, k, N), k <= N."""
    k = coefficients.shape[1]
    for start in range(0, stack.shape[2], _CHUNK):
        columns = stack[:, :, start : start + _CHUNK]
        columns[:, :k] = coefficients @ columns


def _orthonormalize_(basis: torch.Tensor, keep: torch.Tensor, total: Total) -> torch.Tensor:
    """One Cholesky pass that brings nearly orthonormal rows to working precision, in place.

    `basis` (B, k, d) is orthonormal up to the error of a Gram eigensolve, zero where not `keep` (B, k). Directions of
    a block whose Cholesky fails are dropped: returned is (B, k), what is orthonormal now; the others are zero.
    """
    gram = total(basis @ basis.mT)
    gram = gram + torch.diag_embed((~keep).to(gram.dtype))
    factor, info = torch.linalg.cholesky_ex(gram)
    fine = info == 0
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    factor = torch.where(fine[:, None, None], factor, eye)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    keep = keep & fine[:, None]
    _recombine_(basis, torch.where(keep[:, :, None], inverse, 0.0))
    return keep


def _from_left(
    stack: torch.Tensor,
    weights: torch.Tensor,
    values: torch.Tensor,
    left: torch.Tensor,
    k: int,
    epsilon: float,
    total: Total,
) -> torch.Tensor:
    """Write the top-k right singular vectors that belong to `left` into `stack[:, :k]`; returns eigenvalues (B, k).

    Args:
        stack: (B, N, d) rows. weights: (B, N). values: (B, q) eigenvalues, largest first. left: (B, N, q) the
            eigenvectors in sample space, orthonormal columns, q >= k.
    """
    values, left = values[:, :k], left[:, :, :k]
    keep = values > epsilon * values[:, :1].clamp_min(torch.finfo(values.dtype).tiny)
    values = torch.where(keep, values, 0.0)
    inverse_root = torch.where(keep, torch.where(keep, values, 1.0).rsqrt(), 0.0)
    _recombine_(stack, (left.mT * weights[:, None, :]) * inverse_root[:, :, None])
    keep = _orthonormalize_(stack[:, :k], keep, total)
    return torch.where(keep, values, 0.0)


def _gram(stack: torch.Tensor, weights: torch.Tensor, orthonormal: int, total: Total) -> torch.Tensor:
    """(B, N, N) inner products of the weighted rows."""
    right = total(stack @ stack[:, orthonormal:].mT)  # (B, N, N - orthonormal); the rest of the matrix is known
    left = right.new_zeros(*right.shape[:2], orthonormal)
    left[:, :orthonormal] = torch.eye(orthonormal, dtype=left.dtype, device=left.device)
    left[:, orthonormal:] = right[:, :orthonormal].mT
    return torch.cat([left, right], 2) * weights[:, :, None] * weights[:, None, :]


def check_exact(dim: int, shared: object = None) -> None:
    """Raise `ValueError` where blocks of `dim` entries are too large for the `exact` method, or `shared` by ranks."""
    if shared:
        raise ValueError("`eigensolver='exact'` works on one process only: use `eigensolver='gram'` with several.")
    if dim > EXACT_MAX_DIM:
        raise ValueError(
            f"`eigensolver='exact'` builds a {dim} x {dim} matrix; it takes blocks of up to {EXACT_MAX_DIM} entries. "
            "Use `eigensolver='gram'`."
        )


class EigSolver:
    """Top-k eigenpairs of B covariances at once, by the method named in the config.

    Args:
        method: `"gram"`, `"exact"` or `"randomized"`. seed: of the last.
        epsilon: eigenvalues below this share of the largest one count as zero.
        total: sums over the ranks that share the columns of a block. spread: has each do a part of the small matrices.
    """

    def __init__(
        self, method: str = "gram", epsilon: float = 1e-6, seed: int = 42, total: Total = same, spread: Spread = alone
    ):
        self.method, self.epsilon, self.seed, self.total, self.spread = method, epsilon, seed, total, spread

    def solve_(self, stack: torch.Tensor, weights: torch.Tensor, k: int, orthonormal: int = 0) -> torch.Tensor:
        """Write the top-k eigenvectors of Σ_i w_i² x_i x_iᵀ into the first k rows of `stack`.

        Args:
            stack: (B, N, d) rows x, N >= k; overwritten in its first k rows by orthonormal eigenvectors, largest
                eigenvalue first, zero rows where the covariance has no more directions.
            weights: (B, N) weights w, 0 for rows that are zero.
            orthonormal: how many leading rows are known to be orthonormal, or zero.

        Returns:
            (B, k) eigenvalues, largest first, 0 for the zero rows.

        Raises:
            ValueError: the blocks are too large for the `exact` method.
        """
        solve_ = {"gram": self._gram_, "exact": self._exact_, "randomized": self._randomized_}[self.method]
        return solve_(stack, weights, k, orthonormal)

    def _gram_(self, stack: torch.Tensor, weights: torch.Tensor, k: int, orthonormal: int) -> torch.Tensor:
        """Through the N x N Gram matrix of the weighted rows (the method of snapshots, Sirovich 1987)."""
        values, vectors = self.spread(eigh, _gram(stack, weights, orthonormal, self.total))
        return _from_left(stack, weights, values, vectors, k, self.epsilon, self.total)

    def _randomized_(self, stack: torch.Tensor, weights: torch.Tensor, k: int, orthonormal: int) -> torch.Tensor:
        """Subspace iteration with 8 more directions than asked for (Halko, Martinsson, Tropp 2011, alg. 4.4).

        It has its own generator: the random numbers of the training run stay as they are.
        """
        blocks, n, _ = stack.shape
        q = min(n, k + 8)
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        probe = torch.randn(n, q, generator=generator, dtype=torch.float64).to(stack)
        left = probe.expand(blocks, n, q)
        gram = _gram(stack, weights, orthonormal, self.total)
        for _ in range(3):
            left = torch.linalg.qr(gram @ left).Q
        values, rotation = self.spread(eigh, left.mT @ gram @ left)
        return _from_left(stack, weights, values, left @ rotation, k, self.epsilon, self.total)

    def _exact_(self, stack: torch.Tensor, weights: torch.Tensor, k: int, orthonormal: int) -> torch.Tensor:
        """Of the d x d covariance itself, for d up to `EXACT_MAX_DIM`."""
        dim = stack.shape[2]
        check_exact(dim)
        weighted = stack * weights[:, :, None]
        values, vectors = eigh(weighted.mT @ weighted)
        values = torch.nn.functional.pad(values, (0, max(0, k - dim)))[:, :k]
        vectors = torch.nn.functional.pad(vectors, (0, max(0, k - dim)))[:, :, :k]
        keep = values > self.epsilon * values[:, :1].clamp_min(torch.finfo(values.dtype).tiny)
        stack[:, :k] = torch.where(keep[:, :, None], vectors.mT, 0.0)
        return torch.where(keep, values, 0.0)
