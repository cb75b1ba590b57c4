"""The other trainers of TRL with NSPO2: the same mixin, the same options, a class statement and a config each."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from .mixin import NSPO2Mixin
from .options import NSPO2Arguments


@dataclass
class NSPO2KTOConfig(NSPO2Arguments, KTOConfig):
    r"""Configuration class for the [`NSPO2KTOTrainer`]: [`~trl.KTOConfig`] and the `nspo2_` options."""


@dataclass
class NSPO2GRPOConfig(NSPO2Arguments, GRPOConfig):
    r"""Configuration class for the [`NSPO2GRPOTrainer`]: [`~trl.GRPOConfig`] and the `nspo2_` options."""


@dataclass
class NSPO2RewardConfig(NSPO2Arguments, RewardConfig):
    r"""Configuration class for the [`NSPO2RewardTrainer`]: [`~trl.RewardConfig`] and the `nspo2_` options."""


@dataclass
class NSPO2SFTConfig(NSPO2Arguments, SFTConfig):
    r"""Configuration class for the [`NSPO2SFTTrainer`]: [`~trl.SFTConfig`] and the `nspo2_` options."""


class NSPO2KTOTrainer(NSPO2Mixin, KTOTrainer):
    """[`~trl.KTOTrainer`] with NSPO2: the same arguments, `args` being a [`NSPO2KTOConfig`]."""

    args: NSPO2KTOConfig
    _nspo2_config_class = NSPO2KTOConfig
    _tag_names = ["trl", "kto", "nspo2"]


class NSPO2GRPOTrainer(NSPO2Mixin, GRPOTrainer):
    """[`~trl.GRPOTrainer`] with NSPO2: the same arguments, `args` being a [`NSPO2GRPOConfig`].

    A sample of the noise is the gradient of one micro-batch of completions.
    """

    args: NSPO2GRPOConfig
    _nspo2_config_class = NSPO2GRPOConfig
    _tag_names = ["trl", "grpo", "nspo2"]


class NSPO2RewardTrainer(NSPO2Mixin, RewardTrainer):
    """[`~trl.RewardTrainer`] with NSPO2: the same arguments, `args` being a [`NSPO2RewardConfig`]."""

    args: NSPO2RewardConfig
    _nspo2_config_class = NSPO2RewardConfig
    _tag_names = ["trl", "reward-trainer", "nspo2"]


class NSPO2SFTTrainer(NSPO2Mixin, SFTTrainer):
    """[`~trl.SFTTrainer`] with NSPO2: the same arguments, `args` being a [`NSPO2SFTConfig`]."""

    args: NSPO2SFTConfig
    _nspo2_config_class = NSPO2SFTConfig
    _tag_names = ["trl", "sft", "nspo2"]
