"""The table of options: each name, its default, range and meaning, once.

From it come [`NSPO2Config`], the trainers' `nspo2_` fields, their help and docs/options.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import Field, dataclass, fields
from typing import Any

from .rows import check, is_int, is_number, one_of, option, whole

REMOVED = {
    "shrinkage": "it was never shown to help; leave it out",
    "min_rank": "it removed noise that is not known; leave it out (`NSPO2Config` still has it, for tests)",
    "epsilon": "leave it out (`NSPO2Config` still has it)",
    "seed": "leave it out (`NSPO2Config` still has it)",
}


def refuse_removed(given: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `ValueError` with what to do, where `given` has an option that earlier versions had."""
    for name, words in REMOVED.items():
        if f"{prefix}{name}" in given and not (prefix == "" and name in OPTIONS):
            raise ValueError(f"`{prefix}{name}` is no option any more: {words}.")
    if given.get(f"{prefix}strategy") == "auto":
        raise ValueError(f"`{prefix}strategy='auto'` is gone: set `{prefix}strategy` to 'keep', where it started.")


@dataclass(eq=False)
class NSPO2Config(MutableMapping):
    """Options of NSPO2, readable and writable as attributes or as a mapping (`config["strategy"] = "noise"`).

    Every value is checked when it is set; combinations (ranks against each other) when the config is made or used.

    Raises:
        ValueError: a value is out of range; the message names the option and what it must be.
    """

    dim: int | None = option(
        None,
        lambda v: v is None or is_int(v) and v > 0,
        "a positive whole number, or left out",
        "Entries of the gradient given to `NSPO2.hook`, which checks it; elsewhere without effect.",
        trainer=None,
    )
    strategy: str = one_of(
        "hybrid",
        "noise",
        "keep",
        help="Which directions are removed: `noise` the strongest noise directions, `keep` the same without what lies "
        "along the running mean gradient, `hybrid` half and half. `keep` is the trainers' default because it leaves "
        "the mean gradient as it is, so that neither trust region nor bias bound has to hold the projection back.",
        trainer="keep",
    )
    projection_rank: int = whole(
        16,
        "Directions removed per block, at most; with `factored` this is for a matrix of mean width, and narrower ones "
        "have more, wider ones fewer in proportion. Lower it if `nspo2/signal_removed` is high. 0 measures the noise "
        "and removes nothing: training is bit-identical to TRL's. 8 of `factored` remove more than 16 of `adapter`.",
        note=" (0 projects nothing)",
        trainer=8,
    )
    update_freq: int = whole(
        10,
        "Optimizer steps between two eigensolves, at most: one comes earlier where the buffer of 2 `max_rank` noise "
        "rows is full. Steps before the first one are plain; lower it for runs of less than some 50 steps.",
        least=1,
        note=" (steps between eigensolves)",
        trainer=5,
    )
    trust_radius: float = option(
        0.1,
        lambda v: is_number(v) and v > 0,
        "a number above 0 (0.1 lets the mean move by 10 %)",
        "How far the filter may move the running mean gradient, as a share of its norm. Idle for `keep`.",
    )
    target_bias: float = option(
        0.05,
        lambda v: is_number(v) and 0 < v <= 1,
        "a number above 0 and at most 1",
        "Upper bound on 1 - cos(running mean, filtered mean); the rank is lowered until it holds. Idle for `keep`; 1 "
        "switches it off.",
    )
    max_rank: int = whole(
        32,
        "Noise directions tracked per block, at least `projection_rank`; where it is not set, the trainers take 5/4 "
        "of that, with `adapter` twice. Most of the memory: up to three times this many floats per adapter parameter "
        "with `adapter`, with `factored` twice, divided by the LoRA rank.",
        least=1,
    )
    min_rank: int = whole(
        0,
        "The rank in force does not fall below this, even for `target_bias`. For tests and benchmarks.",
        trainer=None,
    )
    cov_momentum: float = option(
        0.97,
        lambda v: is_number(v) and 0 <= v < 1,
        "a number from 0 to below 1 (decay per step)",
        "Decay per step of the noise covariance and of the running mean: 0.97 averages over some 33 steps. Lower it "
        "where the noise changes fast.",
    )
    covariance: str = one_of(
        "adapter",
        "factored",
        help="`adapter`: a whole LoRA adapter is one vector. `factored`: one side of each of its matrices, whose "
        "every row or column is a sample: less state by the LoRA rank, found from fewer steps. The trainers' default: "
        "at most AdamW's state in all, and more noise removed in the runs that were measured.",
        trainer="factored",
    )
    apply_to: str = one_of(
        "gradient",
        "update",
        help="`gradient`: filter the gradient before the optimizer. `update`: let the optimizer step and filter what "
        "it changed, which holds exactly with Adam too; needs one more copy of the adapters.",
    )
    sentinel: bool = option(
        True,
        lambda v: isinstance(v, bool),
        "true or false",
        "Whether a breach (bias above the target, a trust region that holds most of the projection back, a rising "
        "`eval_loss`) lowers the rank, then takes a milder strategy, then ends the projection.",
    )
    eigensolver: str = one_of(
        "gram",
        "exact",
        "randomized",
        help="`gram`: in the space of the samples. `exact`: d × d matrices, for up to 4,096 entries and one process. "
        "`randomized`: saves time only with very many rows.",
    )
    basis_dtype: str = one_of(
        "float32",
        "bfloat16",
        help="`bfloat16`: directions, buffered noise rows and running mean in half the memory; the maths stays in "
        "float32.",
        trainer="bfloat16",
    )
    strength: float = option(
        1.0,
        lambda v: is_number(v) and 0 <= v <= 1,
        "a number from 0 to 1 (1 is full projection)",
        "Share of the component in the noise directions that is removed.",
    )
    anneal: float = option(
        0.0,
        lambda v: is_number(v) and 0 <= v <= 1,
        "a number from 0 to 1 (share of training, 0 is never)",
        "Share of training over which the strength falls linearly to 0; 0 keeps it constant. The optimizer wrapper "
        "needs `set_progress` for it.",
    )
    epsilon: float = option(
        1e-6,
        lambda v: is_number(v) and 0 < v < 1,
        "a number above 0 and below 1",
        "Eigenvalues below this share of the largest one count as zero.",
        trainer=None,
    )
    seed: int = option(
        42,
        is_int,
        "a whole number",
        "Seed of the randomized eigensolver and of the mixtures of rows that `factored` keeps.",
        trainer=None,
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> NSPO2Config:
        refuse_removed(kwargs)  # here, since the dataclass's own constructor would only say that it does not know it
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_options(dict(self))

    def __setattr__(self, name: str, value: Any) -> None:
        check_options({name: value})
        super().__setattr__(name, value)

    def __getitem__(self, name: str) -> Any:
        if name not in OPTIONS:
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"`{name}` cannot be deleted from an NSPO2Config; set it to another value.")

    def __iter__(self) -> Iterator[str]:
        return iter(OPTIONS)

    def __len__(self) -> int:
        return len(OPTIONS)


OPTIONS: dict[str, Field] = {f.name: f for f in fields(NSPO2Config)}


def check_options(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `ValueError` with one sentence that names the option and the fix, for the first bad value in `options`.

    Args:
        options: field names of [`NSPO2Config`] with their values; missing ones are not looked at.
        prefix: what users put before the name where they typed it (`"nspo2_"` in the trainer's config).
    """
    refuse_removed({f"{prefix}{name}": value for name, value in options.items()}, prefix)
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"`{prefix}{name}` is no option of NSPO2. The options are: {', '.join(OPTIONS)}.")
        check(OPTIONS[name], f"{prefix}{name}", value)
    high = options.get("max_rank")
    for name in ("projection_rank", "min_rank"):
        rank = options.get(name)
        if rank is not None and high is not None and rank > high:
            raise ValueError(
                f"`{prefix}{name}` ({rank}) is above `{prefix}max_rank` ({high}), the number of directions that are "
                f"tracked: raise `{prefix}max_rank` to at least {rank}."
            )


def get_default_config(dim: int | None = None, **overrides: Any) -> NSPO2Config:
    """The published defaults of NSPO2 (strategy `hybrid`, rank 16, update every 10 steps, …).

    Args:
        dim: number of entries of the gradient; may be left out.
        overrides: other options of [`NSPO2Config`].

    Raises:
        ValueError: an unknown option or a value out of range.
    """
    check_options(overrides)
    return NSPO2Config(dim=dim, **overrides)
