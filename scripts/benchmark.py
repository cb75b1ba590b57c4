"""What NSPO2 costs, measured in one run against the same trainer without it.

    python scripts/benchmark.py overhead --config recipes/quickstart/dpo.yaml [--rounds 6] [--steps 20] [--any_field v]

`overhead`: two trainers on the same recipe, batches and seed, with `nspo2_enabled` true and false, train in turns of
`--steps` steps. Each step with NSPO2 is compared with the step on the same batch without it. Printed are the median
ratio of step times with its quartiles, and the share of a step that NSPO2 itself says it took.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import datasets
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

sys.path.insert(0, str(Path(__file__).parent))
from train import build, parse


class StepTimes(TrainerCallback):
    """Seconds from the start of each step to the end of its optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def overhead(rounds: int, steps: int, recipe: list[str]) -> None:
    quiet = ["--disable_tqdm", "true", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"]
    trainers, times = {}, {}
    own: list[float] = []
    for enabled in (True, False):
        options = [*recipe, *quiet, "--max_steps", str(steps), "--logging_steps", str(steps)]
        script_args, args, model_args, mixture = parse([*options, "--nspo2_enabled", str(enabled)])
        args.logging_strategy = "no"
        trainers[enabled] = build(script_args, args, model_args, mixture)
        times[enabled] = StepTimes()
        trainers[enabled].add_callback(times[enabled])
        trainers[enabled].remove_callback(PrinterCallback)
    for turn in track(range(rounds + 1), description="Training in turns"):
        for enabled in (True, False) if turn % 2 else (False, True):
            trainers[enabled].train()
            own += [e["nspo2/overhead_ms"] for e in trainers[enabled].state.log_history if "nspo2/overhead_ms" in e]
        if turn == 0:  # warm-up: caches, allocations, the first basis
            for each in times.values():
                each.seconds.clear()
            own.clear()
    ratios = [a / b for a, b in zip(times[True].seconds, times[False].seconds)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    table = Table(title=f"{len(ratios)} pairs of steps, {trainers[True].accelerator.device}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("step without NSPO2, median", f"{1000 * statistics.median(times[False].seconds):.1f} ms")
    table.add_row("step with NSPO2, median", f"{1000 * statistics.median(times[True].seconds):.1f} ms")
    table.add_row("ratio, median (quartiles)", f"{middle:.4f} ({low:.4f} to {high:.4f})")
    table.add_row("ratio of the sums", f"{sum(times[True].seconds) / sum(times[False].seconds):.4f}")
    table.add_row("nspo2/overhead_ms", f"{statistics.mean(own):.1f} ms")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["overhead"])
    parser.add_argument("--rounds", type=int, default=6, help="turns of each trainer")
    parser.add_argument("--steps", type=int, default=20, help="steps a turn")
    options, recipe = parser.parse_known_args()
    hf_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    overhead(options.rounds, options.steps, recipe)


if __name__ == "__main__":
    main()
