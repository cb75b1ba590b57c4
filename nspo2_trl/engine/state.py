"""Bringing saved tensors back, with a refusal that names the one that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def load_tensors(owner: object, names: Iterable[str], state: Mapping) -> None:
    """Set the attributes `names` of `owner` to copies of the tensors in `state`, on the device they were on.

    Raises:
        ValueError: a shape differs, since the state is of other blocks or another rank.
    """
    for name in names:
        own, saved = getattr(owner, name), state[name]
        if own.shape != saved.shape:
            raise ValueError(f"the saved `{name}` has shape {tuple(saved.shape)}, this run needs {tuple(own.shape)}")
        setattr(owner, name, saved.to(own, copy=True))


def in_dtype(state: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """`state` with every tensor that is of the dtype `old` in `new`."""
    if isinstance(state, dict):
        return {name: in_dtype(value, old, new) for name, value in state.items()}
    return state.to(new) if isinstance(state, torch.Tensor) and state.dtype == old else state
