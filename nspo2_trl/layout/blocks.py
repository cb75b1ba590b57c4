"""Blocks: parameters that are filtered together, and the matrices or vectors that they are filtered as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn


@dataclass
class Block:
    """Parameters whose gradients form one block, by name. A LoRA adapter of one module, as a rule."""

    name: str
    params: list[nn.Parameter]


class Unit(NamedTuple):
    """Parameters that are filtered as m vectors of d entries: shape is (m, d)."""

    name: str
    params: list[nn.Parameter]
    shape: tuple[int, int]


def params_outside(blocks: Iterable[Block], params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `params` that are in none of `blocks`."""
    inside = {id(p) for block in blocks for p in block.params}
    return [p for p in params if id(p) not in inside]


def whole_shape(param: torch.Tensor) -> torch.Size:
    """The shape of all of a parameter as [`real`] numbers; under ZeRO-3 its own is mostly that of an empty tensor."""
    shape = getattr(param, "ds_shape", param.shape)
    return torch.Size((*shape, 2)) if param.is_complex() else shape


def common_dtype(params: Iterable[torch.Tensor]) -> torch.dtype:
    """The real dtype that all of them are exact in."""
    return reduce(torch.promote_types, (p.dtype.to_real() for p in params))


def real(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of a complex one a view with one dimension more, for the real and the imaginary part."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def units(blocks: list[Block], covariance: str) -> Iterator[Unit]:
    """What is filtered as one: a whole block, or each of its matrices when factored."""
    for block in blocks:
        if covariance == "adapter":
            yield Unit(block.name, block.params, (1, sum(whole_shape(p).numel() for p in block.params)))
            continue
        for index, param in enumerate(block.params):
            shape = whole_shape(param)
            matrix = len(shape) == 2 and min(shape) > 1
            yield Unit(f"{block.name}.{index}", [param], (min(shape), max(shape)) if matrix else (1, shape.numel()))
