"""NSPO2DPOConfig: TRL's DPOConfig and the options of NSPO2, with the prefix `nspo2_`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from trl import DPOConfig

from ..config import NSPO2Config, check_options

if TYPE_CHECKING:
    from transformers import TrainingArguments
else:
    TrainingArguments = object  # the options have no base of their own, so that they can go before any config


def nspo2_options(args: object) -> dict:
    """The options of [`NSPO2Config`] that `args`, a trainer's config, has with the prefix `nspo2_`."""
    names = [f.name for f in fields(NSPO2Config) if f.name != "dim"]
    return {name: getattr(args, f"nspo2_{name}") for name in names}


@dataclass
class NSPO2Arguments(TrainingArguments):
    """The options of NSPO2 as a trainer's config has them, to stand before a TRL config among the bases of a class."""

    nspo2_enabled: bool = field(
        default=True, metadata={"help": "Whether to use NSPO2 at all. `false` is exactly the plain TRL trainer."}
    )
    nspo2_strategy: str = field(
        default="keep",
        metadata={
            "help": "Which directions are removed: `noise` the strongest noise directions, `keep` the same without "
            "what lies along the running mean gradient, `hybrid` half and half, `auto` starts with `keep` and moves "
            "as the sentinel says. `keep` is the default here (the published one is `hybrid`) because it leaves the "
            "mean gradient as it is, so that neither trust region nor bias bound has to hold the projection back."
        },
    )
    nspo2_projection_rank: int = field(
        default=16,
        metadata={"help": "Directions removed per LoRA adapter, at most. 0 measures the noise and removes nothing."},
    )
    nspo2_update_freq: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps between two eigensolves, at most: one comes earlier where the buffer, of twice "
            "`nspo2_max_rank` samples, is full."
        },
    )
    nspo2_trust_radius: float = field(
        default=0.1,
        metadata={"help": "How far the filter may move the running mean gradient, as a share of its norm."},
    )
    nspo2_target_bias: float = field(
        default=0.05,
        metadata={"help": "Upper bound on 1 - cos(running mean, filtered mean); the rank is lowered until it holds."},
    )
    nspo2_max_rank: int = field(
        default=32,
        metadata={
            "help": "Noise directions tracked per adapter. The state is at most about three times this many floats "
            "for each adapter parameter (directions, and up to twice as many buffered samples)."
        },
    )
    nspo2_min_rank: int = field(
        default=0, metadata={"help": "The rank in force does not fall below this, even for `nspo2_target_bias`."}
    )
    nspo2_cov_momentum: float = field(
        default=0.97, metadata={"help": "Decay per step of the noise covariance and of the running mean gradient."}
    )
    nspo2_shrinkage: float = field(
        default=0.0, metadata={"help": "Share of the way that eigenvalues are pulled towards their mean."}
    )
    nspo2_covariance: str = field(
        default="adapter",
        metadata={"help": "`adapter`: one vector per LoRA adapter. `factored`: one side of each LoRA matrix."},
    )
    nspo2_apply_to: str = field(
        default="gradient",
        metadata={
            "help": "`gradient`: filter the gradient before the optimizer. `update`: let the optimizer step and "
            "filter what it changed."
        },
    )
    nspo2_sentinel: bool = field(
        default=True,
        metadata={
            "help": "Whether a breach (bias above the target, a trust region that holds most of the projection back, "
            "a rising `eval_loss`) lowers the rank, then moves to a milder strategy, then ends the projection."
        },
    )
    nspo2_eigensolver: str = field(
        default="gram", metadata={"help": "`gram` (sample space), `exact` (small blocks only) or `randomized`."}
    )
    nspo2_basis_dtype: str = field(
        default="float32",
        metadata={
            "help": "`bfloat16` keeps the noise directions and the buffered samples in half the memory; the maths "
            "stays in float32."
        },
    )
    nspo2_strength: float = field(
        default=1.0, metadata={"help": "Share of the component in the noise directions that is removed."}
    )
    nspo2_anneal: float = field(
        default=0.0,
        metadata={"help": "Share of training over which the strength falls linearly to 0; 0 keeps it constant."},
    )
    nspo2_epsilon: float = field(
        default=1e-6, metadata={"help": "Eigenvalues below this share of the largest one count as zero."}
    )
    nspo2_seed: int = field(
        default=42,
        metadata={"help": "Seed of the randomized eigensolver, and of the mixtures of rows that `factored` keeps."},
    )

    def __post_init__(self) -> None:
        check_options(nspo2_options(self), prefix="nspo2_")
        super().__post_init__()


@dataclass
class NSPO2DPOConfig(NSPO2Arguments, DPOConfig):
    r"""
    Configuration class for the [`NSPO2DPOTrainer`]: everything in [`~trl.DPOConfig`], and the `nspo2_` options.

    Raises:
        ValueError: an `nspo2_` option is out of range; the message names it and says what it must be.
    """
