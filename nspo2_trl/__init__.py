"""NSPO2 for TRL: gradient noise of LoRA adapters estimated while they train, and projected out within bounds."""

from importlib import import_module

from .config import NSPO2Config, get_default_config
from .core import NSPO2
from .optimizer import NSPO2Optimizer, create_nspo2_optimizer

__version__ = "0.2.0"

# the engine needs torch alone; TRL is imported only by those who ask for a trainer
_NEEDS_TRL = {
    "NSPO2DPOConfig": "dpo_config",
    "NSPO2DPOTrainer": "trainer",
    "attach_nspo2": "trainer",
    "NSPO2GRPOConfig": "trainers",
    "NSPO2GRPOTrainer": "trainers",
    "NSPO2KTOConfig": "trainers",
    "NSPO2KTOTrainer": "trainers",
    "NSPO2RewardConfig": "trainers",
    "NSPO2RewardTrainer": "trainers",
    "NSPO2SFTConfig": "trainers",
    "NSPO2SFTTrainer": "trainers",
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
]


def __getattr__(name: str):
    if name in _NEEDS_TRL:
        return getattr(import_module(f".{_NEEDS_TRL[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
