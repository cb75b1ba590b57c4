"""`trainer.train()` for tiny models on one CPU core, without what a comparison of methods does not need.

The trainer is built as ever: model, LoRA, tokenised pairs, order of the data, optimizer, schedule, samples and NSPO2
are its own. Replaced are the loop and the loss: the reference model's log-probabilities are computed once for all
runs, logits exist for the answers alone, and nothing is logged but what a run is judged by. tests/test_lean.py holds
it against the trainer.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from nspo2_trl import NSPO2DPOTrainer

LOOKS = 20  # per run
AT_ONCE = 32  # answers where nothing is trained: as many as the processor's cache likes


class Pair(NamedTuple):
    """Token ids, cut to the trainer's `max_length`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class Data:
    """Tokenised pairs, and the reference's log-probabilities (2, pairs) of their answers."""

    train: list[Pair]
    held_out: list[Pair]
    train_reference: torch.Tensor
    held_out_reference: torch.Tensor


@dataclass
class Found:
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


def answers_of(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer, of all chosen answers and then of all rejected ones."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def log_probs(trainer: NSPO2DPOTrainer, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """(rows,) log-probabilities of answers after their prompts, with the model's own forward pass."""
    ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in rows], batch_first=True)
    sizes = torch.tensor([[len(prompt), len(answer)] for prompt, answer in rows])
    places = torch.arange(ids.shape[1])
    answers = (places >= sizes[:, :1]) & (places < sizes.sum(1, keepdim=True))
    model = trainer.model.get_base_model()  # the adapters are in it
    hidden = model.base_model(ids, attention_mask=(places < sizes.sum(1, keepdim=True)).long()).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][answers[:, 1:]])
    found = -F.cross_entropy(logits, ids[answers], reduction="none")
    return found.new_zeros(len(rows)).index_add(0, torch.nonzero(answers)[:, 0], found)


@torch.no_grad()
def scored(trainer: NSPO2DPOTrainer, rows: list[tuple[list[int], list[int]]], adapted: bool = True) -> torch.Tensor:
    """[`log_probs`] of many rows, or those of the reference model, without gradients."""
    by_length = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    found = torch.empty(len(rows))
    with nullcontext() if adapted else trainer.model.disable_adapter():
        for start in range(0, len(rows), AT_ONCE):
            part = by_length[start : start + AT_ONCE]
            found[part] = log_probs(trainer, [rows[i] for i in part])
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
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(scored(trainer, answers_of(pairs), adapted=False).view(2, -1), part)
        part.rename(path)
    return torch.load(path)


def order(trainer: NSPO2DPOTrainer, steps: int) -> list[list[list[int]]]:
    """Numbers of the rows in each micro-batch of each step, drawn as `train` would draw them.

    Raises:
        ValueError: the run ends an epoch with a batch that is not full, which this loop does not know.
    """
    args, pairs = trainer.args, len(trainer.train_dataset)
    each = args.gradient_accumulation_steps
    batch = args.train_batch_size * each
    if steps * batch > pairs and pairs % batch:
        raise ValueError(f"{pairs} pairs are neither enough for {steps} batches of {batch} nor a multiple of {batch}.")
    kept = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
    trainer.train_dataset = Dataset.from_dict({"index": range(pairs)})
    trainer.data_collator = lambda rows: {"index": torch.tensor([row["index"] for row in rows])}
    trainer._signature_columns = ["index"]
    loader, found = trainer.get_train_dataloader(), []
    trainer.train_dataset, trainer.data_collator, trainer._signature_columns = kept
    for epoch in count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batches = [batch["index"].tolist() for batch in loader]
        found += [batches[i : i + each] for i in range(0, len(batches) - each + 1, each)]
        if len(found) >= steps:
            return found[:steps]


def margins(trainer: NSPO2DPOTrainer, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(pairs,) rewards of the chosen answers less those of the rejected; both arguments are as [`answers_of`]."""
    chosen, rejected = policy.view(2, -1) - reference
    return trainer.args.beta * (chosen - rejected)


def backward(trainer: NSPO2DPOTrainer, data: Data, rows: list[int], share: float = 1.0) -> float:
    """DPO's loss of a micro-batch, times `share`; its gradient is added."""
    policy = log_probs(trainer, answers_of([data.train[row] for row in rows]))
    loss = -F.logsigmoid(margins(trainer, policy, data.train_reference[:, rows])).mean() * share
    loss.backward()
    return loss.item()


def take_step(trainer: NSPO2DPOTrainer, micro_batches: Iterable[Callable[[], object]]) -> list:
    """One optimizer step, in Trainer's order; returns what the micro-batches' forward and backward passes gave."""
    found: list = []
    for passes in micro_batches:
        if trainer.nspo2 and found:
            trainer.nspo2_samples.next_micro_batch()
        found.append(passes())
    if trainer.args.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    if trainer.nspo2:
        trainer._nspo2_before_step()
    trainer.optimizer.step()
    if trainer.nspo2:
        trainer._nspo2_after_step()
    trainer.optimizer.zero_grad()
    return found


def evaluate(trainer: NSPO2DPOTrainer, data: Data) -> dict[str, float]:
    """Held-out loss, accuracy (ties count as wrong) and margin, means over pairs."""
    found = margins(trainer, scored(trainer, answers_of(data.held_out)), data.held_out_reference)
    figures = {"loss": -F.logsigmoid(found), "accuracy": (found > 0).float(), "margin": found}
    return {name: value.mean().item() for name, value in figures.items()}


def train(
    trainer: NSPO2DPOTrainer,
    data: Data,
    looks: int = LOOKS,
    stride: int = 1,
    prepare: Callable[[NSPO2DPOTrainer], object] | None = None,
) -> Found:
    """Train as `trainer.train()` would that logs at `looks` points of the run and evaluates at each `stride`-th.

    Args:
        prepare: called when optimizer and schedule are there.
    """
    args, noise, run = trainer.args, trainer.nspo2, Found()
    steps = trainer.state.max_steps = args.max_steps
    batches = order(trainer, steps)
    trainer.create_optimizer_and_scheduler(steps)
    if prepare:
        prepare(trainer)
    if noise:
        trainer.nspo2_samples.attach()
    trainer.model.train()
    share = 1 / args.gradient_accumulation_steps
    stops = {round(steps * i / looks): i % stride == 0 for i in range(1, looks + 1)}
    for step, batch in enumerate(batches, 1):
        start = time.process_time()
        losses = take_step(trainer, [lambda rows=rows: backward(trainer, data, rows, share) for rows in batch])
        trainer.lr_scheduler.step()
        trainer.state.global_step = step
        run.losses.append(sum(losses))
        run.seconds += time.process_time() - start
        if noise and step in stops:  # what the trainer does with NSPO2's figures when it logs
            figures = noise.metrics(args.train_batch_size * args.gradient_accumulation_steps)
            noise.watch({name: figures[name] for name in ("bias", "alpha") if name in figures})
            run.figures.append(figures)
        if stops.get(step):
            run.curve.append({"step": step} | evaluate(trainer, data))
            if noise:
                noise.watch({"eval_loss": run.curve[-1]["loss"]})
    return run
