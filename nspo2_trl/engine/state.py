"""Bringing saved tensors back, with a refusal that names the one that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


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
