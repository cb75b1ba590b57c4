"""Kinds of text that a model may forget: prose, Python source, arithmetic, chat answers. No network."""

from __future__ import annotations

import json
import random
import statistics
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from nspo2_trl.training.retain import retained_texts
from nspo2_trl.training.self_texts import SELF, self_texts

from . import ROOT
from .judge import quickstart

GIVEN_CHUNKS = 160
MODULES = ["heapq", "textwrap", "calendar", "csv", "shlex", "fractions", "bisect", "cmd"]
CHAT = ROOT / "benchmarks/chat.jsonl"


def topics(held_out: bool) -> list[str]:
    """The pages of Python's `help()`; every fifth is held out."""
    from pydoc_data.topics import topics as pages

    return [text for i, (_, text) in enumerate(sorted(pages.items())) if (i % 5 == 4) == held_out]


def source() -> list[str]:
    """Python source of the standard library."""
    return [(Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text() for name in MODULES]


def arithmetic() -> list[str]:
    """Lines such as 12 + 7 = 19."""
    rng = random.Random(0)
    signs = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    lines = []
    for _ in range(2000):
        a, b, sign = rng.randrange(100), rng.randrange(100), rng.choice(list(signs))
        lines.append(f"{a} {sign} {b} = {signs[sign](a, b)}")
    return ["\n".join(lines)]


def chat(tokenizer: Any) -> list[list[int]]:
    """Token ids of questions with answers, in the model's template where it has one."""
    talks = [json.loads(line)["messages"] for line in CHAT.read_text().splitlines()]
    if tokenizer.chat_template is None:
        return [tokenizer(" ".join(turn["content"] for turn in talk))["input_ids"] for talk in talks]
    return [list(tokenizer.apply_chat_template(talk, return_dict=False)) for talk in talks]


def chunks(texts: Iterable[str], tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """`count` pieces of `length` tokens, spread evenly over the texts."""
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return pieces[:: max(1, len(pieces) // count)][:count]


def _of(paths: list[str], tokenizer: Any, length: int, count: int = 2 * GIVEN_CHUNKS) -> list[list[int]]:
    """Token ids of the texts of files and folders."""
    files = [path for path in paths if path != SELF]
    return [text for path in files for text in retained_texts(None, path, tokenizer, count, length, "--retain")]


def given_texts(paths: list[str], model: str, length: int, folder: Path) -> list[str]:
    """The texts that methods are given, `length` tokens each; the prose that is not held out if no path is given.

    `self`: the model writes them, and keeps them in `folder`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    if paths == [SELF]:
        writer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids = self_texts(
            get_peft_model(writer, LoraConfig(target_modules="all-linear")),
            tokenizer,
            GIVEN_CHUNKS,
            length,
            folder=folder,
        )
    else:
        ids = [text for i, text in enumerate(_of(paths, tokenizer, length)) if i % 5 != 4]
    return [tokenizer.decode(piece) for piece in ids or chunks(topics(False), tokenizer, length, GIVEN_CHUNKS)]


def domains(
    paths: list[str], measure: list[str], tokenizer: Any, length: int, count: int
) -> dict[str, list[list[int]]]:
    """Token ids to measure on, by kind of text: those of `measure` (NAME=FILE), or else four kinds.

    Of the four the first is held out of what methods are given.
    """
    if measure:
        return {name: _of([path], tokenizer, length, count) for name, path in (text.split("=", 1) for text in measure)}
    given = [text for i, text in enumerate(_of(paths, tokenizer, length)) if i % 5 == 4][:count]
    return {
        "prose": given or chunks(topics(True), tokenizer, length, count),
        "python": chunks(source(), tokenizer, length, count),
        "arithmetic": chunks(arithmetic(), tokenizer, length, count),
        "chat": [ids[:length] for ids in chat(tokenizer)[:count]],
    }


def right_sums(model: Any, tokenizer: Any, texts: list[list[int]]) -> float:
    """Share of sums that the model does right; see recipes/quickstart/sums.py."""
    sums = [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]
    return quickstart()["right"](model, tokenizer, sums)


def gold(model: Any, tokenizer: Any, prompts: list[str]) -> float:
    """Mean gold score of one fresh answer to each prompt, of those that end; see recipes/quickstart/build.py."""
    made = quickstart()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        answers = made["sample"](model, tokenizer, prompts)
    return statistics.fmean(made["gold_score"](answer) for answer in answers if answer is not None)
