"""What can be refused before anything is loaded: values out of range, folders, packages, a hub that is not there."""

from __future__ import annotations

import inspect
import os
from dataclasses import Field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import DatasetMixtureConfig, ModelConfig

from ..rows import check, is_int, is_number, option, whole
from ..training.checkpoints import first_line
from ..training.options import NSPO2DPOConfig
from ..training.refusals import refuse_arguments
from .data import NSPO2ScriptArguments
from .shapes import no_template
from .words import nearest

LOSS_TYPES = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down
    discopop sft sigmoid_norm""".split()
# what torch's `checkpoint` takes; the last one it reads out of its `kwargs`
CHECKPOINTING = sorted(
    {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
)
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
_NOT_NEGATIVE = option(None, lambda v: is_number(v) and v >= 0, "a number of at least 0", "")
_WHOLE = whole(1, "", least=1)
RANGES: dict[str, Field] = {
    **dict.fromkeys(("learning_rate", "beta", "weight_decay", "warmup_steps", "max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps"), _NOT_NEGATIVE),
    "lora_dropout": option(None, lambda v: is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1", ""),
    # at 0.5 both answers are as good, above it the rejected one is better
    "label_smoothing": option(None, lambda v: is_number(v) and 0 <= v < 0.5, "a number from 0 to below 0.5", ""),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "lora_r", "lora_alpha"), _WHOLE),
    "gradient_accumulation_steps": _WHOLE,
    "max_length": option(
        None, lambda v: v is None or is_int(v) and v > 0, "a whole number of at least 1, or null", ""
    ),
    "max_steps": option(-1, lambda v: is_int(v) and v > 0 or v == -1, "a whole number of at least 1, or -1", ""),
    "f_divergence_type": option(None, lambda v: v in DIVERGENCES, f"one of {', '.join(DIVERGENCES)}", ""),
}
# options that may ask for a package
ASK = "optim attn_implementation load_in_4bit load_in_8bit use_liger_kernel deepspeed fsdp torch_compile".split()


def check_values(
    script_args: NSPO2ScriptArguments, args: NSPO2DPOConfig, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> None:
    """Raises `ValueError` or `FileNotFoundError` for the first option with a value that cannot work."""
    model = model_args.model_name_or_path
    if not model:
        raise ValueError("`model_name_or_path` is missing: set it to a hub id or a local folder.")
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise FileNotFoundError(f"`model_name_or_path`: there is no folder {model!r}.")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        only = (Path(model) / "adapter_config.json").is_file()
        words = "holds an adapter: name the model that it was trained on" if only else "has no config.json"
        raise ValueError(f"`model_name_or_path`: the folder {model!r} {words}.")
    if args.world_size < int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError("Several processes were launched, but each would train for itself: add `--use_cpu true`.")
    check_output_dir(args.output_dir)
    for name, row in RANGES.items():
        check(row, name, getattr(args, name, getattr(model_args, name, None)))
    refuse_arguments(args)
    if args.optim_args and not all(pair.count("=") == 1 for pair in args.optim_args.split(",")):
        raise ValueError(f"`optim_args` must be key=value, separated by commas, got {args.optim_args!r}.")
    for key in args.gradient_checkpointing_kwargs or {}:
        if key not in CHECKPOINTING:
            raise ValueError(f"`gradient_checkpointing_kwargs`: {key!r} is none of {', '.join(CHECKPOINTING)}.")
    for kind in args.loss_type:
        if kind not in LOSS_TYPES:
            raise ValueError(f"`loss_type`: {kind!r} is none of {', '.join(LOSS_TYPES)}.{nearest(kind, LOSS_TYPES)}")
    if not script_args.dataset_name and not mixture.datasets:
        raise ValueError("`dataset_name` is missing: set it to a hub id, a local folder or a .jsonl or .parquet file.")


def check_output_dir(output_dir: str | None) -> None:
    """Raises `ValueError` where the folder cannot be made or written to."""
    out = Path(str(output_dir))
    if not str(output_dir or "").strip():
        raise ValueError("`output_dir` is empty: name a folder, it will be made.")
    if out.is_file():
        raise ValueError(f"`output_dir` {str(out)!r} is a file: choose a folder, it will be made.")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        raise ValueError(f"`output_dir` {str(out)!r} cannot be made in {str(there)!r}: choose another folder.")


def check_packages(args: NSPO2DPOConfig, model_args: ModelConfig) -> None:
    """Raises `ValueError` where trackers, optimizer, schedule or hub are not to be had."""
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"`report_to`: {name!r} is none of {', '.join(known)}, all, none.{nearest(name, known)}")
        # it finds the others of these by other ways
        if name not in (*get_available_reporting_integrations(), "azure_ml", "flyte"):
            raise ValueError(f"`report_to`: {name} is not installed: `pip install {name}`, or set `report_to: none`.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise clearer(error, args, model_args) from error
    except ValueError:  # it may ask for the model, which is loaded later
        pass
    check_schedule(args)
    if args.push_to_hub:
        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as error:  # of the client's library, the network or the hub
            raise ValueError(
                f"`push_to_hub`: the hub does not answer, or does not know you ({first_line(error)}): log in with "
                "`hf auth login`, or leave `push_to_hub` out."
            ) from error


def check_schedule(args: NSPO2DPOConfig) -> None:
    """Raises `ValueError` where `lr_scheduler_kwargs` are not those of `lr_scheduler_type`."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        given = f"`lr_scheduler_kwargs` {args.lr_scheduler_kwargs} for `lr_scheduler_type: {kind}`"
        raise ValueError(f"{given}: {first_line(error).rstrip('.')}.") from error


class CheckBestMetric(TrainerCallback):
    """Raises `ValueError` where `metric_for_best_model` is none of what the evaluation before step 1 gives."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        known = [key.removeprefix("eval_") for key in metrics or {}]
        if metrics and state.global_step == 0 and name not in known:
            raise ValueError(f"`metric_for_best_model`: {name!r} is none of {', '.join(known)}.{nearest(name, known)}")


def clearer(error: Exception, args: NSPO2DPOConfig, model_args: ModelConfig) -> Exception:
    """The same with the option that asks for a package or a chat template that is not there."""
    if "chat_template" in str(error):
        return no_template(str(model_args.model_name_or_path))
    if not isinstance(error, ImportError):
        return error
    asked = [
        f"`{name}`"
        for of in (args, model_args)
        for name, field in of.__dataclass_fields__.items()
        if name in ASK and getattr(of, name) and getattr(of, name) != field.default
    ]
    words = f"{', '.join(asked)}: {first_line(error).rstrip('.')}." if asked else f"{first_line(error).rstrip('.')}."
    return ValueError(f"{words} Install what is missing, or leave the option out.")
