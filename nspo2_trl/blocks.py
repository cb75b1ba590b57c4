"""Blocks: parameters that are filtered together, stacked by shape so that one call serves all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .config import NSPO2Config
from .core import NSPO2
from .eigensolvers import check_exact
from .sentinel import BiasSentinel
from .sharding import LocalParts, Shards


@dataclass
class Block:
    """Parameters whose gradients form one block, by name. A LoRA adapter of one module, as a rule."""

    name: str
    params: list[nn.Parameter]


def params_outside(blocks: Iterable[Block], params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `params` that are in none of `blocks`."""
    inside = {id(p) for block in blocks for p in block.params}
    return [p for p in params if id(p) not in inside]


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


class Group:
    """Blocks of one shape on one device: their [`NSPO2`], and where each parameter stands in its buffers.

    Args:
        shape: (m, d) of each. device: where they are. config: the options.
        ranks: the processes that share the work on the blocks, each with some of the columns; None for one process.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        config: NSPO2Config,
        ranks: dist.ProcessGroup | None = None,
    ):
        self.shape, self.device, self.config = shape, device, config
        self.shards = Shards(shape[1], ranks) if ranks else None
        self.names: list[str] = []
        self.places: list[_Place] = []

    def add(self, name: str, params: list[nn.Parameter]) -> None:
        start = 0
        for param in params:
            shape = whole_shape(param)
            transposed = self.shape[0] > 1 and shape[0] != self.shape[0]
            self.places.append(_Place(param, len(self.names), start, transposed))
            start += shape.numel()
        self.names.append(name)

    def build(self, sentinel: BiasSentinel, recent: bool, share: float) -> None:
        if self.config.eigensolver == "exact":
            check_exact(self.shape[1])
            if self.shards:
                raise ValueError(
                    "`eigensolver='exact'` works on one process only: use `eigensolver='gram'` with several."
                )
        self.nspo2 = NSPO2(self.config, sentinel, recent, share, self.shards)
        self.moves: LocalParts | None = None
        if isinstance(self.places[0].param, DTensor):
            size = len(self.names) * self.shape[0] * self.shape[1]
            positions = torch.arange(size, device=self.device).view(len(self.names), *self.shape)
            assert self.shards is not None  # FSDP2 has ranks
            sharded = [place.param for place in self.places if isinstance(place.param, DTensor)]
            self.moves = LocalParts(self.shards, self.views_of(positions), sharded)
        else:
            self.full = self.buffer()
            self.views = self.views_of(self.full)
        self.grad = self.buffer(width=self.shards.width) if self.shards else self.full
        # `grad` is the step's gradient; in update space, afterwards the change of the parameters
        if self.config.apply_to == "update":
            self.before = torch.zeros_like(self.grad)

    def buffer(self, *lead: int, width: int | None = None) -> torch.Tensor:
        """Zeros (*lead, B, m, d) in at least float32: the maths is never done in half precision."""
        dtype = torch.promote_types(self.places[0].param.dtype, torch.float32)
        size = (*lead, len(self.names), self.shape[0], width or self.shape[1])
        return torch.zeros(size, dtype=dtype, device=self.device)

    def views_of(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """One view of `buffer` (B, m, d) a parameter, in the order of `places`."""
        return [place.view(buffer) for place in self.places]

    def read_grads(self) -> list[int]:
        """Copy the parameters' gradients into `grad`; returns the places that have one (others count as 0).

        Sparse gradients are not read: they stay as they are.
        """
        grads = [place.param.grad for place in self.places]
        there = {i: grad for i, grad in enumerate(grads) if grad is not None and not grad.is_sparse}
        if self.moves:
            locals_ = [_local(place.param) for place in self.places]
            self.moves.take(
                [torch.zeros_like(p) if g is None else _local(g) for p, g in zip(locals_, grads)], self.grad
            )
            return list(there)
        if len(there) < len(grads):
            self.full.zero_()
        self._read([self.views[i] for i in there], list(there.values()))
        return list(there)

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

    def write_grads(self, result: torch.Tensor, there: list[int]) -> None:
        """Copy `result` (B, m, d) into the parameters' gradients."""
        self._write(result, [_grad(self.places[i].param) for i in there], there)

    def write_params(self, change: torch.Tensor, there: list[int]) -> None:
        """Set the parameters to what they were `before`, plus `change` (B, m, d)."""
        self._write(change + self.before, [_local(self.places[i].param) for i in there], there)

    def _write(self, result: torch.Tensor, targets: list[torch.Tensor], there: list[int]) -> None:
        if self.moves:
            held = dict(zip(there, targets))
            local = [held.get(i, torch.empty_like(_local(p.param))) for i, p in enumerate(self.places)]
            self.moves.give(result, local)
            return
        self.full.copy_(self.shards.gather(result) if self.shards else result)
        if there:
            torch._foreach_copy_(targets, [self.views[i] for i in there])

    def follow(self) -> None:
        """Move to where the parameters are, should they have been moved since."""
        device = self.places[0].param.device
        if device != self.device:
            self.device, state = device, self.nspo2.state_dict()
            self.build(self.nspo2.sentinel, self.nspo2.sums_decay != 1, self.nspo2.share)
            self.nspo2.load_state_dict(state, device=device)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter or a gradient, without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _grad(param: torch.Tensor) -> torch.Tensor:
    """What this rank has of the gradient of a parameter that has one."""
    assert param.grad is not None
    return _local(param.grad)


def whole_shape(param: torch.Tensor) -> torch.Size:
    """The shape of all of a parameter; under ZeRO-3 its own is that of an empty tensor, except while it is used."""
    return getattr(param, "ds_shape", param.shape)


def units(blocks: list[Block], covariance: str) -> Iterator[tuple[str, list[nn.Parameter], tuple[int, int]]]:
    """(name, params, (m, d)) of what is filtered as one: a whole block, or each of its matrices when factored."""
    for block in blocks:
        if covariance == "adapter":
            yield block.name, block.params, (1, sum(whole_shape(p).numel() for p in block.params))
            continue
        for index, param in enumerate(block.params):
            shape = whole_shape(param)
            matrix = len(shape) == 2 and min(shape) > 1
            yield f"{block.name}.{index}", [param], (min(shape), max(shape)) if matrix else (1, shape.numel())
