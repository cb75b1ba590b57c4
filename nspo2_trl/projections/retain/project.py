"""The projections of A themselves, and their way into a model and back out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from ...layout.roles import InputAdapter
from .collect import InputSpace

FORMS = ("hard", "ridge")
RIDGE = 1.0  # τ, in units of C's mean eigenvalue


@dataclass(frozen=True)
class Point:
    """One way to project: `rank` directions taken out in `form`, and the rest times `scale`. Rank 0 only scales."""

    rank: int = 12
    scale: float = 1.2
    form: str = "hard"


def project(weight: torch.Tensor, space: InputSpace, point: Point) -> torch.Tensor:
    """A after the projection, in the dtype of `weight` (r, width), A.

    Hard: s A (I - K Kᵀ), with K the first `rank` directions of `space`. Ridge: s A (C d / tr C + τ I)⁻¹ τ with
    C = K Λ Kᵀ, which is s A (I - K diag(1 - τ / (λ d / tr C + τ)) Kᵀ) (Woodbury).
    """
    basis = space.vectors[:, : point.rank].to(weight.device, torch.float64)
    taken = torch.ones(basis.shape[1], dtype=torch.float64, device=weight.device)
    if point.form == "ridge":
        strength = space.shares[: point.rank].to(taken) * weight.shape[1]
        taken = strength / (strength + RIDGE)
    wide = weight.double()
    return (point.scale * (wide - ((wide @ basis) * taken) @ basis.T)).to(weight.dtype)


def starts(adapters: Sequence[InputAdapter]) -> list[torch.Tensor]:
    """Copies of A, of this process's rows of it where it is sharded, from which `put` makes any number of points."""
    return [local(adapter.weight.detach()).clone() for adapter in adapters]


def space_of(spaces: Sequence[InputSpace]) -> dict[str, InputSpace]:
    """The space of each module, by its name."""
    return {name: space for space in spaces for name in space.modules}


@torch.no_grad()
def put(
    adapters: Sequence[InputAdapter], start: Sequence[torch.Tensor], spaces: Sequence[InputSpace], point: Point
) -> None:
    """Set A of all `adapters` to the projection of its `start`. A that texts do not reach is only scaled."""
    of = space_of(spaces)
    for adapter, weight in zip(adapters, start):
        space = of.get(adapter.name)
        local(adapter.weight).copy_(point.scale * weight if space is None else project(weight, space, point))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows of a tensor that FSDP2 shards; of others the tensor itself. The projection is by row."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
