"""The recipe: a YAML file whose keys are options; keys and values are checked before they become defaults."""

from __future__ import annotations

from argparse import Action, ArgumentParser
from pathlib import Path
from typing import Any

import yaml

from ..config import refuse_removed
from .words import nearest, split_list


def read_recipe(path: Path, parser: ArgumentParser) -> dict[str, Any]:
    """Options and their values; `env` is a mapping of variables.

    Raises:
        ValueError: no YAML mapping, a key that is no option, a value that is none for it.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {str(path)!r} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {str(path)!r} must be a YAML mapping of option names to values.")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    refuse_removed(recipe, prefix="nspo2_")
    known = [*actions, "env"]
    for key, value in recipe.items():
        if key not in known:
            raise ValueError(f"The recipe {str(path)!r} sets `{key}`, which is no option.{nearest(str(key), known)}")
        try:
            recipe[key] = _value(actions[key], value) if key in actions else dict(value or {})
        except (TypeError, ValueError) as error:
            raise ValueError(f"The recipe {str(path)!r}: `{key}` must be {error}, got {value!r}.") from error
    return recipe


def _value(action: Action, value: Any) -> Any:
    """What the option takes for `value`; raises `ValueError` with what it must be."""
    number = action.type in (int, float)
    if action.nargs == "+" and action.type in (str, int, float) and value is not None:
        values = split_list(value) if isinstance(value, str) else value if isinstance(value, list) else [value]
        try:
            return [action.type(one) for one in values]
        except (TypeError, ValueError) as error:
            raise ValueError("a list of numbers") from error
    if number and isinstance(value, (list, dict, bool)):
        raise ValueError("a number")
    choices = [str(choice) for choice in action.choices or ()]
    if value is False and "no" in choices:  # what `no` is in YAML
        return "no"
    if isinstance(value, str) and choices and value not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    return value
