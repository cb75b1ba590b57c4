"""One cell of the grid: a run from its settings to the figures that it is judged by."""

from __future__ import annotations

import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from nspo2_trl import NSPO2DPOTrainer
from nspo2_trl.cli.train import build, parse

from . import ROOT, lean
from .judge import judge
from .methods import options_of, preparation

CACHE = ROOT / "out/bench_cache"


def make_trainer(cell: dict, folders: dict[str, str]) -> NSPO2DPOTrainer:
    """The trainer of a cell, from the quick start's recipe: 4 micro-batches of 4 pairs, LoRA 8 on all linear layers.

    Args:
        cell: see [`grid`]. folders: `model` and `data` of the task.
    """
    options = {
        "model_name_or_path": folders["model"],
        "dataset_name": folders["data"],
        "lora_dropout": 0,
        "learning_rate": cell["lr"],
        "seed": cell["seed"],
        "max_steps": cell["steps"],
        "warmup_steps": math.ceil(0.05 * cell["steps"]),
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(Path(tempfile.gettempdir()) / "nspo2_bench"),  # nothing is written there
        **options_of(cell["method"]),
    }
    argv = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return build(*parse(["--config", str(ROOT / "recipes/quickstart/dpo.yaml"), *argv]))


def short(value):
    """5 significant digits; None where a run diverged, since JSON knows no NaN."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: short(part) for name, part in value.items()}
    return [short(part) for part in value] if isinstance(value, list) else value


def run_cell(cell: dict, folders: dict[str, str]) -> dict:
    """Train and judge one cell; gives what its file holds. Seconds are of the processor, not of the clock.

    A cell that only helps to choose a rate (`role` "select") is evaluated 4 times, not 10, and draws no samples.
    """
    start, report = time.process_time(), cell["role"] == "report"
    trainer = make_trainer(cell, folders)
    number = cell["held_out"]  # rates are not chosen on the pairs that are reported
    data = lean.load_data(trainer, range(number) if report else range(number, 2 * number), CACHE)
    run = lean.train(trainer, data, stride=2 if report else 5, prepare=preparation(cell["method"]))
    figures = {}
    for name in ("variance_reduction", "rank", "bias", "noise_scale"):
        values = [entry[name] for entry in run.figures if name in entry]
        if values:
            figures[name] = sum(values) / len(values)
    finite = math.isfinite(run.curve[-1]["loss"])  # a model that diverged writes nothing
    found = {
        "cell": cell,
        "pairs_a_step": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        "curve": {name: [point[name] for point in run.curve] for name in run.curve[0]},
        "samples": judge(trainer, data, cell["task"], cell["samples"]) if report and finite else {},
        "nspo2": figures,
        "ms_a_step": 1000 * run.seconds / cell["steps"],
        "seconds": time.process_time() - start,
        "versions": {name: version(name) for name in ("torch", "trl", "peft", "nspo2_trl")},
    }
    return short(found)
