"""Rows of the table of options: a default, what a value must be, the same in words, what the option does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, field
from typing import Any

SAME = object()


def option(default: Any, valid: Callable[[Any], bool], must_be: str, help: str, trainer: Any = SAME) -> Any:
    """A row; `trainer` is the trainers' default where that is another, None where they have no such option."""
    return field(default=default, metadata={"valid": valid, "must_be": must_be, "help": help, "trainer": trainer})


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check(row: Field, name: str, value: Any) -> None:
    """Raises `ValueError` where `value` is none for this row; `name` is what users typed."""
    if not row.metadata["valid"](value):
        raise ValueError(f"`{name}` must be {row.metadata['must_be']}, got {value!r}.")


def whole(default: int, help: str, least: int = 0, note: str = "", trainer: Any = SAME) -> Any:
    return option(
        default, lambda v: is_int(v) and v >= least, f"a whole number of at least {least}{note}", help, trainer
    )


def one_of(default: str, *others: str, help: str, trainer: Any = SAME) -> Any:
    allowed = (default, *others)
    return option(default, lambda v: v in allowed, f"one of {', '.join(map(repr, allowed))}", help, trainer)
