"""Saved tensors: bringing them back with a refusal that names the one that does not fit, and changing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch


def load_tensors(owner: object, names: Iterable[str], state: Mapping) -> None:
    """Set the attributes `names` of `owner` to copies of the tensors in `state`, on the device they were on.

    Raises:
        ValueError: a shape differs, since the state is of other blocks, LoRA rank or `max_rank`.
    """
    for name in names:
        own, saved = getattr(owner, name), state[name]
        if own.shape != saved.shape:
            raise ValueError(f"the saved `{name}` has shape {tuple(saved.shape)}, this run needs {tuple(own.shape)}")
        setattr(owner, name, saved.to(own, copy=True))


class Saved:
    """What is saved of it: tensors, whose shapes stay, and plain numbers or lists of them, as names of attributes."""

    _TENSORS: tuple[str, ...] = ()
    _NUMBERS: tuple[str, ...] = ()

    def state_dict(self) -> dict:
        """Tensors and plain numbers only."""
        tensors = {name: getattr(self, name).clone() for name in self._TENSORS}
        return tensors | {name: deepcopy(getattr(self, name)) for name in self._NUMBERS}

    def load_state_dict(self, state: Mapping) -> None:
        """Raises `ValueError` where the state is of other blocks, LoRA rank or `max_rank`."""
        load_tensors(self, self._TENSORS, state)
        for name in self._NUMBERS:
            setattr(self, name, deepcopy(state[name]))


def in_dtype(state: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """`state` with every tensor that is of the dtype `old` in `new`."""
    if isinstance(state, dict):
        return {name: in_dtype(value, old, new) for name, value in state.items()}
    return state.to(new) if isinstance(state, torch.Tensor) and state.dtype == old else state


def map_columns(state: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """`state` of a [`NoiseFilter`] with `change` done to every tensor whose last dimension are a block's columns."""
    state = state | ({"previous": change(state["previous"])} if "previous" in state else {})
    for part, name in (("gauge", "reference"), ("cov", "stack")):
        if part in state:
            state = state | {part: state[part] | {name: change(state[part][name])}}
    return state
