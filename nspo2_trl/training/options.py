"""The trainers' configs: TRL's, and the options of NSPO2 with the prefix `nspo2_`, made from the table in `config`."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from trl import DPOConfig

from ..config import OPTIONS, NSPO2Config, check_options, refuse_removed
from ..retain_config import RETAIN_OPTIONS, check_retain
from ..rows import SAME

if TYPE_CHECKING:
    from transformers import TrainingArguments
else:
    TrainingArguments = object  # the options have no base of their own, so that they can go before any config

TRAINER_OPTIONS = {name: row for name, row in OPTIONS.items() if row.metadata["trainer"] is not None}
TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def nspo2_options(args: object) -> dict:
    """The options of [`NSPO2Config`] that `args`, a trainer's config, has with the prefix `nspo2_`."""
    found = {name: getattr(args, f"nspo2_{name}") for name in OPTIONS if hasattr(args, f"nspo2_{name}")}
    if found["max_rank"] is None and isinstance(found["projection_rank"], int):
        found["max_rank"] = default_max_rank(found["projection_rank"], found["covariance"])
    return found


def default_max_rank(projection_rank: int, covariance: str) -> int:
    """Directions tracked where `max_rank` is not set; `factored` has all rows to learn them from, and needs fewer."""
    return max(1, 2 * projection_rank if covariance == "adapter" else projection_rank + projection_rank // 4)


def trainer_config() -> NSPO2Config:
    """The trainers' defaults."""
    return NSPO2Config(**nspo2_options(NSPO2Arguments))


def retain_options(args: object) -> dict:
    """The options of [`RetainConfig`] that `args`, a trainer's config, has with the prefix `nspo2_retain_`."""
    return {name: getattr(args, f"nspo2_retain_{name}", row.default) for name, row in RETAIN_OPTIONS.items()}


def _fields() -> list[tuple]:
    """Each option as a field with the prefix, the trainers' default and a help text that argparse can format."""
    rows = []
    for name, row in TRAINER_OPTIONS.items():
        default = row.default if row.metadata["trainer"] is SAME else row.metadata["trainer"]
        kind: Any = TYPES[str(row.type)]
        if name == "max_rank":  # follows `projection_rank` where it is not set
            kind, default = int | None, None
        words = row.metadata["help"]
        for other in OPTIONS:
            words = words.replace(f"`{other}`", f"`nspo2_{other}`")
        rows.append((f"nspo2_{name}", kind, field(default=default, metadata={"help": words.replace("%", "%%")})))
    for name, row in RETAIN_OPTIONS.items():
        kind = str | None if name == "dataset" else TYPES[str(row.type)]
        words = row.metadata["help"].replace("%", "%%")
        rows.append((f"nspo2_retain_{name}", kind, field(default=row.default, metadata={"help": words})))
    return rows


class _Checked(TrainingArguments):
    if TYPE_CHECKING:  # the fields are made below

        def __getattr__(self, name: str) -> Any: ...

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        refuse_removed(kwargs, prefix="nspo2_")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_options(nspo2_options(self), prefix="nspo2_")
        check_retain(retain_options(self), prefix="nspo2_retain_")
        super().__post_init__()


_enabled = field(
    default=True, metadata={"help": "Whether to use NSPO2 at all. `false` is exactly the plain TRL trainer."}
)
NSPO2Arguments: Any = make_dataclass(
    "NSPO2Arguments", [("nspo2_enabled", bool, _enabled), *_fields()], bases=(_Checked,)
)
NSPO2Arguments.__module__ = __name__
NSPO2Arguments.__doc__ = (
    "The options of NSPO2 as a trainer's config has them: stand it before a TRL config among bases."
)


@dataclass
class NSPO2DPOConfig(NSPO2Arguments, DPOConfig):
    r"""Configuration class for the [`NSPO2DPOTrainer`]: [`~trl.DPOConfig`] and the `nspo2_` options.

    Raises:
        ValueError: an `nspo2_` option is out of range; the message names it and says what it must be.
    """
