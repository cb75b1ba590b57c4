"""NSPO2 for TRL: gradient noise of LoRA adapters estimated while they train, and projected out within bounds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import NSPO2Config, get_default_config
from .engine.by_hand import NSPO2
from .training.optimizer import NSPO2Optimizer, create_nspo2_optimizer

if TYPE_CHECKING:
    from .training.attach import attach_nspo2
    from .training.dpo import NSPO2DPOTrainer
    from .training.options import NSPO2DPOConfig
    from .training.retain import retain_adapter
    from .training.summary import noise_summary
    from .training.trainers import (
        NSPO2GRPOConfig,
        NSPO2GRPOTrainer,
        NSPO2KTOConfig,
        NSPO2KTOTrainer,
        NSPO2RewardConfig,
        NSPO2RewardTrainer,
        NSPO2SFTConfig,
        NSPO2SFTTrainer,
    )

__version__ = "0.2.0"

# the engine needs torch alone; TRL is imported only by those who ask for a trainer
_NEEDS_TRL = {
    "NSPO2DPOConfig": "training.options",
    "NSPO2DPOTrainer": "training.dpo",
    "attach_nspo2": "training.attach",
    "noise_summary": "training.summary",
    "retain_adapter": "training.retain",
    **{f"NSPO2{kind}Config": "training.trainers" for kind in ("GRPO", "KTO", "Reward", "SFT")},
    **{f"NSPO2{kind}Trainer": "training.trainers" for kind in ("GRPO", "KTO", "Reward", "SFT")},
}

__all__ = [
    "NSPO2",
    "NSPO2Config",
    "NSPO2DPOConfig",
    "NSPO2DPOTrainer",
    "NSPO2GRPOConfig",
    "NSPO2GRPOTrainer",
    "NSPO2KTOConfig",
    "NSPO2KTOTrainer",
    "NSPO2Optimizer",
    "NSPO2RewardConfig",
    "NSPO2RewardTrainer",
    "NSPO2SFTConfig",
    "NSPO2SFTTrainer",
    "attach_nspo2",
    "create_nspo2_optimizer",
    "get_default_config",
    "noise_summary",
    "retain_adapter",
]

if not TYPE_CHECKING:  # who checks types shall see the names above, and no others

    def __getattr__(name: str) -> Any:
        if name in _NEEDS_TRL:
            import_module(".training.trl_range", __name__).refuse_trl()
            return getattr(import_module(f".{_NEEDS_TRL[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
