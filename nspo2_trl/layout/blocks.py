"""Blocks: parameters that are filtered together, and the matrices or vectors that they are filtered as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Block:
    """Parameters whose gradients form one block, by name. A LoRA adapter of one module, as a rule."""

    name: str
    params: list[nn.Parameter]


def params_outside(blocks: Iterable[Block], params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `params` that are in none of `blocks`."""
    inside = {id(p) for block in blocks for p in block.params}
    return [p for p in params if id(p) not in inside]


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
