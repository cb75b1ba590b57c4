"""What NSPO2 costs, measured in one run against the same trainer without it.

    python scripts/benchmark.py overhead --config recipes/quickstart/dpo.yaml [--steps 120] [--any_field value]

`overhead`: two trainers on the same recipe, with `nspo2_enabled` true and false, take turns step by step on the same
batches: forward and backward passes, clipping, optimizer. Printed are the median ratio of step times with its
quartiles, and the time that NSPO2 took by its own clock.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as hf_logging

sys.path.insert(0, str(Path(__file__).parent))
from train import build, parse

WARM_UP = 15  # steps that are not counted: caches, allocations, the first bases


def take_step(trainer, batches: list[dict]) -> float:
    """Seconds of one optimizer step, as Trainer takes it, without logging and callbacks of others."""
    synchronize = torch.cuda.synchronize if trainer.accelerator.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for i, batch in enumerate(batches):
        trainer.training_step(trainer.model, dict(batch))
        if trainer.nspo2 and i + 1 < len(batches):
            trainer.nspo2_samples.next_micro_batch()
    if trainer.args.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    if trainer.nspo2:
        trainer._nspo2_begin_step()
    trainer.optimizer.step()
    if trainer.nspo2:
        trainer._nspo2_end_step()
    trainer.optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


def overhead(steps: int, recipe: list[str]) -> None:
    trainers = {}
    for enabled in (True, False):
        trainer = build(*parse([*recipe, "--eval_strategy", "no", "--nspo2_enabled", str(enabled)]))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
        trainers[enabled] = trainer
    trainers[True].nspo2_samples.attach()
    each = trainers[True].args.gradient_accumulation_steps
    batches = [batch for batch, _ in zip(trainers[True].get_train_dataloader(), range(16 * each))]
    times: dict[bool, list[float]] = {True: [], False: []}
    for step in track(range(WARM_UP + steps), description="Step by step"):
        first = each * (step % (len(batches) // each))
        if step == WARM_UP:
            trainers[True].nspo2_time.take()
        for enabled in (True, False) if step % 2 else (False, True):
            seconds = take_step(trainers[enabled], batches[first : first + each])
            if step >= WARM_UP:
                times[enabled].append(seconds)
    own = trainers[True].nspo2_time.take() / steps
    ratios = [a / b for a, b in zip(times[True], times[False])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    plain = statistics.median(times[False])
    table = Table(title=f"{len(ratios)} pairs of steps, {trainers[True].accelerator.device}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("step without NSPO2, median", f"{1000 * plain:.1f} ms")
    table.add_row("step with NSPO2, median", f"{1000 * statistics.median(times[True]):.1f} ms")
    table.add_row("ratio, median (quartiles)", f"{middle:.4f} ({low:.4f} to {high:.4f})")
    table.add_row("NSPO2 by its own clock", f"{1000 * own:.1f} ms a step")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["overhead"])
    parser.add_argument("--steps", type=int, default=120, help="pairs of steps that are counted")
    options, recipe = parser.parse_known_args()
    hf_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    overhead(options.steps, recipe)


if __name__ == "__main__":
    main()
