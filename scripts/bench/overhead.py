"""A whole training step with and without NSPO2, two trainers taking turns, and which part of NSPO2 takes what."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from rich.progress import track
from rich.table import Table
from torch import nn

from nspo2_trl import NSPO2DPOTrainer
from nspo2_trl.engine.covariance import CovEstimator as Cov
from nspo2_trl.engine.power import PowerEstimator as Power
from nspo2_trl.engine.shards import Shards
from nspo2_trl.training.samples import SampleCollector
from nspo2_trl.training.timing import Stopwatch

from .stats import median_interval, ratio_of_sums

WARM_UP = 15  # steps that are not counted: caches, allocations, the first bases

PARTS = {
    "sampling": [],
    "exchange": [(SampleCollector, "collect"), (Shards, "gather")],
    "solve": [(Cov, "solve"), (Power, "solve")],
}


@contextmanager
def clocks(trainer: NSPO2DPOTrainer) -> Iterator[dict[str, Stopwatch]]:
    """Clocks around parts of NSPO2, inside the `with`: catching samples, moving them, solving."""
    found = {name: Stopwatch(trainer.accelerator.device) for name in PARTS}
    trainer.nspo2_samples.stopwatch = found["sampling"]
    with ExitStack() as stack:
        for name, methods in PARTS.items():
            for owner, method in methods:
                stack.enter_context(patch.object(owner, method, _timed(getattr(owner, method), found[name])))
        yield found


def _timed(inner, clock: Stopwatch):
    def timed(*args, **kwargs):
        with clock:
            return inner(*args, **kwargs)

    return timed


def take_step(trainer: NSPO2DPOTrainer, model: nn.Module, batches: list[dict]) -> tuple[float, int]:
    """Seconds and, on a GPU, peak bytes of one step, as Trainer takes it, without logging and callbacks of others."""
    cuda = trainer.accelerator.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start = time.perf_counter()
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        with trainer.accelerator.accumulate(model) if last else trainer.accelerator.no_sync(model):
            trainer.training_step(model, dict(batch))
        if trainer.nspo2 and not last:
            trainer.nspo2_samples.next_micro_batch()
    if trainer.args.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    if trainer.nspo2:
        trainer._nspo2_before_step()
    trainer.optimizer.step()
    if trainer.nspo2:
        trainer._nspo2_after_step()
    trainer.optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else 0


def measure(make, steps: int, label: str) -> dict:
    """Figures of one cell; `make(enabled)` builds its trainers."""
    trainers, models = {}, {}
    for enabled in (True, False):
        trainer = make(enabled)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainers[enabled], models[enabled] = trainer, trainer.accelerator.prepare(trainer.model)
        models[enabled].train()
    ours = trainers[True]
    ours.nspo2_samples.attach()
    each = ours.args.gradient_accumulation_steps
    batches = [batch for batch, _ in zip(ours.get_train_dataloader(), range(16 * each))]
    times, peaks = {True: [], False: []}, {True: [], False: []}
    with clocks(ours) as parts:
        quiet = not ours.accelerator.is_main_process
        for step in track(range(WARM_UP + steps), description=label, disable=quiet):
            first = each * (step % (len(batches) // each))
            if step == WARM_UP:
                for clock in (*parts.values(), ours.nspo2_time):
                    clock.take()
            for enabled in (True, False) if step % 2 else (False, True):
                seconds, peak = take_step(trainers[enabled], models[enabled], batches[first : first + each])
                if step >= WARM_UP:
                    times[enabled].append(seconds)
                    peaks[enabled].append(peak)
    own = {name: 1000 * clock.take() / steps for name, clock in (*parts.items(), ("projection", ours.nspo2_time))}
    own["projection"] -= own["exchange"] + own["solve"]
    ratios = [a / b for a, b in zip(times[True], times[False])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    median_bounds = median_interval(ratios)
    whole, bounds = ratio_of_sums(times[True], times[False])
    return {
        "processes": ours.accelerator.num_processes,
        "plain_ms": 1000 * statistics.median(times[False]),
        "nspo2_ms": 1000 * statistics.median(times[True]),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "ratio_interval": median_bounds,
        "ratio_of_sums": whole,
        "ratio_of_sums_interval": bounds,
        "parts_ms": own,
        "state_mib": ours.nspo2.state_bytes / 2**20,
        "state_of_adamw": ours.nspo2.state_bytes / (8 * sum(p.numel() for p in ours._nspo2_trained())),
        # by its own clocks, as a share of all that the steps with it took
        "share_of_time": sum(own.values()) * steps / (1000 * sum(times[True])),
        "samples_mib": sum(buffer.nbytes for buffer in ours.nspo2_samples.buffers) / 2**20,
        "peak_more_mib": (statistics.median(peaks[True]) - statistics.median(peaks[False])) / 2**20,
        "rank": ours.nspo2.metrics().get("rank"),
    }


def table(cells: list[dict], device: str) -> Table:
    columns = ("cell", "plain ms", "NSPO2 ms", "median ratio [95 %]", "sampling", "exchange", "solve", "projection")
    result = Table(
        *columns, "share of time", "state / AdamW", title=f"A training step with and without NSPO2, {device}"
    )
    for cell in cells:
        low, high = cell["ratio_interval"]
        result.add_row(
            cell["label"],
            f"{cell['plain_ms']:.1f}",
            f"{cell['nspo2_ms']:.1f}",
            f"{cell['ratio']:.3f} [{low:.3f}, {high:.3f}]",
            *(f"{value:.1f}" for value in cell["parts_ms"].values()),
            f"{cell['share_of_time']:.1%}",
            f"{cell['state_of_adamw']:.2f}",
        )
    return result
