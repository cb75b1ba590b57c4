"""Preference pairs for `nspo2 train`: where they come from, which are held out, which `max_length` leaves out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..training.loading import load
from ..training.options import NSPO2DPOConfig
from .shapes import COLUMNS, ROWS_AT_ONCE, settle

HELD_OUT = 0.05  # share of the data that is held out where it has no test split


def _column(what: str, name: str) -> Any:
    words = f"Column that holds the {what}, where it is not called `{name}`."
    return field(default=None, metadata={"help": words})


@dataclass
class NSPO2ScriptArguments(ScriptArguments):
    r"""TRL's [`~trl.ScriptArguments`], and what the dataset's columns are called where DPO's names do not fit."""

    prompt_column: str | None = _column("prompt", "prompt")
    chosen_column: str | None = _column("better answer", "chosen")
    rejected_column: str | None = _column("worse answer", "rejected")
    allow_dropped_rows: bool = field(
        default=False,
        metadata={
            "help": "Train even where `max_length` leaves out more than half of the rows, whose prompts are too long."
        },
    )


def splits(script_args: NSPO2ScriptArguments, args: NSPO2DPOConfig, mixture: DatasetMixtureConfig) -> tuple:
    """Train and evaluation set; without a test split some of the training rows are held out.

    Raises:
        ValueError, FileNotFoundError: there is no such dataset or split, or DPO cannot use a row of it.
    """
    if mixture.datasets:
        try:
            data, name = get_dataset(mixture), "the mixture"
        except DatasetGenerationError as error:
            raise ValueError(f"`datasets`: a part of the mixture could not be read: {error.__cause__}.") from error
    else:
        assert script_args.dataset_name is not None  # `parse` asks for it
        name = script_args.dataset_name
        data = load(name, script_args.dataset_config, script_args.dataset_streaming)
    train_name, test_name = script_args.dataset_train_split, script_args.dataset_test_split
    if train_name not in data:
        raise ValueError(f"`dataset_train_split` is {train_name!r}, but the dataset has {', '.join(data)}.")
    if train_name == test_name and args.eval_strategy != "no":
        raise ValueError(
            f"`dataset_test_split` is {test_name!r}, which is trained on: name another split, or set "
            "`eval_strategy: 'no'`."
        )
    wanted = [train_name] + [test_name] * (args.eval_strategy != "no" and test_name in data)
    named = {column: getattr(script_args, f"{column}_column") for column in COLUMNS}
    data = {split: settle(data[split], f"{name}, split {split}", named, args.process_index == 0) for split in wanted}
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


def tell_of_long_rows(dataset: Any, args: NSPO2DPOConfig) -> None:
    """Say how many pairs `max_length` cuts: what is cut off teaches nothing."""
    if args.max_length is None or not isinstance(dataset, Dataset) or "prompt_ids" not in dataset.column_names:
        return
    cut = 0
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    for batch in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
        prompt, chosen, rejected = (pc.list_value_length(batch[column]) for column in columns)
        longest = pc.add(prompt, pc.max_element_wise(chosen, rejected))
        cut += pc.sum(pc.greater(longest, args.max_length)).as_py() or 0
    if cut and args.process_index == 0:
        print(f"{cut} of {len(dataset)} training pairs are longer than `max_length` ({args.max_length}) and are cut.")


def refuse_to_lose_most(given: Any, kept: Any, allowed: bool) -> None:
    """Raises `ValueError` where TRL has left out more than half of the training rows `given`, and not `allowed`."""
    if isinstance(given, Dataset) and isinstance(kept, Dataset) and 2 * len(kept) < len(given) and not allowed:
        raise ValueError(
            f"{len(given) - len(kept)} of {len(given)} training rows are left out, more than half. Raise "
            "`max_length`, or go on with `--allow_dropped_rows true`."
        )
