"""NSPO2 for TRL: gradient noise of LoRA adapters estimated while they train, and projected out within bounds."""

from typing import TYPE_CHECKING, Any

from .config import NSPO2Config, get_default_config
from .core import NSPO2
from .optimizer import NSPO2Optimizer, create_nspo2_optimizer

if TYPE_CHECKING:
    from .dpo_config import NSPO2DPOConfig
    from .trainer import NSPO2DPOTrainer

__version__ = "0.1.0"

__all__ = [
    "NSPO2",
    "NSPO2Config",
    "NSPO2DPOConfig",
    "NSPO2DPOTrainer",
    "NSPO2Optimizer",
    "create_nspo2_optimizer",
    "get_default_config",
]

if not TYPE_CHECKING:  # who checks types shall see the names above, and no others

    def __getattr__(name: str) -> Any:
        # the engine needs torch alone; TRL is imported only by those who ask for a trainer
        if name == "NSPO2DPOConfig":
            from .dpo_config import NSPO2DPOConfig

            return NSPO2DPOConfig
        if name == "NSPO2DPOTrainer":
            from .trainer import NSPO2DPOTrainer

            return NSPO2DPOTrainer
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
