"""StepCallback: calls the trainer at the points of a step that Trainer offers only to callbacks."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from .deepspeed import unwrap_step
from .refusals import refuse_optimizer

logger = logging.getLogger(__name__)


class StepCallback(TrainerCallback):
    """Of `trainer`, a trainer with [`NSPO2Mixin`]."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        refuse_optimizer(args, self.trainer.optimizer)
        self.trainer._nspo2_follow()
        self.trainer._nspo2_attach()
        self.trainer.nspo2_time.take()  # of an attempt that ran out of memory
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "This run is finished, at step %d of %d: nothing is trained. To go on, raise `max_steps` or "
                    "`num_train_epochs`.",
                    state.global_step,
                    state.max_steps,
                )

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nspo2_samples.next_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.deepspeed is None:  # else its engine has stepped by now, and called this before
            self.trainer._nspo2_before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._nspo2_after_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        if metrics and "eval_loss" in metrics and state.global_step > 0:
            self.trainer.nspo2.watch({"eval_loss": metrics["eval_loss"]})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nspo2_samples.detach()
        self.trainer._nspo2_params = ()  # a next run may have others
        if self.trainer.deepspeed is not None:
            unwrap_step(self.trainer.deepspeed)
