"""The part of NSPO2Mixin around each micro-batch: what ran, and whether all is still as when training began."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..projections.noise import NoiseProjection
from ..projections.protocol import Projection
from .deepspeed import wrap_step
from .diverged import Diverged
from .options import nspo2_options
from .refusals import STEPS_IN_BACKWARD
from .samples import SampleCollector
from .timing import StepTimer

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer
else:
    _BaseTrainer = object

logger = logging.getLogger(__name__)


class MicroBatchMixin(_BaseTrainer):
    """Projections are made for what is trained and how, which may be changed after the trainer was made."""

    args: Any
    model: Any
    deepspeed: Any
    nspo2: NoiseProjection | Any
    nspo2_projections: Sequence[Projection]
    nspo2_samples: SampleCollector
    nspo2_step_timer: StepTimer
    nspo2_diverged: Diverged
    _nspo2_start: Any
    _nspo2_before_step: Any
    _nspo2_made_for: tuple
    _nspo2_params: Sequence[torch.nn.Parameter] = ()  # while training runs, all of the model's
    _nspo2_retain_micro: int

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer asks once even where it resumes a run that is finished, and would train a step on what it gets
        finished = self.is_in_train and self.state.global_step >= self.state.max_steps
        return ([], None) if finished and self.nspo2 is not None else super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The micro-batch's loss; raises `ValueError` where an optimizer steps in its backward pass."""
        world = 1 if self.accelerator.split_batches else self.args.world_size
        self.nspo2_step_timer.count(inputs, self._train_batch_size * world)
        if self.nspo2 is not None:
            self._nspo2_keep_up()
            versions = self.nspo2_samples.versions()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.nspo2 is not None and self.nspo2_samples.stepped(versions):
            raise ValueError(STEPS_IN_BACKWARD.format(name="The optimizer"))
        self.nspo2_diverged.see_loss(loss, self.state.global_step + 1)
        return loss

    def _nspo2_trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _nspo2_now(self, trained: Sequence[torch.nn.Parameter]) -> tuple:
        """What projections have to be made for."""
        batch = self.args.gradient_accumulation_steps, self._train_batch_size
        return batch, nspo2_options(self.args), [id(p) for p in trained]

    def _nspo2_follow(self) -> None:
        """Work on what is trained now, and as the arguments say now.

        FSDP2 and `model_init` put other parameters in place; DeepSpeed moves them to the device only in training.
        """
        if self._nspo2_made_for != self._nspo2_now(self._nspo2_trained()):
            known = self.nspo2
            self._nspo2_start()
            if known.filters[0].step_count and known.holds(self.model.parameters()):
                self.nspo2.skipped_steps, self.nspo2.norms.largest = known.skipped_steps, known.norms.largest
                logger.warning(
                    "What is trained, the batch or an option of NSPO2 was changed, at step %d: the noise estimate "
                    "starts anew.",
                    self.state.global_step,
                )
        for projection in self.nspo2_projections:
            projection.start()

    def _nspo2_attach(self) -> None:
        self._nspo2_params = list(self.model.parameters())
        if self.deepspeed is not None:  # its engine steps inside `backward`: it is to call us there
            update = self.args.nspo2_apply_to == "update"
            others = len(self.nspo2_projections) > 1 and self.args.nspo2_retain_project != "after"
            writes = others or (self.args.nspo2_projection_rank > 0 and not update)
            wrap_step(self.deepspeed, self._nspo2_trained(), self._nspo2_before_step, writes, update)
        self.nspo2_samples.attach()

    def _nspo2_keep_up(self) -> None:
        """A micro-batch begins, with a step: notice what was changed while training runs."""
        if self.nspo2_samples.slot:
            return
        self._nspo2_retain_micro = 0
        if self._nspo2_made_for != self._nspo2_now([p for p in self._nspo2_params if p.requires_grad]):
            self._nspo2_follow()
            self._nspo2_attach()
