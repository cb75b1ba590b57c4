"""Retained texts where there are none: the frozen model writes them itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..projections.retain.passes import Frozen, reading
from ..projections.retain.saved import key_of

SELF = "self"  # in the place of a dataset's name
AT_ONCE = 32  # texts written side by side
SHORT = 8  # a text of fewer tokens has ended at once
RUN = 4  # tokens of a run that a text may repeat
MARK = "USERTEXT"  # shows where a chat template puts the user's text

PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "use_cache": True}

logger = logging.getLogger(__name__)


def self_texts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    max_length: int,
    option: str = "retain_dataset",
    seed: int = 0,
    folder: str | Path | None = None,
    frozen: Frozen | None = None,
) -> list[list[int]]:
    """Token ids of at most `samples` texts of up to `max_length` tokens that the frozen model samples, temperature 1.

    A base model starts from its first token. A chat model is given its template up to the user's text, writes that,
    and then the answer (Magpie, arXiv 2406.08464). The main process writes for all; the random state is left alone.

    Args:
        option: what messages call it. folder: where texts are kept for the next call, as `self-KEY.json`, KEY a hash
            of the frozen model and the settings. frozen: enters its state; `model.disable_adapter` if left out.

    Raises:
        ValueError: a reward model, a sharded one, a chat template that does not fit, or all texts are empty.
    """
    name = f"`{option}: {SELF}`"
    sharded = any(isinstance(param, DTensor) or hasattr(param, "ds_id") for param in model.parameters())
    if sharded or model.get_output_embeddings() is None:
        what = "a model that is sharded when it is loaded (ZeRO-3)" if sharded else "a reward model"
        raise ValueError(f"{name}: {what} cannot write texts: name texts instead.")
    length = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", max_length))
    prefix, closing = _user_turn(tokenizer, name) if tokenizer.chat_template else ([], "")
    if 2 * len(prefix) > length:
        raise ValueError(f"{name}: the chat template takes {len(prefix)} of {length} tokens: allow longer texts.")
    settings = [SELF, samples, length, seed, tokenizer.chat_template, tokenizer.bos_token_id]
    path = Path(folder or "") / f"self-{key_of(model, [], settings, whole=frozen is not None)}.json"
    texts: list[list[int]] = []
    if PartialState().is_main_process and folder is not None and path.is_file():
        texts = json.loads(path.read_text())
    elif PartialState().is_main_process:
        enter: Any = frozen or model.disable_adapter
        with reading(model), enter(), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            for start in tqdm(range(0, samples, AT_ONCE), "Writing texts to retain", leave=False, delay=1):
                texts += _write(model, tokenizer, min(AT_ONCE, samples - start), length, prefix, closing)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").write_text(json.dumps(texts))
            path.with_suffix(".part").replace(path)  # whole or absent
    shared = [texts]
    broadcast_object_list(shared)
    if not shared[0]:
        raise ValueError(f"{name}: all that the model writes is empty: name texts instead.")
    if (trouble := degenerate(shared[0], samples, len(prefix))) and PartialState().is_main_process:
        logger.warning("%s: %s. Such texts retain little: name texts instead.", name, trouble)
    return shared[0]


def degenerate(texts: Sequence[Sequence[int]], samples: int, prefix: int = 0) -> str | None:
    """What is wrong with most of `texts`, if anything: they end at once, repeat themselves, or are all the same.

    Args:
        samples: how many were asked for; those that are missing were empty. prefix: tokens that all begin with.
    """
    own = [tuple(ids[prefix:]) for ids in texts]
    long = [ids for ids in own if len(ids) >= SHORT]
    if 2 * len(long) < samples:
        return f"{samples - len(long)} of {samples} texts that the model wrote end at once"
    runs = [[ids[i : i + RUN] for i in range(len(ids) - RUN + 1)] for ids in long]
    repeating = sum(2 * len(set(found)) < len(found) for found in runs)
    if 2 * repeating > len(long):
        return f"{repeating} of {samples} texts that the model wrote repeat themselves"
    if 2 * len(set(long)) < len(long):
        return f"only {len(set(long))} of {samples} texts that the model wrote differ"
    return None


def _user_turn(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[list[int], str]:
    """Token ids of the chat template up to the user's text, and what stands after that text."""
    turn = [{"role": "user", "content": MARK}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, mark, after = text.partition(MARK)
    prefix: Any = tokenizer(before, add_special_tokens=False)["input_ids"]
    if not mark or not prefix:
        raise ValueError(f"{name}: nothing in the chat template comes before the user's text: name texts instead.")
    return prefix, after


def _write(model: Any, tokenizer: Any, count: int, length: int, prefix: list, closing: str) -> list[list[int]]:
    """At most `count` texts; empty ones are left out."""
    special = set(tokenizer.all_special_ids)
    if not prefix:
        first = [tokenizer.bos_token_id] * count
        if tokenizer.bos_token_id is None:
            known = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
            first = known[torch.randint(len(known), (count,))].tolist()
        return [ids for ids in _continue(model, tokenizer, [[i] for i in first], length) if set(ids[1:]) - special]
    after = set(tokenizer(closing, add_special_tokens=False)["input_ids"][:1]) & special
    begun = _continue(model, tokenizer, [prefix] * count, (length + len(prefix)) // 2, after)
    asked = [tokenizer.decode(ids[len(prefix) :], skip_special_tokens=True) for ids in begun]
    if closing.strip():  # a template may close the turn with plain words
        asked = [text.partition(closing.strip())[0] for text in asked]
    turns = [[{"role": "user", "content": text.strip()}] for text in asked if text.strip()]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
    prompts = [ids for ids in prompts if len(ids) < length]
    return _continue(model, tokenizer, prompts, length) if prompts else []


def _continue(model: Any, tokenizer: Any, starts: list, length: int, stops: Iterable[int] = ()) -> list[list[int]]:
    """`starts` and what the model writes after each, up to `length` tokens with the one that ends it."""
    own = model.generation_config.eos_token_id
    ends = {*stops, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    longest, pad, device = max(map(len, starts)), tokenizer.pad_token_id or 0, next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(start)) + start for start in starts], device=device)
    mask = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in starts], device=device)
    limits = {"max_new_tokens": length - longest, "eos_token_id": sorted(ends) or None, "pad_token_id": pad}
    config = GenerationConfig(**PLAIN, **limits)
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    last = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in written]
    return [start + row[:stop] for start, row, stop in zip(starts, written, last)]
