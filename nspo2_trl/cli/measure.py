"""Measure the gradient noise of a recipe: which batch pays, and which modules learn. No adapter is saved.

    nspo2 measure --config RECIPE.yaml [--steps N] [--any_field value]

It trains as plain TRL does, for N steps of the recipe's own schedule (all if left out), and forgets the adapter. A
table and three sentences say what to do. All figures are in noise.json in `output_dir`, which `nspo2 report` draws.
Any option of `nspo2 train` may stand here too.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import Trainer, TrainerCallback

from ..training.summary import noise_summary
from .arguments import parse
from .endings import in_a_sentence, leave, refuse_diverged, refuse_no_step
from .lines import show_logs, stop
from .noise import NOISE, show
from .threads import few_threads
from .train import build
from .words import with_config

# a running mean over some 10 steps: a longer one lags behind the gradient, and the signal would look too small
OWN = ["--nspo2_cov_momentum", "0.9"]


class _StopAfter(TrainerCallback):
    """Ends training after some steps, with the learning rates that the whole run would have had."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.steps


def measure(trainer: Trainer, steps: int | None = None) -> dict:
    """Train `trainer`, any with NSPO2, for `steps` of its steps, and give its [`noise_summary`].

    With `nspo2_projection_rank=0` its weights end as plain TRL's do, bit for bit.
    """
    if steps is not None:
        trainer.add_callback(_StopAfter(steps))
    trainer.train()
    return noise_summary(trainer)


def _steps(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}.")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nspo2 measure", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.error = lambda message: sys.exit(f"error: {message}")  # type: ignore[method-assign]
    parser.add_argument("--steps", type=_steps, help="steps to measure; all of the recipe's if left out")
    own, rest = parser.parse_known_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with in_a_sentence("measuring"):
        parsed = parse([*OWN, *with_config(rest)] if rest else [])
        args = parsed[1]
        few_threads(args.device.type == "cpu")
        args.nspo2_enabled, args.nspo2_projection_rank, args.nspo2_retain_dataset = True, 0, None
        args.eval_strategy, args.eval_on_start, args.save_strategy = "no", False, "no"
        args.push_to_hub, args.report_to = False, []
        if own.steps and 0 < args.max_steps < own.steps:
            args.max_steps = own.steps
        trainer = build(*parsed)
    main_process = trainer.accelerator.is_main_process
    live = show_logs(trainer)
    try:
        found = measure(trainer, own.steps)
    except KeyboardInterrupt:  # what was measured is worth as much
        if trainer.state.global_step == 0:
            leave("Interrupted before the first step: nothing was measured.", main_process)
        found = noise_summary(trainer)
    finally:
        stop(live)
    refuse_no_step(trainer)
    if main_process:
        show(found, Console())
        path = Path(str(args.output_dir)) / NOISE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
        print(f"All figures: {path}")
    trainer.end()
    refuse_diverged(trainer)
