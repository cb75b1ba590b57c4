"""attach_nspo2: NSPO2 for a trainer that is there already."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import Trainer

from ..config import NSPO2Config
from ..layout.adapters import lora_blocks
from ..retain_config import RetainConfig
from .mixin import NSPO2Mixin
from .options import trainer_config
from .refusals import refuse_arguments, refuse_optimizer, refuse_unsupported
from .retain import Texts


def attach_nspo2(
    trainer: Trainer,
    config: NSPO2Config | None = None,
    retain_dataset: Texts | None = None,
    retain_config: RetainConfig | None = None,
) -> Trainer:
    """Have a trainer that was made without NSPO2 filter its gradients; call it before `trainer.train()`.

    Args:
        trainer: any whose model has a trainable LoRA adapter. Its class becomes a subclass with [`NSPO2Mixin`].
        config: left out, the defaults of the trainers.
        retain_dataset: texts that the model is to keep handling as before. retain_config: what is done with them.

    Raises:
        ValueError: the trainer filters already, or the run cannot have NSPO2, see [`NSPO2Mixin`].
    """
    kind = type(trainer)
    if isinstance(trainer, NSPO2Mixin):
        raise ValueError(f"This {kind.__name__} has NSPO2 already: set the `nspo2_` options of its `args`.")
    assert trainer.model is not None
    lora_blocks(trainer.model)
    refuse_unsupported(trainer.accelerator)  # before the trainer is changed
    refuse_arguments(trainer.args)
    refuse_optimizer(trainer.args, trainer.optimizer)
    args: Any = trainer.args
    args.nspo2_enabled = True
    for name, value in asdict(config or trainer_config()).items():
        setattr(args, f"nspo2_{name}", value)
    for name, value in asdict(retain_config or RetainConfig()).items():
        setattr(args, f"nspo2_retain_{name}", value)
    tags = {"_tag_names": [*getattr(kind, "_tag_names", []), "nspo2"]}
    trainer.__class__ = type(f"NSPO2{kind.__name__}", (NSPO2Mixin, kind), tags)
    changed: Any = trainer
    try:
        changed._nspo2_setup(retain_dataset)
    except BaseException:
        changed.__class__ = kind  # so that it can be called again
        raise
    return trainer
