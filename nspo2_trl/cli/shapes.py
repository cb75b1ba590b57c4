"""The shapes in which pairs come: brought to DPO's where there is no doubt, else refused with the row's number."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from tqdm import tqdm

from ..training.refusals import check_preferences
from .words import nearest

ROWS_AT_ONCE = 1000
COLUMNS = ("prompt", "chosen", "rejected")
Rows: TypeAlias = Dataset | IterableDataset
MESSAGES = re.compile(r"""\s*\[?\s*\{[^{}]*['"](role|from)['"]\s*:""")  # written as text


class RowError(ValueError):
    """A row that DPO cannot use; of a stream it comes up while it trains."""


def settle(dataset: Rows, name: str, named: Mapping[str, str | None] | None = None, progress: bool = False) -> Rows:
    """The dataset with DPO's columns, each of text or of messages, after a look at every row, of a stream as it comes.

    Columns get DPO's names, messages that stand in a cell as text are read, and a `prompt` that the messages of both
    answers begin with is left out.

    Args:
        name: what messages call the dataset. named: for each of DPO's columns the one that the user named, or None.

    Raises:
        ValueError: DPO cannot use a column or a row of it; the message has the row's number, the first being 1.
    """
    dataset = _rename(dataset, named or {})
    first = check_preferences(dataset, name)
    if "chosen" not in first:  # tokenized already
        return dataset
    written = [column for column in COLUMNS if isinstance(text := first.get(column), str) and MESSAGES.match(text)]
    if {"chosen", "rejected"} <= set(written):
        dataset = _read_messages(dataset, written, name)
        first = next(iter(dataset))
    twice = _check_rows(dataset, first, name, progress)
    if isinstance(dataset, IterableDataset):
        usual = _kinds(first)

        def sound(row: Mapping, number: int) -> bool:
            if fault := _fault({column: row.get(column) for column in usual}, usual):
                raise _row_error(name, number + 1, fault)
            return True

        dataset = dataset.filter(sound, with_indices=True)
    if twice and progress:
        print(f"{name}: `prompt` is left out, the messages of `chosen` and `rejected` begin with it.")
    return dataset.remove_columns("prompt") if twice else dataset


def no_template(model: str) -> ValueError:
    return ValueError(
        f"The rows are messages, and the tokenizer of {model!r} has no chat template: take an instruct model "
        "(`model_name_or_path`), or write the rows as text."
    )


def _rename(dataset: Rows, named: Mapping[str, str | None]) -> Rows:
    """Columns named by the user, or called as DPO's but for case and spaces, under DPO's names."""
    names = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know them
    wanted = {source: target for target, source in named.items() if source is not None}
    for source, target in wanted.items():
        if source not in names:
            raise ValueError(
                f"`{target}_column`: the dataset has no column {source!r}, it has {', '.join(names)}."
                f"{nearest(source, names)}"
            )
    for target in COLUMNS:
        like = [source for source in names if source.strip("\ufeff ").lower() == target]
        if target not in names and target not in wanted.values() and len(like) == 1 and like[0] not in wanted:
            wanted[like[0]] = target
    in_the_way = [target for target in wanted.values() if target in names and target not in wanted]
    moved = {source: target for source, target in wanted.items() if source != target}
    if not moved:
        return dataset
    # by way of names that nothing has, since two columns may change places
    dataset = dataset.remove_columns(in_the_way).rename_columns({name: f"{name} to" for name in moved})
    return dataset.rename_columns({f"{name} to": target for name, target in moved.items()})


def _read_messages(dataset: Rows, columns: Sequence[str], name: str) -> Rows:
    """The cells of `columns`, text that holds messages, as JSON or as Python writes lists, as messages."""

    def read(row: Mapping, number: int) -> dict[str, Any]:
        return {column: _messages(row[column], name, number + 1, column) for column in columns}

    if isinstance(dataset, IterableDataset):
        return dataset.map(read, with_indices=True)
    for column in columns:  # whole, since a message may have keys that those before it lack
        found = [_messages(text, name, number, column) for number, text in enumerate(dataset[column], 1)]
        dataset = dataset.remove_columns(column).add_column(column, found)
    return dataset


def _messages(text: Any, name: str, number: int, column: str) -> Any:
    for reader in (json.loads, ast.literal_eval):
        try:
            return reader(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    words = """must be messages as in row 1, written as JSON: [{"role": …, "content": …}]"""
    raise _row_error(name, number, f"`{column}` {words}")


def _row_error(name: str, number: int, fault: str) -> RowError:
    return RowError(f"The dataset `{name}`, row {number} (the first is 1): {fault}.")


def _check_rows(dataset: Rows, first: Mapping, name: str, progress: bool) -> bool:
    """Refuse the first row that DPO cannot use; whether in all rows the answers begin with `prompt`."""
    columns = [column for column in COLUMNS if column in first]
    batches: Iterable = [{column: [first[column]] for column in columns}]
    if isinstance(dataset, Dataset):
        parts, number = dataset.select_columns(columns).iter(ROWS_AT_ONCE), -(-len(dataset) // ROWS_AT_ONCE)
        batches = tqdm(parts, "Checking rows", number, leave=False, delay=2, disable=not progress)
    number = same = twice = whole = 0
    usual = _kinds(first)
    for batch in batches:
        for values in zip(*(batch[column] for column in columns)):
            row = dict(zip(columns, values))
            number += 1
            if fault := _fault(row, usual):
                raise _row_error(name, number, fault)
            same += row["chosen"] == row["rejected"]
            twice += _begin_with_prompt(row)
            whole += all(usual[c] == "text" and row[c].startswith(row.get("prompt") or "\0") for c in COLUMNS[1:])
    if same and progress:
        print(f"{name}: in {same} of {number} rows `chosen` and `rejected` are the same; they teach nothing.")
    if whole == number and progress:
        print(f"{name}: `chosen` and `rejected` all begin with `prompt`; if they are whole texts, remove that column.")
    return twice == number


def _kinds(row: Mapping) -> dict[str, str]:
    return {c: "text" if isinstance(row[c], str) else "messages" for c in COLUMNS if c in row}


def _fault(row: Mapping, usual: Mapping[str, str]) -> str | None:
    """What is wrong with one row, or None; `usual` is of what kind the first row's columns are."""
    for column, value in row.items():
        if value is None:
            return f"`{column}` is missing"
        if not isinstance(value, (str, list)):
            return f"`{column}` is {type(value).__name__}, it must be text or a list of messages"
        if not value and not (column == "prompt" and isinstance(value, str)):
            return f"`{column}` is empty"
        for message in value if isinstance(value, list) else ():
            if not isinstance(message, Mapping) or not message.get("role"):
                return f"`{column}` has a message without `role`: messages are {{'role': …, 'content': …}}"
            if message.get("content") is None and not message.get("tool_calls"):
                return f"`{column}` has a message without `content`"
    kinds = _kinds(row)
    if len(set(kinds.values())) > 1 and not _begin_with_prompt(row):
        return ", ".join(f"`{column}` is {kind}" for column, kind in kinds.items()) + ": make them all the same"
    for column, kind in kinds.items():
        if kind != usual[column]:
            return f"`{column}` is {kind}, and in row 1 it is {usual[column]}: make all rows the same"
    return None


def _begin_with_prompt(row: Mapping) -> bool:
    """Whether the messages of both answers have `prompt`, text or messages, before their last message."""
    prompt, answers = row.get("prompt"), (row["chosen"], row["rejected"])
    if not prompt or any(isinstance(answer, str) for answer in answers):
        return False
    if isinstance(prompt, str):
        return all(any(str(m.get("content")).strip() == prompt.strip() for m in answer[:-1]) for answer in answers)
    wanted = [(m["role"], m.get("content")) for m in prompt]
    return all([(m["role"], m.get("content")) for m in answer[:-1]][: len(wanted)] == wanted for answer in answers)
