"""Train a LoRA adapter with DPO and NSPO2 from a recipe.

    accelerate launch scripts/train.py --config recipes/quickstart/dpo.yaml [--any_field value]

Every field of NSPO2ScriptArguments, TRL's ModelConfig, DatasetMixtureConfig and of NSPO2DPOConfig may stand in the
YAML file or on the command line, which wins. `--nspo2_enabled false` is plain DPO from the same recipe.
`--resume_from_checkpoint true` goes on from the last checkpoint in `output_dir`.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import HfArgumentParser, ProgressCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    RichProgressCallback,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from .card import FIGURES, means
from .checkpoints import CheckpointError, is_whole, last_checkpoint
from .data import NSPO2ScriptArguments, nearest, splits
from .dpo_config import NSPO2DPOConfig
from .trainer import NSPO2DPOTrainer

# ---- arguments ----


HELP = """Train a LoRA adapter with DPO and NSPO2 from a recipe:

  {prog} --config recipes/quickstart/dpo.yaml
  {prog} --config RECIPE.yaml --model_name_or_path MODEL --dataset_name PAIRS.jsonl --output_dir out/mine
  {prog} --config RECIPE.yaml --resume_from_checkpoint true      go on after an interruption
  {prog} --config RECIPE.yaml --nspo2_enabled false              plain DPO from the same recipe

Every option may stand in the YAML file or here, and what stands here wins. Shown are the most used ones and all of
NSPO2; `--help_all` shows every option of TRL's DPOConfig, ModelConfig and DatasetMixtureConfig too.{launch}"""
LAUNCH = """

Several processes: `--num_processes N`, and `--accelerate_config FILE` for one of recipes/accelerate_configs/*.yaml
or your own. With several GPUs and neither, all GPUs are used as `accelerate launch` does."""
SHOWN = """model_name_or_path dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
    prompt_column chosen_column rejected_column output_dir learning_rate beta loss_type max_length max_steps
    num_train_epochs per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type warmup_steps
    eval_strategy eval_steps logging_steps report_to save_steps save_total_limit resume_from_checkpoint
    precompute_ref_log_probs bf16 gradient_checkpointing use_cpu seed push_to_hub hub_model_id
    use_peft lora_r lora_alpha lora_dropout lora_target_modules load_in_4bit dtype attn_implementation""".split()


def make_parser() -> TrlParser:
    return TrlParser((NSPO2ScriptArguments, NSPO2DPOConfig, ModelConfig, DatasetMixtureConfig))


def show_help(prog: str, everything: bool) -> None:
    """Print the options: those that people set, or all of them."""
    parser = make_parser()
    launch = LAUNCH if prog == "nspo2 train" else ""
    parser.prog, parser.usage = prog, f"{prog} --config RECIPE.yaml [--option value ...]"
    parser.description = HELP.format(prog=prog, launch=launch)
    parser.formatter_class = _HelpFormatter
    for action in parser._actions:
        wanted = everything or action.dest in SHOWN or action.dest.startswith("nspo2_")
        # each option has a twin with hyphens, and each true one a twin with `--no_`
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        if action.dest == "help" or not wanted or any(f.startswith("--no_") for f in action.option_strings):
            action.help = SUPPRESS
    parser.print_help()


class _HelpFormatter(RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help + ("" if action.default is None else " (default: %(default)s)")


def parse(argv: list[str]) -> tuple:
    """NSPO2ScriptArguments, NSPO2DPOConfig, ModelConfig, DatasetMixtureConfig from `argv`.

    Raises:
        ValueError: a key of the YAML file that no field has, or a bad value.
        FileNotFoundError: the YAML file is missing.
    """
    parser = make_parser()
    parser.error = _raise  # one sentence, not pages of usage
    if not argv:
        raise ValueError("Nothing to train: give `--config RECIPE.yaml`, such as recipes/quickstart/dpo.yaml.")
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv:
        path = Path((argv + [""])[argv.index("--config") + 1])
        if not path.is_file():
            raise FileNotFoundError(f"`--config`: there is no recipe {str(path)!r}.")
        _check_keys(path, parser)
    known = [option for action in parser._actions for option in action.option_strings]
    for arg in argv:
        flag = arg.split("=")[0]
        if flag.startswith("--") and flag != "--config" and not any(option.startswith(flag) for option in known):
            raise ValueError(f"There is no option `{flag}`.{nearest(flag, known)}")
    script_args, args, model_args, mixture = parser.parse_args_and_config(argv)
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: set it to a hub id or a local folder.")
    model = model_args.model_name_or_path
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise FileNotFoundError(f"`model_name_or_path`: there is no folder {model!r}.")
    if args.world_size < int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError("Several processes were launched, but each would train for itself: add `--use_cpu true`.")
    if Path(args.output_dir).is_file():
        raise ValueError(f"`output_dir` {args.output_dir!r} is a file: choose a folder, it will be made.")
    if script_args.dataset_name is None and not mixture.datasets:
        raise ValueError("`dataset_name` is missing: set it to a hub id, a local folder or a .jsonl or .parquet file.")
    return script_args, args, model_args, mixture


def _check_keys(path: Path, parser: HfArgumentParser) -> None:
    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {str(path)!r} must be a YAML mapping of option names to values.")
    known = [action.dest for action in parser._actions] + ["env"]
    for key in recipe:
        if key not in known:
            raise ValueError(f"The recipe {str(path)!r} sets `{key}`, which is no option.{nearest(str(key), known)}")


def _raise(message: str) -> None:
    raise ValueError(message)


def checkpoint_to_resume(args: NSPO2DPOConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `true` for the last one in `output_dir`."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no"):
        return None
    if str(wanted).lower() not in ("true", "yes", "last"):
        if not Path(wanted).is_dir():
            raise ValueError(f"`resume_from_checkpoint`: there is no folder {wanted!r}.")
        if not is_whole(wanted):
            raise ValueError(
                f"`resume_from_checkpoint`: {wanted!r} was saved only in part, it has no readable trainer_state.json: "
                "name an earlier one, or set `true` for the last whole one."
            )
        return wanted
    found = last_checkpoint(args.output_dir)
    if found is None:
        raise ValueError(
            f"`resume_from_checkpoint` is set, but {args.output_dir!r} has no checkpoint: leave it out to start anew."
        )
    return found


# ---- the run ----


def build(script_args, args, model_args, mixture) -> NSPO2DPOTrainer:
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns about it
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = splits(script_args, args, mixture)
    trainer = NSPO2DPOTrainer(
        model_args.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    for name, dataset in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError(
                f"No row of the {name} set is left: each prompt alone has `max_length` ({args.max_length}) tokens or "
                "more. Raise `max_length`."
            )
    return trainer


def report(trainer: NSPO2DPOTrainer) -> None:
    """The table at the end: what was measured in this run, before and after."""
    history, console = trainer.state.log_history, Console()
    evals = [entry for entry in history if "eval_loss" in entry]
    if evals:
        size = len(trainer.eval_dataset) if hasattr(trainer.eval_dataset, "__len__") else "some"
        table = Table(title=f"{size} held-out pairs, {trainer.state.global_step} steps")
        for column in ("", "before", "after"):
            table.add_column(column, justify="right" if column else "left")
        for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen"):
            key = f"eval_{name}"
            table.add_row(name, *(f"{entry[key]:.4f}" if key in entry else "-" for entry in (evals[0], evals[-1])))
        console.print(table)
        if evals[0]["step"] == 0:
            print("Before training the policy is the reference: margins are 0, and ties count as wrong.")
    figures = means(history)
    if figures:
        table = Table(title="NSPO2, mean of what was logged")
        table.add_column("")
        table.add_column("", justify="right")
        table.add_column("")
        for name, value in figures.items():
            table.add_row(f"nspo2/{name}", f"{value:.4g}", FIGURES[name])
        table.add_row("nspo2/skipped_steps", str(trainer.nspo2.skipped_steps), "with bad numbers")
        table.add_row("state", f"{trainer.nspo2.state_bytes / 2**20:.1f} MiB", "memory")
        console.print(table)
        if not figures.get("active") and trainer.args.nspo2_projection_rank > 0:
            print(
                f"NSPO2 projected nothing: the first basis comes after {trainer.args.nspo2_update_freq} steps "
                "(`nspo2_update_freq`), and the first log after that shows it."
            )
    print(f"Adapter: {trainer.args.output_dir}")
    print(f"All logged figures: {os.path.join(trainer.args.output_dir, 'trainer_state.json')}")


def main(argv: list[str] | None = None, prog: str = "scripts/train.py") -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "--help_all"} & set(argv):
        return show_help(prog, everything="--help_all" in argv)
    # TRL and Transformers call their own deprecated names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        script_args, args, model_args, mixture = parse(argv)
        checkpoint = checkpoint_to_resume(args)
        args.eval_on_start = args.eval_on_start or (args.eval_strategy != "no" and checkpoint is None)
        trainer = build(script_args, args, model_args, mixture)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    main_process = trainer.accelerator.is_main_process
    if main_process and sys.stdout.isatty() and not args.disable_tqdm:  # a live table; lines where nobody watches
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RichProgressCallback)
    if checkpoint is not None and main_process:
        print(f"Resuming from {checkpoint}.")
    elif main_process and last_checkpoint(args.output_dir):
        print(
            f"Starting anew, though {last_checkpoint(args.output_dir)} of an earlier run is there: it will be "
            "overwritten when this run comes to that step. To go on with it, stop now and add "
            "`--resume_from_checkpoint true`; to keep it, choose another `--output_dir`."
        )
    again = "add `--resume_from_checkpoint true` to the same command"
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        last = last_checkpoint(args.output_dir)
        hint = f"{again} to go on from {last}" if last else "there is no checkpoint yet"
        # below the progress bar, and once
        sys.exit(f"\nInterrupted after step {trainer.state.global_step}: {hint}." if main_process else 130)
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    dataset = script_args.dataset_name if not Path(script_args.dataset_name or ".").exists() else None
    try:
        trainer.save_model()
        evaluated = any(
            "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
        )
        if args.eval_strategy != "no" and not evaluated:
            trainer.evaluate()
        trainer.save_state()
        trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=dataset)
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: the trained adapter could not be written ({error}): make room for it, then {again}.")
    if main_process:
        report(trainer)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset)
    trainer.end()


if __name__ == "__main__":
    main(prog="nspo2 train")
