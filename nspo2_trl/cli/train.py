"""Train a LoRA adapter with DPO and NSPO2 from a recipe.

    accelerate launch scripts/train.py --config recipes/quickstart/dpo.yaml [--any_field value]

The options are the fields of NSPO2ScriptArguments, NSPO2DPOConfig, and TRL's ModelConfig and DatasetMixtureConfig.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config

from ..training.card import means, measured
from ..training.checkpoints import CheckpointError, first_line, last_whole
from ..training.dpo import NSPO2DPOTrainer
from ..training.options import NSPO2DPOConfig
from ..training.resuming import refuse_other_adapter
from .arguments import check_adapter, checkpoint_to_resume, parse, show_help
from .checks import CheckBestMetric, check_packages, clearer
from .data import NSPO2ScriptArguments, refuse_to_lose_most, splits, tell_of_long_rows
from .endings import in_a_sentence, leave, refuse_diverged, refuse_no_step
from .lines import show_logs, stop
from .shapes import RowError
from .threads import few_threads

SHOWN_AT_THE_END = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "retain_kl", "retain_loss")


def build(
    script_args: NSPO2ScriptArguments, args: NSPO2DPOConfig, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> NSPO2DPOTrainer:
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns about it
    check_packages(args, model_args)
    model = model_args.model_name_or_path
    assert model is not None  # `parse` asks for it
    given = args.model_init_kwargs or {}
    assert isinstance(given, dict)  # of other values `parse` says so
    names = {"revision": "model_revision", "attn_implementation": "attn_implementation", "dtype": "dtype"}
    own = {name: getattr(model_args, option) for name, option in names.items()}
    args.model_init_kwargs = own | {"trust_remote_code": args.trust_remote_code} | given
    train_dataset, eval_dataset = splits(script_args, args, mixture)
    try:
        trainer = NSPO2DPOTrainer(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=lora_config(model_args),
        )
    except (ImportError, ValueError) as error:
        raise clearer(error, args, model_args) from error
    except TypeError as error:
        if not any(f"keyword argument '{name}'" in str(error) for name in given):
            raise
        raise ValueError(f"`model_init_kwargs`: {first_line(error)}.") from error
    except OSError as error:
        if os.path.isdir(model) or error.errno is not None:  # of the disk
            raise
        words = f"`model_name_or_path`: there is no folder {model!r}, and as a hub id it could not be loaded."
        raise OSError(f"{words} {error}") from error
    tell_of_long_rows(trainer.train_dataset, args)
    refuse_to_lose_most(train_dataset, trainer.train_dataset, script_args.allow_dropped_rows)
    return trainer


def lora_config(model_args: ModelConfig) -> PeftConfig | None:
    """TRL's, which takes the name of a single module for a pattern that whole paths must match."""
    found: Any = get_peft_config(model_args)
    target = getattr(found, "target_modules", None)
    if isinstance(target, str) and target.isidentifier():
        found.target_modules = {target}
    return found


def before_and_after(history: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """Held-out figures of a run: `before` training, `unprojected` at its end, `after` all; None where not measured."""
    ends = [i for i, entry in enumerate(history) if "nspo2/retain_kl_unprojected" in entry]
    trained, last = (history[: ends[-1]], history[ends[-1]]) if ends else (history, {})
    found: dict[str, dict[str, float | None]] = {}
    for name in SHOWN_AT_THE_END:
        key = f"eval_{name}"
        values = [entry[key] for entry in history if key in entry]
        if values:
            first = next((entry[key] for entry in trained if key in entry), None)
            at_end = [e[key] for e in trained if key in e and e["step"] == last.get("step")]
            unprojected = last.get(f"nspo2/{name}_unprojected", at_end[-1] if at_end else None)
            found[name] = {"before": first, "unprojected": unprojected, "after": values[-1]}
    return found


def report(trainer: NSPO2DPOTrainer) -> None:
    """The tables at the end: what was measured in this run, before and after."""
    history, console = trainer.state.log_history, Console()
    rows = before_and_after(history)
    if rows:
        size = len(trainer.eval_dataset) if isinstance(trainer.eval_dataset, Sized) else "some"
        projected = trainer.nspo2_retain_projected
        columns = ["before", *(["unprojected"] if projected else []), "after"]
        table = Table("", *columns, title=f"{size} held-out pairs, {trainer.state.global_step} steps")
        for name, row in rows.items():
            table.add_row(name, *("-" if (value := row[column]) is None else f"{value:.4f}" for column in columns))
        console.print(table)
        if trainer.nspo2_retained is not None:
            print("retain_kl and retain_loss (its rise): nats per token on held-out retained texts.")
        if projected:
            print("unprojected: the adapter as training left it, in unprojected/. after: the adapter that is saved.")
        if any(entry["step"] == 0 for entry in history if "eval_loss" in entry):
            print("Before training the policy is the reference: margins are 0, and ties count as wrong.")
    if figures := means(history):
        table = Table("", "", "", title="NSPO2, mean of what was logged")
        for cells in measured(trainer):
            table.add_row(*cells)
        if trainer.nspo2 is not None:  # as where a run with it is resumed without
            table.add_row("state", f"{trainer.nspo2.state_bytes / 2**20:.1f} MiB", "memory")
        console.print(table)
        idle = not figures.get("active") and trainer.args.nspo2_projection_rank > 0
        if idle and trainer.nspo2 is not None and trainer.nspo2_diverged_at is None:
            first = f"`nspo2_update_freq` ({trainer.args.nspo2_update_freq}) steps"
            print(f"NSPO2 projected nothing: the first basis comes after {first}, and the next log shows it.")
    print(f"Adapter: {trainer.args.output_dir}")
    print(f"All logged figures: {Path(str(trainer.args.output_dir)) / 'trainer_state.json'}")


def read(argv: list[str]) -> tuple:
    """What the command line says, as `parse` has it, and the checkpoint to resume from or None."""
    # TRL and Transformers call their own deprecated names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    parsed = parse(argv)
    checkpoint = checkpoint_to_resume(parsed[1])
    if checkpoint is not None:
        check_adapter(checkpoint, parsed[2])
    return *parsed, checkpoint


def main(argv: list[str] | None = None, prog: str = "scripts/train.py") -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "--help_all"} & set(argv):
        return show_help(prog, everything="--help_all" in argv)
    again = "add `--resume_from_checkpoint true` to the same command"
    with in_a_sentence():
        script_args, args, model_args, mixture, checkpoint = read(argv)
        few_threads(args.device.type == "cpu")
        args.eval_on_start = args.eval_on_start or (args.eval_strategy != "no" and checkpoint is None)
        trainer = build(script_args, args, model_args, mixture)
        if checkpoint is not None:
            refuse_other_adapter(checkpoint, trainer.model)
    main_process = trainer.accelerator.is_main_process
    trainer.add_callback(CheckBestMetric())
    live = show_logs(trainer)
    if checkpoint is not None and main_process:
        print(f"Resuming from {checkpoint}.")
        last, half = last_whole(args.output_dir)
        if checkpoint == last and half:
            print(f"Saved only in part and passed over: {half}.")
    try:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            stop(live)
    except KeyboardInterrupt:
        last, _ = last_whole(args.output_dir)
        hint = f"{again} to go on from {last}" if last else "there is no checkpoint yet"
        leave(f"Interrupted after step {trainer.state.global_step}: {hint}.", main_process)
    except CheckpointError as error:
        sys.exit(f"\nerror: {error}")  # below the progress bar
    except (ImportError, NotImplementedError, ValueError) as error:
        if trainer.state.global_step and not isinstance(error, RowError):
            raise
        # optimizer, schedule and loaders are made only now, of options that nothing has looked at before
        sys.exit(f"\nerror: {clearer(error, args, model_args)}")
    if checkpoint is None:
        refuse_no_step(trainer)
    dataset = script_args.dataset_name if not Path(script_args.dataset_name or ".").exists() else None
    try:
        trainer.save_model()
        # what was evaluated before the adapter was projected is not what is saved
        evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
        projected = trainer.nspo2_retain_projected
        if args.eval_strategy != "no" and (projected or trainer.state.global_step not in evaluated):
            trainer.evaluate()
        trainer.save_state()
        trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=dataset)
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: the trained adapter could not be written ({error}): make room for it, then {again}.")
    if main_process:
        report(trainer)
    if args.push_to_hub and trainer.nspo2_diverged_at is None:
        try:
            trainer.push_to_hub(dataset_name=dataset)
        except Exception as error:  # of the client's library, the network or the hub
            sys.exit(
                f"error: the adapter is in {args.output_dir!r}, but could not be pushed ({first_line(error)}): do it "
                f"later with `hf upload {trainer.hub_model_id} {args.output_dir}`."
            )
    trainer.end()
    refuse_diverged(trainer)


if __name__ == "__main__":
    main(prog="nspo2 train")
