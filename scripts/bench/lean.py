"""`trainer.train()` for tiny models on one CPU core, in a third of the time or less, and the same to rounding.

The trainer is built as ever: its model, LoRA, tokenised pairs, order of the data, optimizer, schedule and NSPO2 engine
are the ones used. Replaced are the loop around them and the model's forward and backward pass ([`packed`]), the
reference model's log-probabilities are computed once for all runs, and nothing is logged but what a run is judged by.
tests/test_lean.py holds it against the trainer.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset

from nspo2_trl import NSPO2DPOTrainer
from nspo2_trl.engine.finite import any_bad
from nspo2_trl.projections.protocol import Step

from .packed import Packed, PackedLlama, Pair

LOOKS = 20  # a run
PAIRS_AT_ONCE = 16  # where nothing is trained: as many as the processor's cache likes


@dataclass
class Data:
    """Tokenised pairs, and the reference's log-probabilities (2, pairs) of their answers."""

    train: list[Pair]
    held_out: list[Pair]
    train_reference: torch.Tensor
    held_out_reference: torch.Tensor


@dataclass
class Run:
    """What a run showed: losses of its steps, figures at each evaluation, CPU seconds of the steps alone."""

    losses: list[float] = field(default_factory=list)
    curve: list[dict] = field(default_factory=list)  # step, loss, accuracy, margin
    figures: list[dict] = field(default_factory=list)  # of NSPO2, see `NoiseProjection.metrics`
    seconds: float = 0.0


def pairs_of(dataset: Dataset, max_length: int | None) -> list[Pair]:
    """The rows as the trainer's collator would cut them (`keep_start`)."""
    rows = dataset[:]
    columns = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    room = lambda prompt: None if max_length is None else max_length - len(prompt)
    return [Pair(p, c[: room(p)], r[: room(p)]) for p, c, r in zip(*columns)]


@torch.no_grad()
def log_probs(llama: PackedLlama, pairs: list[Pair], adapted: bool = True) -> torch.Tensor:
    """(2, pairs) log-probabilities of the answers."""
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i]))
    found = torch.empty(2, len(pairs))
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = by_length[start : start + PAIRS_AT_ONCE]
        found[:, part] = llama.log_probs(Packed([pairs[i] for i in part]), adapted=adapted)
    return found


def load_data(trainer: NSPO2DPOTrainer, held_out: range, cache: Path) -> Data:
    """The trainer's pairs with reference log-probabilities, kept in files that are named after model and pairs.

    Args:
        held_out: rows of the evaluation set to use, as far as there are. cache: a folder.
    """
    length = trainer.args.max_length
    held = trainer.eval_dataset.select([row for row in held_out if row < len(trainer.eval_dataset)])
    if not len(held):
        raise ValueError(
            f"The test split has {len(trainer.eval_dataset)} pairs, none of them in {held_out}: add pairs."
        )
    train, held = pairs_of(trainer.train_dataset, length), pairs_of(held, length)
    weights = hashlib.sha256()
    for key, value in trainer.model.state_dict().items():
        if "lora_" not in key:
            weights.update(value.float().numpy().tobytes())
    return Data(train, held, *(_reference(trainer, pairs, weights.copy(), cache) for pairs in (train, held)))


def _reference(trainer: NSPO2DPOTrainer, pairs: list[Pair], name, cache: Path) -> torch.Tensor:
    name.update(repr(pairs).encode())
    path = cache / f"{name.hexdigest()[:20]}.pt"
    if not path.exists():
        found = log_probs(PackedLlama(trainer.model), pairs, adapted=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path.with_suffix(f".{os.getpid()}"))
        path.with_suffix(f".{os.getpid()}").rename(path)
    return torch.load(path)


def order(trainer: NSPO2DPOTrainer, steps: int) -> list[list[list[int]]]:
    """Numbers of the rows in each micro-batch of each step, drawn as `train` would draw them.

    Raises:
        ValueError: the run ends an epoch with a batch that is not full, which this loop does not know.
    """
    args, pairs = trainer.args, len(trainer.train_dataset)
    batch = args.train_batch_size * args.gradient_accumulation_steps
    if steps * batch > pairs and pairs % batch:
        raise ValueError(f"{pairs} pairs are neither enough for {steps} batches of {batch} nor a multiple of {batch}.")
    kept = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
    trainer.train_dataset = Dataset.from_dict({"index": range(len(trainer.train_dataset))})
    trainer.data_collator = lambda rows: {"index": torch.tensor([row["index"] for row in rows])}
    trainer._signature_columns = ["index"]
    loader, each, found = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps, []
    trainer.train_dataset, trainer.data_collator, trainer._signature_columns = kept
    for epoch in count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batches = [batch["index"].tolist() for batch in loader]
        found += [batches[i : i + each] for i in range(0, len(batches) - each + 1, each)]
        if len(found) >= steps:
            return found[:steps]


def evaluate(llama: PackedLlama, data: Data, beta: float) -> dict[str, float]:
    """Held-out loss, accuracy (ties count as wrong) and margin, means over pairs."""
    ratios = log_probs(llama, data.held_out) - data.held_out_reference
    margins = beta * (ratios[0] - ratios[1])
    found = {"loss": -F.logsigmoid(margins), "accuracy": (margins > 0).float(), "margin": margins}
    return {name: value.mean().item() for name, value in found.items()}


def train(
    trainer: NSPO2DPOTrainer,
    data: Data,
    looks: int = LOOKS,
    stride: int = 1,
    prepare: Callable[[NSPO2DPOTrainer], Callable[[list[torch.Tensor]], None] | None] | None = None,
) -> Run:
    """Train as `trainer.train()` would that logs at `looks` points of the run and evaluates at each `stride`-th.

    Args:
        prepare: called when optimizer and schedule are there; may replace them, and returns what is called for the
            optimizer's step (with the gradients before the filter as its argument).
    """
    args, steps = trainer.args, trainer.args.max_steps
    batches = order(trainer, steps)
    trainer.create_optimizer_and_scheduler(steps)
    step_of = prepare(trainer) if prepare else None
    optimizer, scheduler, noise = trainer.optimizer, trainer.lr_scheduler, trainer.nspo2
    llama, run = PackedLlama(trainer.model), Run()
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    each = args.gradient_accumulation_steps
    samples = [stack.buffer(each) for stack in noise.stacks] if noise else []
    sinks = {
        id(place.param): [views[i] for views in per_sample]
        for stack, buffer in zip(noise.stacks if noise else [], samples)
        for per_sample in [[stack.views_of(part) for part in buffer]]
        for i, place in enumerate(stack.places)
    }
    stops = {round(steps * i / looks): i % stride == 0 for i in range(1, looks + 1)}
    if hasattr(optimizer, "train"):  # schedule-free: it trains at another point than it is evaluated at
        optimizer.train()
    for step, batch in enumerate(batches):
        start = time.process_time()
        rows = [row for micro_batch in batch for row in micro_batch]
        packed = Packed([data.train[row] for row in rows], each)
        policy = llama.log_probs(packed, sinks if noise and noise.learns else None)
        ratios = policy - data.train_reference[:, rows]
        loss = -F.logsigmoid(args.beta * (ratios[0] - ratios[1])).mean()
        loss.backward()
        if args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        raw = [p.grad.clone() for p in params] if step_of else None
        if noise:  # the samples are of the mean over all micro-batches: times `each`, their mean is the gradient
            noise.read_grads()
            learned = [buffer.mul_(each) for buffer in samples] if noise.learns else []
            fine = noise.before_step(Step(learned, progress=step / steps))
            if not fine and args.nspo2_projection_rank > 0 and any_bad(p.grad for p in params):
                optimizer.zero_grad()  # as the trainer does: such a gradient would ruin the weights
        if step_of:
            step_of(raw)
        else:
            optimizer.step()
        if noise:
            noise.after_step()
        scheduler.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.seconds += time.process_time() - start
        if step + 1 in stops:
            _log(run, trainer)
        if stops.get(step + 1):
            _evaluate(run, step + 1, trainer, llama, data)
    return run


def _log(run: Run, trainer: NSPO2DPOTrainer) -> None:
    """What the trainer does with NSPO2's figures when it logs."""
    if trainer.nspo2:
        figures = trainer.nspo2.metrics(trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps)
        trainer.nspo2.watch({name: figures[name] for name in ("bias", "alpha") if name in figures})
        run.figures.append(figures)


def _evaluate(run: Run, step: int, trainer: NSPO2DPOTrainer, llama: PackedLlama, data: Data) -> None:
    optimizer = trainer.optimizer
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    found = evaluate(llama, data, trainer.args.beta)
    run.curve.append({"step": step} | found)
    if trainer.nspo2:
        trainer.nspo2.watch({"eval_loss": found["loss"]})
    if hasattr(optimizer, "train") and step < trainer.args.max_steps:
        optimizer.train()
