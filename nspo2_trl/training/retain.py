"""`retain_adapter`: project a trained adapter off what retained texts use, and measure what that gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..layout.roles import InputAdapter, input_adapters, unprotected
from ..projections.retain.collect import InputSpace, collect, mean_leakage
from ..projections.retain.measure import retention
from ..projections.retain.passes import Frozen
from ..projections.retain.project import FORMS, Point, put, starts
from ..projections.retain.saved import collect_once
from ..projections.retain.texts import SKIP_TOKENS, Batch, batches, check_texts, hold_out, tokenize
from .loading import load
from .self_texts import SELF, self_texts

Texts: TypeAlias = str | Dataset | IterableDataset | Sequence[str]


def retain_adapter(
    model: PeftModel,
    retain_dataset: Texts,
    processing_class: PreTrainedTokenizerBase,
    rank: int = 12,
    scale: float = 1.2,
    form: str = "hard",
    adapter_name: str = "default",
    samples: int = 256,
    max_length: int = 512,
    skip: int = SKIP_TOKENS,
    frozen: Frozen | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Project a LoRA adapter, in place, off the directions that its modules' inputs have on retained texts.

    A ← scale · A (I - K Kᵀ) for each adapted linear module, K the `rank` strongest directions of what the frozen model
    feeds into it. Trained for anything and by anything, the adapter stays a plain PEFT adapter.

    Args:
        model: with the adapter, not merged.
        retain_dataset: texts that the model is to go on reading as before: hub id, folder, file, `Dataset` with
            `text`, `messages`, or `prompt` and `completion`, or a list of texts; `"self"`: the frozen model writes
            them, see [`self_texts`]. A fifth is held out to measure on.
        processing_class: the model's tokenizer.
        rank: directions taken out of each input. scale: of what is left. form: `"hard"` or `"ridge"`.
        samples: texts used. max_length: tokens of each. skip: first tokens of each that do not count.
        frozen: enters the state of the model that is to be kept; the base model if left out.
        cache_dir: where the directions are kept for the next call; nowhere if left out.

    Returns:
        `rank`, `scale`, `form`; `tokens` learned from; `kl` and `loss_rise` (nats per token) on held-out retained
        texts, and both as they were `before`; `leakage`, the share of held-out energy outside K, mean over inputs;
        `unprotected`, names of the adapter's parameters that the projection does not reach, by kind.

    Raises:
        ValueError: no such LoRA adapter, one on other than linear layers, or texts or options that cannot work.
    """
    point = Point(rank, scale, form)
    check_point(point)
    adapters = sound_adapters(model, adapter_name)
    with active(model, adapter_name):
        texts = retained_texts(
            model, retain_dataset, processing_class, samples, max_length, folder=cache_dir, frozen=frozen
        )
        learned, held_out = hold_out(texts)
        tokens = check_texts(learned, model, rank, skip)
        measured = retained_batches(held_out, processing_class)
        spaces = input_spaces(model, adapters, learned, measured, processing_class, rank, cache_dir, frozen, skip)
        points = [partial(put, adapters, starts(adapters), spaces, point) for point in (Point(0, 1.0), point)]
        before, after = retention(model, measured, points, frozen=frozen)
    return {
        **{"rank": rank, "scale": scale, "form": form, "tokens": tokens},
        **after,
        "before": before,
        "leakage": mean_leakage(spaces, rank),
        "unprotected": unprotected(model, adapter_name),
    }


CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of PEFT's `init_lora_weights`


def sound_adapters(model: PeftModel, adapter_name: str) -> list[InputAdapter]:
    """See [`input_adapters`]; `ValueError` for NaN or Inf too, and where the adapter's start changed the base."""
    found = input_adapters(model, adapter_name)
    start = getattr(model.peft_config[adapter_name], "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"The adapter {adapter_name!r} has `init_lora_weights={start!r}`: it holds a part of the base model's "
            "weights, which the projection would remove. Convert it to a plain adapter with PEFT's "
            "`path_initial_model_for_weight_conversion`; without the adapter's start, or with LoftQ, train it anew "
            "without that option."
        )
    own = (param for name, param in model.named_parameters() if f".{adapter_name}." in name and "lora_" in name)
    if not all(torch.isfinite(param).all() for param in own):
        raise ValueError(f"The adapter {adapter_name!r} has NaN or Inf in its weights: its training diverged.")
    return found


def check_point(point: Point) -> None:
    """Raises `ValueError` where an option is out of its range."""
    if point.rank < 0 or point.rank != int(point.rank):
        raise ValueError(f"`rank` must be a whole number, 0 or more, got {point.rank}.")
    if not 0 < point.scale < float("inf"):
        raise ValueError(f"`scale` must be a number above 0, got {point.scale}.")
    if point.form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {point.form!r}.")


def retained_texts(
    model: PeftModel,
    dataset: Texts,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    max_length: int,
    option: str = "retain_dataset",
    **writing: Any,
) -> list[list[int]]:
    """Token ids of the texts; see [`texts.tokenize`]. Of a dataset by name the split `train`, or else the first.

    Args:
        writing: arguments of [`self_texts`], for a `dataset` that is `"self"`.
    """
    if isinstance(dataset, str) and dataset == SELF:
        return self_texts(model, tokenizer, samples, max_length, option, **writing)
    if isinstance(dataset, str):
        needs = "it needs rows with `text`, `messages`, or `prompt` and `completion`"
        found = load(dataset, option=option, needs=needs)
        dataset = found["train"] if "train" in found else next(iter(found.values()))
    return tokenize(dataset, tokenizer, samples, max_length, option=option)


def retained_batches(texts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    return batches(texts, tokenizer.pad_token_id or 0)


def input_spaces(
    model: PeftModel,
    adapters: Sequence[InputAdapter],
    texts: list[list[int]],
    held_out: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
    cache_dir: str | Path | None,
    frozen: Frozen | None = None,
    skip: int = SKIP_TOKENS,
) -> list[InputSpace]:
    """What `adapters` are handed on `texts`; none at rank 0. See [`saved.collect_once`]."""
    if rank == 0:
        return []
    reading = retained_batches(texts, tokenizer)
    if cache_dir is None:
        return collect(model, adapters, reading, held_out, rank, frozen, skip)
    return collect_once(model, adapters, reading, held_out, rank, cache_dir, frozen, skip)


@contextmanager
def active(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """`adapter_name` alone is active, and what needs gradients needs them afterwards as before."""
    base: Any = model.base_model
    names, wants = list(model.active_adapters), [param.requires_grad for param in model.parameters()]
    base.set_adapter(adapter_name)
    try:
        yield
    finally:
        base.set_adapter(names)
        for param, want in zip(model.parameters(), wants):
            param.requires_grad_(want)
