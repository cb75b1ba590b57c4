"""Kinds of text that a model may forget: prose, Python source, arithmetic, chat answers. No network."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nspo2_trl.training.retain import retained_texts

from . import ROOT

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


def _of(paths: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Token ids of the texts of files and folders; nothing is written by a model, so none is needed."""
    count, option = 2 * GIVEN_CHUNKS, "--retain"
    return [text for path in paths for text in retained_texts(None, path, tokenizer, count, length, option)]


def given_texts(paths: list[str], tokenizer: Any, length: int) -> list[str]:
    """The texts that the method is given, `length` tokens each; the prose that is not held out if no path is given."""
    ids = _of(paths, tokenizer, length)
    if ids:
        ids = [text for i, text in enumerate(ids) if i % 5 != 4]
    return [tokenizer.decode(piece) for piece in ids or chunks(topics(False), tokenizer, length, GIVEN_CHUNKS)]


def domains(paths: list[str], tokenizer: Any, length: int, count: int) -> dict[str, list[list[int]]]:
    """Token ids to measure on, by kind of text; the first kind is held out of what the method is given."""
    ids = _of(paths, tokenizer, length)
    given = [text for i, text in enumerate(ids) if i % 5 == 4][:count]
    return {
        "prose": given or chunks(topics(True), tokenizer, length, count),
        "python": chunks(source(), tokenizer, length, count),
        "arithmetic": chunks(arithmetic(), tokenizer, length, count),
        "chat": [ids[:length] for ids in chat(tokenizer)[:count]],
    }
