"""Stacks: blocks of one shape side by side, so that one call serves all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..engine.shards import Shards
from .blocks import Unit, common_dtype, real, whole_shape
from .local_parts import LocalParts


@dataclass
class _Place:
    """Where a parameter's gradient stands in a buffer (…, B, m, d): `buffer[…, block, :, start:stop]`."""

    param: nn.Parameter
    block: int
    start: int
    transposed: bool

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The part of `buffer` (B, m, d), in the parameter's own shape."""
        if self.transposed:
            return buffer[self.block].mT
        shape = whole_shape(self.param)
        return buffer[self.block, :, self.start :].flatten()[: shape.numel()].view(shape)


class Stack:
    """Blocks of one shape on one device side by side, and where each parameter stands in their buffers.

    Args:
        shape: (m, d) of each. update: whether the parameters' change is going to be filtered: one buffer more.
        process_group: the processes that share the work on the blocks, each with some of the columns; None for one.
    """

    _BUFFERS = ("full", "views", "grad", "before", "moves")

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        update: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.shape, self.device, self.update = shape, device, update
        self.shards = Shards(shape[1], process_group) if process_group else None
        self.names: list[str] = []
        self.places: list[_Place] = []
        self.there: list[int] = []  # places whose parameter had a gradient when `read_grads` was called last

    def add(self, name: str, params: list[nn.Parameter]) -> None:
        start = 0
        for param in params:
            if param.layout != torch.strided or param.dtype.itemsize < 2:
                raise ValueError(
                    f"NSPO2 cannot filter a parameter that is {param.layout} of {param.dtype} (in the block "
                    f"{name!r}): train it with an optimizer of its own, or pass `blocks` without it."
                )
            shape = whole_shape(param)
            transposed = self.shape[0] > 1 and shape[0] != self.shape[0]
            self.places.append(_Place(param, len(self.names), start, transposed))
            start += shape.numel()
        self.names.append(name)

    def is_of(self, units: Mapping[str, Unit]) -> bool:
        """Whether each block here is one of `units`, which are given by name, with the same parameters."""
        own: dict[str, list[nn.Parameter]] = {name: [] for name in self.names}
        for place in self.places:
            own[self.names[place.block]].append(place.param)
        return all(
            name in units and list(map(id, params)) == list(map(id, units[name].params))
            for name, params in own.items()
        )

    def __getstate__(self) -> dict:
        """Without buffers: not every serializer keeps a view and its buffer together."""
        return {name: value for name, value in vars(self).items() if name not in self._BUFFERS}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.build()

    def build(self) -> None:
        """Make the buffers, when all blocks are there."""
        self.dtype = self.places[0].param.dtype
        self.moves: LocalParts | None = None
        if isinstance(self.places[0].param, DTensor):
            size = len(self.names) * self.shape[0] * self.shape[1]
            positions = torch.arange(size, device=self.device).view(len(self.names), *self.shape)
            if self.shards is None:
                raise ValueError(
                    "NSPO2 filters parameters that FSDP2 shards in its trainers alone: use DDP with the optimizer "
                    "wrapper, or pass `blocks` without these parameters."
                )
            sharded = [place.param for place in self.places if isinstance(place.param, DTensor)]
            self.moves = LocalParts(self.shards, self.views_of(positions), sharded)
        else:
            self.full = self.buffer()
            self.views = self.views_of(self.full)
        self.grad = self.buffer(width=self.shards.width) if self.shards else self.full
        # `grad` is the step's gradient; in update space, afterwards the change of the parameters
        if self.update:
            self.before = torch.zeros_like(self.grad)

    def release(self) -> None:
        """Give the buffers' memory back until the next step: they hold nothing that outlives one."""
        for buffer in self._buffers():
            buffer.untyped_storage().resize_(0)

    def _hold(self) -> None:
        """Have the buffers' memory, at the same place in every view; what stands there is to be written anew."""
        for buffer in self._buffers():
            if buffer.untyped_storage().nbytes() == 0:
                buffer.untyped_storage().resize_(buffer.nbytes)
                if self.moves:
                    buffer.zero_()  # nothing moves into the columns that are padding

    def _buffers(self) -> list[torch.Tensor]:
        return [vars(self)[name] for name in ("full", "grad", "before") if name in vars(self)]

    def buffer(self, *lead: int, width: int | None = None) -> torch.Tensor:
        """Zeros (*lead, B, m, d) in at least float32: the maths is never done in half precision."""
        dtype = torch.promote_types(common_dtype(place.param for place in self.places), torch.float32)
        size = (*lead, len(self.names), self.shape[0], width or self.shape[1])
        return torch.zeros(size, dtype=dtype, device=self.device)

    def views_of(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """One view of `buffer` (B, m, d) a parameter, in the order of `places`."""
        return [place.view(buffer) for place in self.places]

    def read_grads(self) -> None:
        """Copy the parameters' gradients into `grad`; those that have none count as 0.

        Sparse gradients are not read: they stay as they are.
        """
        self._hold()
        grads = [place.param.grad for place in self.places]
        there = {i: real(grad) for i, grad in enumerate(grads) if grad is not None and not grad.is_sparse}
        self.there = list(there)
        if self.moves:
            none = lambda place: torch.zeros_like(_local(place.param))
            own = [none(place) if grad is None else _local(grad) for place, grad in zip(self.places, grads)]
            return self.moves.take(own, self.grad)
        if len(there) < len(grads):
            self.full.zero_()
        self._read([self.views[i] for i in there], list(there.values()))

    def read_params(self) -> None:
        """Copy the parameters into `grad`."""
        params = [_local(place.param) for place in self.places]
        if self.moves:
            self.moves.take(params, self.grad)
        else:
            self._read(self.views, params)

    def _read(self, views: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        if tensors:
            torch._foreach_copy_(views, tensors)
        if self.shards:
            self.grad.copy_(self.shards.cut(self.full))

    def write_grads(self, result: torch.Tensor) -> None:
        """Copy `result` (B, m, d) into the parameters' gradients."""
        grads = (self.places[i].param.grad for i in self.there)
        self._write(result, [_local(grad) for grad in grads if grad is not None])

    def write_params(self, change: torch.Tensor) -> None:
        """Set the parameters to what they were `before`, plus `change` (B, m, d)."""
        self._write(change + self.before, [_local(self.places[i].param) for i in self.there])

    def _write(self, result: torch.Tensor, targets: list[torch.Tensor]) -> None:
        if self.moves:
            held = dict(zip(self.there, targets))
            local = [held.get(i, torch.empty_like(_local(p.param))) for i, p in enumerate(self.places)]
            return self.moves.give(result, local)
        self.full.copy_(self.shards.gather(result) if self.shards else result)
        if targets:
            torch._foreach_copy_(targets, [self.views[i] for i in self.there])

    def follow(self) -> bool:
        """Make the buffers anew where the parameters have another device or dtype by now; whether that was so."""
        first = self.places[0].param
        moved = (first.device, first.dtype) != (self.device, self.dtype)
        if moved:
            self.device = first.device
            self.build()
        return moved


def stacked(
    units: Iterable[Unit], layout: Mapping[str, int], update: bool, process_group: dist.ProcessGroup | None
) -> list[Stack]:
    """Stacks of `units`, one for each shape, dtype and device; not built yet.

    Args:
        layout: the number of a unit's stack, by name, in the order that they had there; of none, where they come anew.
        update, process_group: see [`Stack`].
    """
    found: dict[tuple, Stack] = {}
    order = {name: i for i, name in enumerate(layout)}
    for name, params, shape in sorted(units, key=lambda unit: order.get(unit.name, len(order))):
        key = (*shape, params[0].device, common_dtype(params), layout.get(name))
        if key not in found:
            found[key] = Stack(shape, params[0].device, update, process_group)
        found[key].add(name, params)
    return list(found.values())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter or a gradient as real numbers, without its history."""
    tensor = tensor.detach()
    return real(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
