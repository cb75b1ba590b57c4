"""One cell of the grid: a run from its settings to the figures that it is judged by."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from nspo2_trl import NSPO2DPOTrainer
from nspo2_trl.cli.train import build, parse

from . import ROOT
from .judge import judge
from .methods import options_of, prepare

LOOKS = 20  # logs per run


class Clock(TrainerCallback):
    """Seconds of the processor, in the steps alone."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.start


def make_trainer(
    cell: dict, folders: dict[str, str], held_out: range, stride: int = 1, options: Mapping[str, Any] | None = None
) -> NSPO2DPOTrainer:
    """The trainer of a cell, from the quick start's recipe: 4 micro-batches of 4 pairs, LoRA 8 on all linear layers.

    The reference's log-probabilities are computed once for all runs: they depend on base model and pairs alone.

    Args:
        cell: see [`grid`]. folders: `model` and `data` of the task. held_out: rows of the test split, as far as there
            are. stride: of the `LOOKS` logs of a run each `stride`-th has an evaluation.
        options: others of the trainer.
    """
    options = {
        "model_name_or_path": folders["model"],
        "dataset_name": folders["data"],
        "lora_dropout": 0,
        "learning_rate": cell["lr"],
        "seed": cell["seed"],
        "max_steps": cell["steps"],
        "warmup_steps": math.ceil(0.05 * cell["steps"]),
        "logging_steps": cell["steps"] // LOOKS,
        "eval_steps": cell["steps"] // LOOKS * stride,
        "per_device_eval_batch_size": 10,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(Path(tempfile.gettempdir()) / "nspo2_bench"),  # nothing is written there
        **options_of(cell["method"]),
        **(options or {}),
    }
    argv = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    parsed = parse(["--config", str(ROOT / "recipes/quickstart/dpo.yaml"), *argv])
    parsed[1].nspo2_retain_dataset = None  # what is compared is filters
    trainer = build(*parsed)
    rows = [row for row in held_out if row < len(trainer.eval_dataset)]
    if not rows:
        raise ValueError(f"The test split has {len(trainer.eval_dataset)} pairs, none in {held_out}: add pairs.")
    trainer.train_dataset = _with_reference(trainer, trainer.train_dataset)
    trainer.eval_dataset = _with_reference(trainer, trainer.eval_dataset.select(rows))
    trainer.precompute_ref_logps = True
    trainer.remove_callback(PrinterCallback)
    return trainer


def _with_reference(trainer: NSPO2DPOTrainer, dataset: Dataset) -> Dataset:
    """`dataset` with the reference's log-probabilities, kept in a file that is named after base model and pairs."""
    name = hashlib.sha256(repr(dataset[:]).encode())
    for key, value in trainer.model.state_dict().items():
        if "lora_" not in key:
            name.update(value.float().numpy().tobytes())
    path = ROOT / f"out/bench_cache/{name.hexdigest()[:20]}.pt"
    if not path.exists():
        batches = DataLoader(dataset, 16, collate_fn=trainer.data_collator)
        found = [torch.stack(trainer.compute_ref_log_probs(trainer.model, batch)) for batch in batches]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(found, 1), part := path.with_suffix(f".{os.getpid()}"))
        part.rename(path)
    chosen, rejected = torch.load(path).tolist()
    return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


def short(value):
    """5 significant digits; None where a run diverged, since JSON knows no NaN."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: short(part) for name, part in value.items()}
    return [short(part) for part in value] if isinstance(value, list) else value


def run_cell(cell: dict, folders: dict[str, str]) -> dict:
    """Train and judge one cell; gives its record. Seconds are of the processor, not of the clock.

    A cell that only helps to choose a rate (`role` "select") is evaluated 4 times, not 10, and draws no samples.
    """
    start, report, number = time.process_time(), cell["role"] == "report", cell["held_out"]
    held_out = range(number) if report else range(number, 2 * number)  # rates are not chosen on what is reported
    trainer, clock = make_trainer(cell, folders, held_out, stride=2 if report else 5), Clock()
    trainer.add_callback(clock)
    prepare(trainer, cell["method"])
    trainer.train()
    log, figures = trainer.state.log_history, {}
    evals = [entry for entry in log if "eval_loss" in entry]
    keys = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    for name in ("variance_reduction", "rank", "bias", "noise_scale"):
        if values := [entry[f"nspo2/{name}"] for entry in log if f"nspo2/{name}" in entry]:
            figures[name] = sum(values) / len(values)
    finite = math.isfinite(evals[-1]["eval_loss"])  # a model that diverged writes nothing
    found = {
        "cell": cell,
        "pairs_a_step": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        "curve": {name: [entry[key] for entry in evals] for name, key in ({"step": "step"} | keys).items()},
        "samples": judge(trainer, cell["task"], cell["samples"]) if report and finite else {},
        "nspo2": figures,
        "ms_a_step": 1000 * clock.seconds / cell["steps"],
        "seconds": time.process_time() - start,
        "versions": {name: version(name) for name in ("torch", "trl", "peft", "nspo2_trl")},
    }
    return short(found)
