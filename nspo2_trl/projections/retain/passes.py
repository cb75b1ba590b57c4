"""Passes of a model over batches of tokens, shared out among the processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from .texts import Batch

Frozen = Callable[[], AbstractContextManager]  # enters the state that "frozen" means: the model as training found it


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """The model without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def mine(batches: Sequence[Batch], device: torch.device, title: str) -> Iterator[tuple[Batch, bool]]:
    """This process's batches on `device`, and whether each counts.

    All processes get equally many, since a sharded model needs all of them in each pass: the last may be one that
    another process has too, and does not count.
    """
    state = PartialState()
    rank, processes = state.process_index, state.num_processes
    rounds = range(0, len(batches), processes)
    for start in tqdm(rounds, title, leave=False, delay=1, disable=not state.is_main_process):
        batch = batches[min(start + rank, len(batches) - 1)]
        yield {name: tensor.to(device) for name, tensor in batch.items()}, start + rank < len(batches)


def total(part: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' `part`."""
    return reduce(part, reduction="sum")


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(rows, length, vocabulary)"""
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return found.to(batch["input_ids"].device)  # a model may be spread over devices


def last_logit_only(model: nn.Module) -> dict[str, int]:
    """The argument that spares a pass the logits of all tokens but one, where the model has it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
