"""What NSPO2 costs, in one run against the same trainer without it; and what it brings, in many.

    python scripts/benchmark.py overhead --config recipes/quickstart/dpo.yaml [--steps 120] [--any_field value]
    python scripts/benchmark.py sizes --sizes 135m 8b --lora_r 16
    python scripts/benchmark.py variance --help         what filters take away of noise and of signal
    python scripts/benchmark.py gauge --help            what `nspo2 measure` says, against the estimator of `variance`
    python scripts/benchmark.py convergence --help      methods x rates x seeds, in parts, over hours
    python scripts/benchmark.py retain --help           what a model forgets in DPO, and what keeps it
    python scripts/benchmark.py tables                  docs/results.md and plots from benchmarks/raw
    python scripts/benchmark.py pack                    the files of cells that have ended, into one a study
    python scripts/benchmark.py --smoke                 convergence, variance and tables, tiny

`overhead`: two trainers, with `nspo2_enabled` true and false, take turns step by step on the same batches: forward and
backward passes, clipping, optimizer. It gives the ratio of step times, and which part of NSPO2 takes what, by clocks
inside it. With `torchrun --nproc_per_node 2` in place of `python` it is DDP (on a CPU add `--use_cpu`).

`sizes`: no model, only the adapters of one, with random gradients: bytes of state and scratch, time of a step.

These two print a table and write all figures to a JSON file.
"""

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging as hf_logging

sys.path.insert(0, str(Path(__file__).parent))
try:
    from bench import convergence, overhead, sizes
except ModuleNotFoundError as error:
    raise SystemExit(f'error: {error.name} is missing: run `pip install -e ".[bench]"`.') from None

from nspo2_trl.cli.train import build, parse
from nspo2_trl.cli.words import with_config


def run_overhead(options: argparse.Namespace, recipe: list[str]) -> Iterator[dict]:
    recipe = with_config(recipe)
    if "--config" not in recipe:
        raise SystemExit("error: `overhead` needs a recipe: give `--config recipes/quickstart/dpo.yaml`.")
    recipe = [*recipe, "--eval_strategy", "no"] + (["--use_cpu", "true"] if options.use_cpu else [])

    def make(enabled):
        parsed = parse([*recipe, "--nspo2_enabled", str(enabled)])
        parsed[1].nspo2_retain_dataset = None  # what is timed is the filter
        return build(*parsed)

    yield {"label": recipe[recipe.index("--config") + 1]} | overhead.measure(make, options.steps, "recipe")


def run_sizes(options: argparse.Namespace, rest: list[str]) -> Iterator[dict]:
    if rest:
        raise SystemExit(f"error: unknown arguments {' '.join(rest)}.")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu")
    short = {"model": "", "lora_r": "r", "covariance": "", "projection_rank": "k", "update_freq": "every "}
    names = [*short, "basis_dtype"]
    for values in itertools.product(*(getattr(options, name) for name in names)):
        cell = dict(zip(names, values))
        cell["label"] = ", ".join(f"{short.get(name, '')}{value}" for name, value in cell.items())
        yield cell | sizes.measure(cell, options.micro_batches, device) | sizes.retained(cell["model"], 12)


def main() -> None:
    command, rest = (sys.argv[1:] or [""])[0], sys.argv[2:]
    if command in convergence.COMMANDS:
        sys.exit(bool(convergence.COMMANDS[command](rest)))
    if command == "retain":
        from bench import retain

        sys.exit(retain.run(rest))
    if command == "--smoke":
        return print(f"Everything is in {convergence.smoke()}.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["overhead", "sizes"])
    parser.add_argument("--steps", type=int, default=120, help="overhead: pairs of steps that are counted")
    parser.add_argument("--sizes", nargs="+", choices=list(sizes.SIZES), default=["10m"], dest="model")
    parser.add_argument("--lora_r", nargs="+", type=int, default=[16])
    parser.add_argument("--covariance", nargs="+", choices=["adapter", "factored"], default=["factored"])
    parser.add_argument("--update_freq", nargs="+", type=int, default=[5])
    parser.add_argument("--projection_rank", nargs="+", type=int, default=[8])
    parser.add_argument("--basis_dtype", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16"])
    parser.add_argument("--micro_batches", type=int, default=4, help="gradient samples per step")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--out", help="JSON file for the figures; out/COMMAND.json if left out")
    options, recipe = parser.parse_known_args()
    hf_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    device, cells, console = f"CPU ({platform.machine()}, {os.cpu_count()} cores)", [], Console()
    if torch.cuda.is_available() and not options.use_cpu:
        device = torch.cuda.get_device_name()
    main_process = PartialState(cpu=options.use_cpu).is_main_process
    path = Path(options.out or f"out/{options.command}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell in (run_overhead if options.command == "overhead" else run_sizes)(options, recipe):
        cells.append(cell)
        if main_process:  # what was measured stays, should the rest be cut off
            path.write_text(json.dumps({"device": device, "torch": torch.__version__, "cells": cells}, indent=1))
    if main_process:
        console.width = max(console.width, 150)  # a table that is cut helps nobody
        console.print((overhead if options.command == "overhead" else sizes).table(cells, device))
        for words in {f"{c['model']}, {c['retained_mib']:,.0f}" for c in cells if "retained_mib" in c}:
            print(f"Second moments of retained texts, rank 12, any number of tokens: {words} MiB.")
        print(f"All figures: {path}")


if __name__ == "__main__":
    main()
