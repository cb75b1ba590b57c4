"""What `nspo2 train` is told: its help, the recipe and the command line, each mistake refused in a sentence."""

from __future__ import annotations

import json
import os
import re
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NoReturn

from trl import ModelConfig

from ..config import refuse_removed
from ..training.checkpoints import first_line, last_whole, refuse_half, refuse_trained
from ..training.options import NSPO2DPOConfig
from .checks import check_values
from .recipe import TAKES, make_parser, mapping, read_recipe
from .words import apart, refuse_unknown, spell_out, with_config

RETAIN, NONE = "--nspo2_retain_dataset", ("", "none", "null", "no", "false")  # the recipe's texts are left out
HELP = """Train a LoRA adapter with DPO and NSPO2 from a recipe:

  {prog} recipes/quickstart/dpo.yaml
  {prog} RECIPE.yaml --model_name_or_path MODEL --dataset_name PAIRS.jsonl --output_dir out/mine
  {prog} RECIPE.yaml --resume_from_checkpoint true      go on after an interruption
  {prog} RECIPE.yaml --nspo2_enabled false              plain DPO from the same recipe

`--config RECIPE.yaml` says the same. Every option may stand in the YAML file or here, and what stands here wins; a
list is `--loss_type sft sigmoid` here. Shown are the most used ones and all of NSPO2; `--help_all` shows every option
of TRL's DPOConfig, ModelConfig and DatasetMixtureConfig too.{launch}"""
LAUNCH = """

Several processes: `--num_processes N`, and `--accelerate_config FILE` for one of recipes/accelerate_configs/*.yaml
or your own. With several GPUs and neither, all GPUs are used as `accelerate launch` does."""
SHOWN = """model_name_or_path dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
    prompt_column chosen_column rejected_column allow_dropped_rows output_dir learning_rate beta loss_type max_length
    max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type warmup_steps
    eval_strategy eval_steps logging_steps report_to save_steps save_total_limit resume_from_checkpoint
    precompute_ref_log_probs bf16 gradient_checkpointing use_cpu seed push_to_hub hub_model_id
    use_peft lora_r lora_alpha lora_dropout lora_target_modules load_in_4bit dtype attn_implementation""".split()
CLEARER = {
    "resume_from_checkpoint": "`true` for the last whole checkpoint in `output_dir`, or the folder of one.",
    "dataset_name": "Hub id, folder, or a .jsonl(.gz), .json, .parquet or .csv file.",
}


def show_help(prog: str, everything: bool) -> None:
    """Print the options: those that people set, or all of them."""
    parser = make_parser()
    launch = LAUNCH if prog == "nspo2 train" else ""
    parser.prog, parser.usage = prog, f"{prog} RECIPE.yaml [--option value ...]"
    parser.description = HELP.format(prog=prog, launch=launch)
    parser.formatter_class = _HelpFormatter
    for action in parser._actions:
        action.help = CLEARER.get(action.dest, action.help)
        wanted = everything or action.dest in SHOWN or action.dest.startswith("nspo2_")
        # each option has a twin with hyphens, and each true one a twin with `--no_`
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        if action.dest == "help" or not wanted or any(f.startswith("--no_") for f in action.option_strings):
            action.help = SUPPRESS
    parser.print_help()


class _HelpFormatter(RawDescriptionHelpFormatter):
    def _get_help_string(self, action: Action) -> str:
        return (action.help or "") + ("" if action.default is None else " (default: %(default)s)")


def parse(argv: list[str]) -> tuple:
    """NSPO2ScriptArguments, NSPO2DPOConfig, ModelConfig, DatasetMixtureConfig from `argv`.

    Raises:
        ValueError: a key of the YAML file that no field has, or a bad value.
        FileNotFoundError: the YAML file is missing.
    """

    def refuse(message: str) -> NoReturn:  # in one sentence, without pages of usage
        raise ValueError(message)

    parser = make_parser()
    parser.error = refuse  # type: ignore[method-assign]
    if not argv:
        raise ValueError("Nothing to train: give `--config RECIPE.yaml`, such as recipes/quickstart/dpo.yaml.")
    argv = with_config(argv)
    if "--config" in argv:
        at = argv.index("--config")
        path = Path((argv + [""])[at + 1])
        if at + 1 == len(argv) or argv.count("--config") > 1:
            raise ValueError("`--config` takes one recipe, such as recipes/quickstart/dpo.yaml.")
        if not path.is_file():
            what = "is a folder, not a recipe" if path.is_dir() else "there is no such recipe"
            raise FileNotFoundError(f"`--config` {str(path)!r}: {what}.")
        recipe = read_recipe(path, parser)
        os.environ |= {name: str(value) for name, value in recipe.pop("env", {}).items()}
        parser.set_defaults_with_config(**recipe)
        del argv[at : at + 2]
    options = {option: action.dest for action in parser._actions for option in action.option_strings}
    mappings = {option: name for option, name in options.items() if dict in TAKES.get(name, ())}
    argv = apart(argv, [RETAIN, *mappings])
    off = next((i for i, pair in enumerate(zip(argv, argv[1:])) if pair[0] == RETAIN and pair[1].lower() in NONE), -1)
    if off >= 0:
        parser.set_defaults(nspo2_retain_dataset=None)
        del argv[off : off + 2]
    for arg, following in zip(argv, [*argv[1:], ""]):
        refuse_removed({arg.split("=")[0].removeprefix("--"): None}, prefix="nspo2_")
        refuse_unknown(arg, [*options])
        if arg in mappings:
            try:
                mapping(mappings[arg], following)
            except ValueError as error:
                raise ValueError(f"`{mappings[arg]}` must be {error}, got {following!r}.") from None
    lists = [option for action in parser._actions if action.nargs == "+" for option in action.option_strings]
    try:
        script_args, args, model_args, mixture = parser.parse_args_into_dataclasses(spell_out(argv, lists))
    except TypeError as error:  # of what is made of a mapping
        raise ValueError(f"`accelerator_config`: a mapping has a key that is none: {first_line(error)}.") from error
    except ValueError as error:
        if unknown := re.search(r"not used by the HfArgumentParser: (\[.*\])", str(error)):
            raise ValueError(f"{unknown[1]} belongs to no option: one recipe, and options with `--`.") from error
        if "bf16/gpu" not in str(error):
            raise
        raise ValueError(
            "`bf16`: there is no GPU here that can; on a CPU add `--use_cpu true --bf16 false`."
        ) from error
    check_values(script_args, args, model_args, mixture)
    if len(args.optim_target_modules or "") == 1:  # a pattern, or `all-linear`
        args.optim_target_modules = args.optim_target_modules[0]
    return script_args, args, model_args, mixture


def checkpoint_to_resume(args: NSPO2DPOConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `true` for the last one in `output_dir`."""
    found, half = last_whole(str(args.output_dir))
    wanted = str(args.resume_from_checkpoint or False)
    if wanted.lower() in ("false", "no"):
        if found is not None:
            raise ValueError(
                f"`output_dir`: {found!r} is of an earlier run. Add `--resume_from_checkpoint true` to go on with it, "
                "or choose another `--output_dir` to start anew."
            )
        refuse_trained(str(args.output_dir))
        return None
    if wanted.lower() not in ("true", "yes", "last"):
        if not Path(wanted).is_dir():
            raise ValueError(f"`resume_from_checkpoint`: there is no folder {wanted!r}.")
        refuse_half(wanted)
        if not list(Path(wanted).glob("rng_state*")):  # which each checkpoint has, and a finished run's folder not
            raise ValueError(
                f"`resume_from_checkpoint`: {wanted!r} has an adapter, but no optimizer to go on with: name a folder "
                "checkpoint-N, or set `true` for the last one in `output_dir`."
            )
        return wanted
    if found is None:
        lacks = f"whole checkpoint: {half}" if half else "checkpoint"
        raise ValueError(
            f"`resume_from_checkpoint` is set, but {args.output_dir!r} has no {lacks}. To start anew, leave it "
            "out, and choose another `--output_dir` if this one holds an adapter."
        )
    return found


def check_adapter(checkpoint: str, model_args: ModelConfig) -> None:
    """Refuse to resume an adapter of another rank, whose weights would not fit."""
    path = Path(checkpoint) / "adapter_config.json"
    rank = json.loads(path.read_text())["r"] if path.is_file() else model_args.lora_r
    if rank != model_args.lora_r:
        raise ValueError(
            f"`lora_r` is {model_args.lora_r}, but the adapter in {checkpoint!r} has {rank}: set it to {rank}, or "
            "choose another `--output_dir` to start anew."
        )
