"""The options of NSPO2: one validated dataclass that is also a mapping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(*allowed: str) -> tuple:
    return (lambda v: v in allowed, "one of " + ", ".join(repr(a) for a in allowed))


# What one value must be, apart from the others: (test, words for the error message).
_CHECKS = {
    "dim": (lambda v: v is None or _is_int(v) and v > 0, "a positive whole number, or left out"),
    "strategy": _one_of("noise", "keep", "hybrid", "auto"),
    "projection_rank": (lambda v: _is_int(v) and v >= 0, "a whole number of at least 0 (0 projects nothing)"),
    "update_freq": (lambda v: _is_int(v) and v >= 1, "a whole number of at least 1 (steps between eigensolves)"),
    "trust_radius": (lambda v: _is_number(v) and v > 0, "a number above 0 (0.1 lets the mean move by 10 %)"),
    "target_bias": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "max_rank": (lambda v: _is_int(v) and v >= 1, "a whole number of at least 1"),
    "min_rank": (lambda v: _is_int(v) and v >= 0, "a whole number of at least 0"),
    "cov_momentum": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1 (decay a step)"),
    "shrinkage": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "covariance": _one_of("adapter", "factored"),
    "apply_to": _one_of("gradient", "update"),
    "sentinel": (lambda v: isinstance(v, bool), "true or false"),
    "eigensolver": _one_of("gram", "exact", "randomized"),
    "basis_dtype": _one_of("float32", "bfloat16"),
    "strength": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1 (1 is full projection)"),
    "anneal": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1 (share of training, 0 is never)"),
    "epsilon": (lambda v: _is_number(v) and 0 < v < 1, "a number above 0 and below 1"),
    "seed": (_is_int, "a whole number"),
}


def check_options(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `ValueError` with one sentence that names the option and the fix, for the first bad value in `options`.

    Args:
        options: field names of [`NSPO2Config`] with their values; missing ones are not looked at.
        prefix: what users put before the name where they typed it (`"nspo2_"` in the trainer's config).
    """
    for name, value in options.items():
        if name not in _CHECKS:
            raise ValueError(f"`{prefix}{name}` is no option of NSPO2. The options are: {', '.join(_CHECKS)}.")
        test, words = _CHECKS[name]
        if not test(value):
            raise ValueError(f"`{prefix}{name}` must be {words}, got {value!r}.")
    rank, low, high = (options.get(name) for name in ("projection_rank", "min_rank", "max_rank"))
    if rank is not None and high is not None and rank > high:
        raise ValueError(
            f"`{prefix}projection_rank` ({rank}) is above `{prefix}max_rank` ({high}), the number of directions that "
            f"are tracked: raise `{prefix}max_rank` to at least {rank}."
        )
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"`{prefix}min_rank` ({low}) is above `{prefix}max_rank` ({high}): lower `{prefix}min_rank` or raise "
            f"`{prefix}max_rank`."
        )


@dataclass(eq=False)
class NSPO2Config(MutableMapping):
    """Options of NSPO2, readable and writable as attributes or as a mapping (`config["strategy"] = "noise"`).

    Every value is checked when it is set; combinations (ranks against each other) when the config is made or used.

    Parameters:
        dim: number of entries of the gradient given to `NSPO2.hook`, checked there; elsewhere without effect.
        strategy: `"noise"` removes the top noise directions, `"keep"` the same without what points along the running
            mean gradient (bias 0 by construction), `"hybrid"` half and half; `"auto"` starts with `keep` and moves
            as the sentinel says.
        projection_rank: number of directions removed a block, at most. 0 only measures.
        update_freq: steps between two eigensolves, at most; a full buffer (2 `max_rank` samples) brings one earlier.
        trust_radius: how far the filter may move the running mean, as a share of its norm.
        target_bias: upper bound on `1 - cos(m, m')`; the rank is lowered until it holds.
        max_rank: number of directions that the covariance estimate tracks. Memory: up to 3 `max_rank` x dim floats,
            the directions and the samples buffered between eigensolves.
        min_rank: the rank does not fall below this, however insignificant the directions are, and even where
            `target_bias` would want it.
        cov_momentum: decay a step of the covariance and of the running mean. 0.97 averages over some 33 steps.
        shrinkage: share of the way the eigenvalues are pulled towards their mean (Ledoit and Wolf, 2004).
        covariance: `"adapter"` treats a block as one vector; `"factored"` keeps one side of each matrix.
        apply_to: `"gradient"` filters before the optimizer, `"update"` lets it step and filters what it changed.
        sentinel: whether a breach of the bounds lowers the rank, changes the strategy or ends the projection.
        eigensolver: `"gram"` (sample space), `"exact"` (small blocks only) or `"randomized"`.
        basis_dtype: `"float32"`, or `"bfloat16"` to keep the directions and the buffered samples in half the memory;
            all maths stays in float32.
        strength: share of the component in the noise directions that is removed.
        anneal: share of training over which the strength falls linearly to 0; 0 keeps it constant.
        epsilon: eigenvalues below this share of the largest one count as zero.
        seed: seed of the randomized eigensolver and of the mixtures of rows that `"factored"` keeps.

    Raises:
        ValueError: a value is out of range; the message names the option and what it must be.
    """

    dim: int | None = None
    strategy: str = "hybrid"
    projection_rank: int = 16
    update_freq: int = 10
    trust_radius: float = 0.1
    target_bias: float = 0.05
    max_rank: int = 32
    min_rank: int = 0
    cov_momentum: float = 0.97
    shrinkage: float = 0.0
    covariance: str = "adapter"
    apply_to: str = "gradient"
    sentinel: bool = True
    eigensolver: str = "gram"
    basis_dtype: str = "float32"
    strength: float = 1.0
    anneal: float = 0.0
    epsilon: float = 1e-6
    seed: int = field(default=42)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every value and their combinations; raises `ValueError`."""
        check_options(dict(self))

    def __setattr__(self, name: str, value: Any) -> None:
        check_options({name: value})
        super().__setattr__(name, value)

    def __getitem__(self, name: str) -> Any:
        if name not in _CHECKS:
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"`{name}` cannot be deleted from an NSPO2Config; set it to another value.")

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in fields(self))

    def __len__(self) -> int:
        return len(fields(self))


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
