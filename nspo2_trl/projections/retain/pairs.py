"""Held-out preference pairs: DPO's loss, accuracy and margin of a policy against the frozen model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase
from trl.data_utils import extract_prompt, is_conversational

from ...engine.divergence import token_loss
from .passes import Frozen, logits, mine, reading, total
from .texts import TOKENS_A_BATCH, Batch

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids


def tokenize_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 1024) -> list[Pair]:
    """Token ids of pairs as TRL's DPOTrainer makes them; those whose prompt fills `max_length` are left out.

    Args:
        dataset: rows with `chosen`, `rejected` and perhaps `prompt`, text or messages.

    Raises:
        ValueError: no pair is left.
    """
    found: list[Pair] = []
    row: Any  # text or messages
    prompt: Any
    answers: list[Any]
    for row in dataset:
        row = row if "prompt" in row else extract_prompt(row)
        if is_conversational(row):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            talks = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
            answers = [tokenizer.apply_chat_template(talk, return_dict=False) for talk in talks]
        else:
            prompt, end = tokenizer(row["prompt"])["input_ids"], tokenizer.eos_token or ""
            texts = [row[name] if row[name].endswith(end) else row[name] + end for name in ("chosen", "rejected")]
            answers = [tokenizer(row["prompt"] + text)["input_ids"] for text in texts]
        start = min(_common(prompt, answer) for answer in answers)
        if start < max_length:
            chosen, rejected = (list(answer[start:max_length]) for answer in answers)
            found.append({"prompt_ids": list(prompt[:start]), "chosen_ids": chosen, "rejected_ids": rejected})
    if not found:
        raise ValueError(f"No preference pair has a prompt of less than `max_length` ({max_length}) tokens: raise it.")
    return found


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def pair_batches(pairs: Sequence[Pair], pad_token_id: int, tokens: int = TOKENS_A_BATCH) -> list[Batch]:
    """Batches of whole pairs: a chosen and a rejected row each, one after the other, with a `completion_mask`."""
    found: list[Batch] = []
    rows: list[tuple[list[int], int]] = []

    def longest(candidates: list[tuple[list[int], int]]) -> int:
        return max(len(ids) for ids, _ in candidates)

    def close() -> None:
        length = longest(rows)
        found.append(
            {
                "input_ids": torch.tensor([ids + [pad_token_id] * (length - len(ids)) for ids, _ in rows]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
                "completion_mask": torch.tensor(
                    [[0] * start + [1] * (len(ids) - start) + [0] * (length - len(ids)) for ids, start in rows]
                ),
            }
        )

    for pair in sorted(pairs, key=lambda pair: len(pair["prompt_ids"]) + len(pair["chosen_ids"])):
        start = len(pair["prompt_ids"])
        new = [(pair["prompt_ids"] + pair[name], start) for name in ("chosen_ids", "rejected_ids")]
        if rows and longest(rows + new) * (len(rows) + 2) > tokens:
            close()
            rows = []
        rows = rows + new
    close()
    return found


def preference(
    model: nn.Module,
    batches: Sequence[Batch],
    points: Sequence[Callable[[], None]] = (lambda: None,),
    frozen: Frozen | None = None,
    beta: float = 0.1,
) -> list[dict[str, float]]:
    """DPO's `loss` (nats), `accuracy` and `margin` (of rewards) for each point; the frozen pass is made once.

    Args:
        batches: from `pair_batches`, the same on all processes. points, frozen: as in [`measure.retention`].
        beta: DPO's.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(points), 3, dtype=torch.float64, device=device)
    pairs = torch.zeros((), dtype=torch.float64, device=device)
    with reading(model):
        for batch, counts in mine(batches, device, "Measuring preference pairs"):
            with (frozen or model.disable_adapter)():  # type: ignore[operator]
                before = _logps(model, batch)
            for i, put in enumerate(points):
                put()
                rewards = beta * (_logps(model, batch) - before)
                margin = rewards[0::2] - rewards[1::2]
                sums[i] += counts * torch.stack([-logsigmoid(margin), margin > 0, margin]).double().sum(1)
            pairs += counts * len(before) / 2
    sums, pairs = total(sums), total(pairs).clamp_min(1)
    return [dict(zip(("loss", "accuracy", "margin"), map(float, row / pairs))) for row in sums]


def _logps(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(rows,) log-probability of each row's answer, float32."""
    mask = batch["completion_mask"][:, 1:].bool()
    losses = token_loss(logits(model, batch)[:, :-1][mask], batch["input_ids"][:, 1:][mask])
    rows = mask.nonzero()[:, 0]
    return torch.zeros(len(mask), device=losses.device).index_add_(0, rows, -losses)
