"""Rows that TRL drops without a word, since their prompts alone fill `max_length`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def lost_rows(name: str, given: Any, kept: Any, max_length: int | None) -> str | None:
    """How many rows of `given` are not in `kept`, and the first of them; None where there is none, or of streams.

    Raises:
        ValueError: no row is left.
    """
    if not isinstance(given, Dataset) or not isinstance(kept, Dataset) or len(kept) == len(given):
        return None
    if len(kept) == 0:
        raise ValueError(
            f"No row of the {name} set is left: each prompt alone has `max_length` ({max_length}) tokens or more. "
            "Raise `max_length`."
        )
    lost = set(range(len(given))) - set(_numbers(kept))
    number, row = min((_numbers(given)[i], i) for i in lost)
    text = given[row].get("prompt", given[row].get("chosen"))
    text = text if isinstance(text, str) else str(text[0]["content"])
    return (
        f"{len(lost)} of {len(given)} {name} rows are left out, since their prompts alone have `max_length` "
        f"({max_length}) tokens or more; the first is row {number + 1} (the first is 1), {text[:40]!r}."
    )


def _numbers(dataset: Dataset) -> list[int]:
    """For each row its number in the table that the dataset is a selection of."""
    table = dataset._indices
    return list(range(len(dataset))) if table is None else table.column(0).to_pylist()
