"""The table of options of retained knowledge, in the rows that `config` has for the noise filter."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields

from .rows import check, is_number, one_of, option, whole


@dataclass
class RetainConfig:
    """How a run keeps what the model does on retained texts; the trainers' fields have the prefix `nspo2_retain_`.

    Raises:
        ValueError: a value is out of range; the message names the option and what it must be.
    """

    dataset: str | None = option(
        None,
        lambda v: v is None or isinstance(v, str) and v != "",
        "a hub id, a folder, a file, `self`, or left out",
        "Texts on which the model is to stay as it is: hub id, folder or file with a column `text`, `messages`, or "
        "`prompt` and `completion`; `self`: the frozen model writes them before training. A fifth is held out and "
        "measured on at each evaluation. Left out, nothing is retained.",
    )
    samples: int = whole(256, "Retained texts that are used.", least=2)
    max_length: int = whole(256, "Tokens of each retained text; the rest is cut.", least=2)
    kl: float = option(
        2.0,
        lambda v: is_number(v) and v >= 0,
        "a number of at least 0 (0 is no KL term)",
        "Weight of the KL term, the mean over tokens of KL(frozen ‖ policy) on a few retained texts per step. It is "
        "part of the logged `loss`.",
    )
    kl_samples: int = whole(1, "Retained texts of the KL term per micro-batch and process.", least=1)
    project: str = one_of(
        "after",
        "during",
        "no",
        help="`after`: at the end of training, take the directions that retained texts use out of each `lora_A`; the "
        "adapter as it was is kept in `unprojected/`. `during`: train in their null space, which is exact at each "
        "step, but learns less than without. `no`: neither.",
    )
    rank: int = whole(12, "Directions taken out of each input; few are best.", least=1)
    scale: float = option(
        1.2,
        lambda v: is_number(v) and v > 0,
        "a number above 0",
        "What is left of `lora_A` after training is multiplied by this.",
    )

    def __post_init__(self) -> None:
        check_retain(vars(self))


RETAIN_OPTIONS: dict[str, Field] = {f.name: f for f in fields(RetainConfig)}


def check_retain(options: dict, prefix: str = "") -> None:
    """Raise `ValueError` with one sentence for the first bad value in `options`, fields of [`RetainConfig`]."""
    for name, value in options.items():
        check(RETAIN_OPTIONS[name], f"{prefix}{name}", value)
