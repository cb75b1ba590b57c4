"""Preference pairs for `nspo2 train`: where they come from, what the columns are called, whether DPO can use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from tqdm import tqdm
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..training.loading import load
from ..training.options import NSPO2DPOConfig
from ..training.refusals import check_preferences
from .words import nearest

HELD_OUT = 0.05  # share of the data that is held out where it has no test split
ROWS_AT_ONCE = 1000


def _column(what: str, name: str) -> Any:
    words = f"Column that holds the {what}, where it is not called `{name}`."
    return field(default=None, metadata={"help": words})


@dataclass
class NSPO2ScriptArguments(ScriptArguments):
    r"""TRL's [`~trl.ScriptArguments`], and what the dataset's columns are called where DPO's names do not fit."""

    prompt_column: str | None = _column("prompt", "prompt")
    chosen_column: str | None = _column("better answer", "chosen")
    rejected_column: str | None = _column("worse answer", "rejected")


def splits(script_args: NSPO2ScriptArguments, args: NSPO2DPOConfig, mixture: DatasetMixtureConfig) -> tuple:
    """Train and evaluation set; without a test split some of the training rows are held out.

    Raises:
        ValueError, FileNotFoundError: there is no such dataset or split, or DPO cannot use a row of it.
    """
    if mixture.datasets:
        data, name = get_dataset(mixture), "the mixture"
    else:
        assert script_args.dataset_name is not None  # `parse` asks for it
        name = script_args.dataset_name
        data = load(name, script_args.dataset_config, script_args.dataset_streaming)
    train_name, test_name = script_args.dataset_train_split, script_args.dataset_test_split
    if train_name not in data:
        raise ValueError(f"`dataset_train_split` is {train_name!r}, but the dataset has {', '.join(data)}.")
    wanted = [train_name] + [test_name] * (args.eval_strategy != "no" and test_name in data)
    data = {split: rename_columns(data[split], script_args) for split in wanted}
    for split in wanted:
        check_rows(data[split], f"{name}, split {split}", progress=args.process_index == 0)
    if args.eval_strategy == "no":
        return data[train_name], None
    if test_name in data:
        return data[train_name], data[test_name]
    if isinstance(data[train_name], IterableDataset):
        raise ValueError(
            f"The dataset has no split {test_name!r}: set `dataset_test_split`, or `eval_strategy: 'no'`."
        )
    if len(data[train_name]) < 2:
        raise ValueError(f"{name} has one row, none can be held out: add rows, or set `eval_strategy: 'no'`.")
    halves = data[train_name].train_test_split(HELD_OUT, seed=args.seed)
    if args.process_index == 0:
        print(f"No split {test_name!r}: {len(halves['test'])} of {len(data[train_name])} rows are held out.")
    return halves["train"], halves["test"]


def rename_columns(dataset: Dataset | IterableDataset, script_args: NSPO2ScriptArguments) -> Dataset | IterableDataset:
    """The dataset with the columns that `prompt_column`, `chosen_column`, `rejected_column` name under DPO's names.

    Raises:
        ValueError: there is no such column.
    """
    wanted = {getattr(script_args, f"{target}_column"): target for target in ("prompt", "chosen", "rejected")}
    wanted = {source: target for source, target in wanted.items() if source is not None}
    if not wanted:
        return dataset
    names = dataset.column_names or list(next(iter(dataset)))  # a stream may not know them
    for source, target in wanted.items():
        if source not in names:
            raise ValueError(
                f"`{target}_column`: the dataset has no column {source!r}, it has {', '.join(names)}."
                f"{nearest(source, names)}"
            )
    in_the_way = [target for target in wanted.values() if target in names and target not in wanted]
    moved = {source: target for source, target in wanted.items() if source != target}
    # by way of names that nothing has, since two columns may change places
    dataset = dataset.remove_columns(in_the_way).rename_columns({name: f"{name} " for name in moved})
    return dataset.rename_columns({f"{name} ": target for name, target in moved.items()})


def check_rows(dataset: Dataset | IterableDataset, name: str, progress: bool = False) -> None:
    """Look at every row, of a stream only at the first, and refuse the first one that DPO cannot use.

    Raises:
        ValueError: a text is missing or empty, or text and messages are mixed; the message has the row's number.
    """
    first = check_preferences(dataset, name)
    columns = [column for column in ("prompt", "chosen", "rejected") if column in first]
    if "chosen" not in columns:  # tokenized already
        return
    batches: Iterable = [{column: [value] for column, value in first.items()}]
    if isinstance(dataset, Dataset):
        parts, number = dataset.select_columns(columns).iter(ROWS_AT_ONCE), -(-len(dataset) // ROWS_AT_ONCE)
        batches = tqdm(parts, "Checking rows", number, leave=False, delay=2, disable=not progress)
    number = same = 0
    for batch in batches:
        for values in zip(*(batch[column] for column in columns)):
            row = dict(zip(columns, values))
            if fault := _fault(row):
                raise ValueError(f"The dataset `{name}`, row {number} (the first is 0): {fault}.")
            number += 1
            same += row["chosen"] == row["rejected"]
    if same and progress:
        print(f"{name}: in {same} of {number} rows `chosen` and `rejected` are the same; they teach nothing.")


def _fault(row: Mapping) -> str | None:
    """What is wrong with one row, or None."""
    kinds = {}
    for column, value in row.items():
        if value is None:
            return f"`{column}` is missing"
        if not isinstance(value, (str, list)):
            return f"`{column}` is {type(value).__name__}, it must be text or a list of messages"
        if not value and not (column == "prompt" and isinstance(value, str)):
            return f"`{column}` is empty"
        kinds[column] = "text" if isinstance(value, str) else "messages"
        for message in value if isinstance(value, list) else ():
            if not isinstance(message, Mapping) or not message.get("role"):
                return f"`{column}` has a message without `role`: messages are {{'role': …, 'content': …}}"
            if message.get("content") is None and not message.get("tool_calls"):
                return f"`{column}` has a message without `content`"
    if len(set(kinds.values())) > 1:
        return ", ".join(f"`{column}` is {kind}" for column, kind in kinds.items()) + ": make them all the same"
    return None
