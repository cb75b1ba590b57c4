"""Setups and data that NSPO2 cannot work with are refused before training, each with what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import DPOConfig, KTOConfig

from .optimizer import NSPO2Optimizer

logger = logging.getLogger(__name__)


def refuse_unsupported(accelerator: Accelerator) -> None:
    """Raise `ValueError` for a kind of launch that is not supported, and warn of one that spoils preference losses."""
    kind = accelerator.distributed_type
    use = "Launch with DDP instead: `accelerate launch --multi_gpu ...`, or set `nspo2_enabled=False`."
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "NSPO2 does not support FSDP1, which flattens parameters together: set `fsdp_version: 2` in the "
            f"Accelerate config. {use}"
        )
    if kind == DistributedType.FSDP and isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "NSPO2 does not support FSDP2's offloading to the CPU: set `fsdp_offload_params: false` in the Accelerate "
            f"config. {use}"
        )
    if kind.value not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED"):
        raise ValueError(f"NSPO2 does not support the distributed type {kind.value}. {use}")
    plan = accelerator.parallelism_config
    if plan is not None and (plan.tp_enabled or plan.cp_enabled or plan.sp_enabled):
        raise ValueError(f"NSPO2 does not support tensor, context or sequence parallelism. {use}")
    if accelerator.device.type == "mps":
        raise ValueError("NSPO2 needs float64 for its small matrices, which MPS does not have: set `use_cpu=True`.")
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        logger.warning(
            "FSDP2 with mixed precision rounds what the model returns, the log-probabilities too; that is too "
            "coarse for preference losses, with plain TRL as well. Set `bf16: false` and `dtype: bfloat16` in the "
            "recipe and `mixed_precision: 'no'` in the Accelerate config: the base model stays in bfloat16."
        )


def say_what_is_plain(model: nn.Module, outside: Iterable[nn.Parameter]) -> None:
    """Warn of trained parameters in no block, `outside`, but for those that a LoRA config names itself."""
    ids = {id(param) for param in outside}
    named = {"modules_to_save", "trainable_tokens_delta", "bias"}
    names = [name for name, p in model.named_parameters() if id(p) in ids and not named & set(name.split("."))]
    if names:
        logger.warning(
            "NSPO2 does not filter %d trained parameters that are in no adapter of a module, %s among them: they are "
            "trained as without it.",
            *(len(names), names[0]),
        )


def refuse_arguments(args: Any) -> None:
    """Raise `ValueError` for arguments that train nothing, or another thing than they say."""
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            "`max_steps` is 0, or -1 with no `num_train_epochs`: there is nothing to train; set one of them above 0."
        )
    if args.gradient_accumulation_steps < 1:
        raise ValueError(f"`gradient_accumulation_steps` must be at least 1, got {args.gradient_accumulation_steps}.")
    without = isinstance(args, DPOConfig) and set(args.loss_type) <= {"sft"}
    if isinstance(args, (DPOConfig, KTOConfig)) and not args.beta > 0 and not without:
        raise ValueError(
            f"`beta` must be above 0, got {args.beta}: at 0 the loss teaches nothing, below it the rejected answers."
        )


def warn_of_unmatched(model: Any) -> None:
    """Say which modules the LoRA config names that the model does not have; PEFT passes over them."""
    modules = [name for name, _ in model.named_modules()]
    for adapter in getattr(model, "active_adapters", []):
        for option in ("target_modules", "modules_to_save"):
            wanted = getattr(model.peft_config[adapter], option, None) or ()
            names = [] if isinstance(wanted, str) else sorted(wanted)
            missing = [name for name in names if not any(f".{module}".endswith(f".{name}") for module in modules)]
            if missing:
                words = " and ".join(map(repr, missing))
                logger.warning("`%s` has %s, which no module of the model is called: not trained.", option, words)


def refuse_optimizer(args: Any, optimizer: Any = None) -> None:
    """Raise `ValueError` for an optimizer that filters by itself, or that steps inside the backward pass.

    Args:
        optimizer: None where it is not made yet; one that others wrap is found by their attribute `optimizer`.
    """
    if optimizer is None and ("layerwise" in args.optim or "lomo" in args.optim):
        raise ValueError(STEPS_IN_BACKWARD.format(name=f"`optim='{getattr(args.optim, 'value', args.optim)}'`"))
    while optimizer is not None:
        if isinstance(optimizer, NSPO2Optimizer):
            raise ValueError(
                "The optimizer is an NSPO2Optimizer, so that each gradient would be filtered twice: give the trainer "
                "the plain optimizer, or set `nspo2_enabled=False`."
            )
        if isinstance(optimizer, LayerWiseDummyOptimizer):
            raise ValueError(STEPS_IN_BACKWARD.format(name="The optimizer"))
        optimizer = getattr(optimizer, "optimizer", None)


STEPS_IN_BACKWARD = (
    "{name} steps inside the backward pass, before NSPO2 can filter the gradient: take one that steps after it, such "
    "as `optim='adamw_torch'`, or set `nspo2_enabled=False`."
)


def check_preferences(dataset: Dataset | IterableDataset, name: str = "train_dataset") -> dict:
    """The first row; raises `ValueError` where the dataset is empty, or has no `chosen` and `rejected`."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The dataset `{name}` is empty: DPO needs rows with `chosen` and `rejected`.")
    check_columns(first, name)
    return first


def check_nothing_missing(dataset: Dataset, name: str = "train_dataset") -> None:
    """Raises `ValueError` for the first row without `chosen` or `rejected`."""
    columns = [column for column in ("chosen", "rejected") if column in dataset.column_names]
    start = 0
    if columns:
        for batch in dataset.select_columns(columns).with_format("arrow").iter(1000):
            for column in columns:
                if batch[column].null_count:
                    row = start + batch[column].is_null().to_pylist().index(True)
                    raise ValueError(f"Row {row + 1} of `{name}` (the first is 1) has no `{column}`: leave it out.")
            start += len(batch)


def check_columns(found: Iterable[str], name: str = "train_dataset") -> None:
    """Raises `ValueError` where `found`, the columns of the dataset `name`, are not those of preference pairs."""
    names = list(found)
    missing = [f"`{column}`" for column in ("chosen", "rejected") if column not in names]
    if missing and "chosen_ids" not in names:
        raise ValueError(
            f"The dataset `{name}` has no column {' and '.join(missing)}, it has {', '.join(names)}. DPO needs pairs: "
            "`chosen` and `rejected`, and perhaps `prompt`; where they are called otherwise, rename them, or with "
            "`nspo2 train` set `chosen_column`, `rejected_column`, `prompt_column`."
        )


def checked_stream(dataset: IterableDataset) -> IterableDataset:
    """The same rows, each looked at when it is read where its columns are not known: it may be read only once.

    Raises `ValueError` as [`check_columns`].
    """
    if dataset.column_names is not None:
        check_columns(dataset.column_names)
        return dataset

    def look(row: dict) -> dict:
        check_columns(row)
        return row

    return dataset.map(look)


def lost_rows(name: str, given: Any, kept: Any, max_length: int | None) -> str | None:
    """How many rows of `given` are not in `kept`, and the first of them; None where there is none, or of streams.

    TRL drops them without a word, since their prompts alone fill `max_length`.

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
