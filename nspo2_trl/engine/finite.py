"""Whether gradients have NaN or Inf, asked so that every rank gets the same answer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from .eigensolvers import Total, same


def all_finite(tensors: list[torch.Tensor], total: Total = same) -> bool:
    """Whether none has NaN, Inf or entries so large that their squares overflow, on any rank that `total` sums over.

    Waits for the device once.
    """
    norms = torch.stack([torch.linalg.vector_norm(part).to(tensors[0].device) for part in tensors])
    return bool(torch.isfinite(total(norms.square().sum())))


def any_bad(grads: Iterable[torch.Tensor | None], total: Total = same) -> bool:
    """Whether any entry is NaN or Inf, on any rank that `total` sums over.

    For the rare case that `all_finite` said no; waits for the device.
    """
    bad = [(~torch.isfinite(entries(grad))).any() for grad in grads if grad is not None]
    return bool(total(torch.stack(bad).sum()))


def entries(grad: torch.Tensor) -> torch.Tensor:
    """What stands in a gradient: of a sparse one its values, of a sharded one what this rank has, else all of it."""
    if isinstance(grad, DTensor):
        return grad.to_local()
    return grad.coalesce().values() if grad.is_sparse else grad
