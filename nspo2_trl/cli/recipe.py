"""The options, and the recipe: a YAML file whose keys are options; keys and values are checked by their types."""

from __future__ import annotations

import os
from argparse import Action
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from ..config import refuse_removed
from ..training.options import NSPO2DPOConfig
from .data import NSPO2ScriptArguments
from .words import nearest, split_list

KINDS = (NSPO2ScriptArguments, NSPO2DPOConfig, ModelConfig, DatasetMixtureConfig)
# for each option what it takes: `list`, `dict`, `str` and so on
TAKES = {
    name: {get_origin(part) or part for part in (hint, *get_args(hint))}
    for kind in KINDS
    for name, hint in get_type_hints(kind).items()
}

FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # of those that take `dict`: a file too


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two values one would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"`{twice[0]}` stands twice, line {node.start_mark.line + 1} and on")
        return super().construct_mapping(node, deep)


def make_parser() -> TrlParser:
    parser = TrlParser(KINDS)  # type: ignore[arg-type]  # TRL's name for a dataclass type fits none
    for action in parser._actions:
        if list in TAKES.get(action.dest, ()):
            action.nargs = "+"  # where a word fits too, TRL's takes only that
    return parser


def read_recipe(path: Path, parser: TrlParser) -> dict[str, Any]:
    """Options and their values; `env` is a mapping of variables.

    Raises:
        ValueError: no YAML mapping, a key that is no option, a value that is none for it.
    """
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
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
            if key == "env" and not isinstance(value, dict):
                raise ValueError("a mapping")
            recipe[key] = _value(actions[key], value) if key in actions else value
        except ValueError as error:
            raise ValueError(f"The recipe {str(path)!r}: `{key}` must be {error}, got {value!r}.") from error
    return recipe


def mapping(name: str, value: Any) -> Any:
    """`value`, for an option that takes a mapping, as JSON too, or the file of one; else raises `ValueError`."""
    a_file = name in FILES and isinstance(value, str) and os.path.isfile(value)
    if value is None or isinstance(value, dict) or a_file or isinstance(value, str) and value.startswith("{"):
        return value
    file = ", or a file of one" if name in FILES else ""
    raise ValueError(
        f"a mapping{file}" if not isinstance(value, str) else f"a mapping as JSON, '{{\"key\": 1}}'{file}"
    )


def _value(action: Action, value: Any) -> Any:
    """What the option takes for `value`; raises `ValueError` with what it must be."""
    number, takes = action.type in (int, float), TAKES[action.dest]
    if dict in takes:
        return mapping(action.dest, value)
    if action.nargs == "+" and action.type in (str, int, float) and value is not None:
        values = split_list(value) if isinstance(value, str) else value if isinstance(value, list) else [value]
        try:
            return [action.type(one) for one in values]
        except (TypeError, ValueError) as error:
            raise ValueError("a list of numbers") from error
    if isinstance(value, (list, dict)) and type(value) not in takes and takes & {str, bool, int, float}:
        raise ValueError("a number" if number else "true or false" if bool in takes else "text")
    if number and isinstance(value, bool):
        raise ValueError("a number")
    if action.type is str and type(value) in (int, float):
        return str(value)
    choices = [str(choice) for choice in action.choices or ()]
    if value is False and "no" in choices:  # what `no` is in YAML
        return "no"
    if isinstance(value, str) and choices and value not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    return value
