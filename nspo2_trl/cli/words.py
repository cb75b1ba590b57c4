"""What is read before it is understood: words of a command line as people spell them, files of other commands."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

LIST = re.compile(r"[\[(]?\s*[\w.'\" +-]+(,[\w.'\" +-]+)*,?\s*[\])]?")  # and no regular expression with a comma


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean …?` with the known name that is most like this one, or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f" Did you mean `{near[0]}`?" if near else ""


def refuse_unknown(word: str, known: Sequence[str]) -> None:
    """Raises `ValueError` where `word`, of a command line, is an option that is none of `known`."""
    flag = word.split("=")[0]
    if flag.startswith("--") and flag not in known:
        raise ValueError(f"There is no option `{flag}`.{nearest(flag, known)}")


def apart(argv: Sequence[str], options: Collection[str]) -> list[str]:
    """`argv` with `--option=value` of these options as two words."""
    return [part for word in argv for part in (word.split("=", 1) if word.split("=")[0] in options else [word])]


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """A file that another command wrote; raises `ValueError` where it is no JSON, or lacks one of `keys`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it has no `{missing[0]}`")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}): run the command that wrote it again.") from error
    return found


def with_config(argv: Sequence[str]) -> list[str]:
    """`argv` with `--config RECIPE` where it says `RECIPE.yaml` or `--config=RECIPE`."""
    argv = apart(argv, ["--config"])
    if "--config" in argv:
        return argv
    for i, word in enumerate(argv):
        alone = i == 0 or not argv[i - 1].startswith("-")  # else it is the value of an option
        if alone and (i == 0 or word.lower().endswith((".yaml", ".yml"))) and not word.startswith("-"):
            return ["--config", word, *argv[:i], *argv[i + 1 :]]
    return argv


def split_list(text: str) -> list[str]:
    """The words of `a,b`, `[a, b]` or `'a'`; anything else is one word."""
    if not LIST.fullmatch(text):
        return [text]
    return [word for part in text.strip("[]() ").split(",") if (word := part.strip("'\" "))]


def spell_out(argv: Sequence[str], lists: Collection[str]) -> list[str]:
    """`argv` with one word for each value of the options `lists`, and no number that looks like an option.

    Raises:
        ValueError: a value in braces is no JSON.
    """
    words: list[str] = []
    option = ""
    for word in apart(argv, lists):
        if word.startswith("--"):
            option = word
        elif re.fullmatch(r"-\.?\d[\d.]*(e[+-]?\d+)?|-inf", word, re.I):
            word = f" {word}"  # argparse takes -1e-3 for an option, and converts this
        elif word.startswith("{"):
            try:
                json.loads(word)
            except json.JSONDecodeError as error:
                raise ValueError(f"`{option.removeprefix('--')}` is no JSON: {error}.") from error
        words += split_list(word) if option in lists and word != option else [word]
    return words
