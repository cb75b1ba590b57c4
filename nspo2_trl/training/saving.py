"""What Trainer saves and resumes, with NSPO2's state in it: each checkpoint is whole, or it is not there."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..projections.protocol import Projection
from .checkpoints import (
    NSPO2_STATE_NAME,
    PREFIX_CHECKPOINT_DIR,
    CheckpointError,
    first_line,
    half_saved,
    last_whole,
    refuse_half,
)
from .resuming import differences, refuse_other_adapter, save_run

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer
else:
    _BaseTrainer = object  # the mixin has no base of its own, so that it can go before any trainer

logger = logging.getLogger(__name__)


class SavingMixin(_BaseTrainer):
    """The part of [`NSPO2Mixin`] that saves and resumes."""

    nspo2_projections: Sequence[Projection]  # empty where NSPO2 is off
    optimizer: Any
    _nspo2_start: Any  # makes the projections anew
    _nspo2_follow: Any  # has them work on the parameters that are trained

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:  # Trainer would take the last one, whole or not
            out = str(self.args.output_dir)
            found, half = last_whole(out)
            if half and found is None:
                raise ValueError(f"`resume_from_checkpoint`: {out!r} has no whole checkpoint: {half}.")
            if half and self.is_world_process_zero():
                logger.warning("Saved only in part and passed over: %s.", half)
            resume_from_checkpoint = found or True
        elif resume_from_checkpoint and os.path.isdir(resume_from_checkpoint):
            refuse_half(resume_from_checkpoint)
        if isinstance(resume_from_checkpoint, (str, os.PathLike)) and os.path.isdir(resume_from_checkpoint):
            refuse_other_adapter(resume_from_checkpoint, self.accelerator.unwrap_model(self.model))
            told = differences(resume_from_checkpoint, self)
            if told and self.is_world_process_zero():
                logger.warning("Other than in the run of %s: %s.", resume_from_checkpoint, told)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:  # (checkpoints have the shards)
            self._nspo2_save_sharded(output_dir)
        super().save_model(output_dir, _internal_call)

    def _nspo2_save_sharded(self, output_dir: str | None) -> None:
        """Write the adapter under FSDP2 with sharded state dicts, where Trainer writes none."""
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            model: Any = self.model
            self._save(output_dir, state_dict=get_model_state_dict(model, options=options))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with half_saved(folder, writer=self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_run(output_dir, self)
        if not self.nspo2_projections:
            return
        state: dict = {}
        for projection in self.nspo2_projections:  # every rank has a part of it
            state |= projection.state_dict(keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, NSPO2_STATE_NAME))

    def _nspo2_any_rank(self, failed: bool) -> bool:
        """Whether it failed on any process; all have to ask."""
        return self.accelerator.reduce(torch.tensor(float(failed), device=self.accelerator.device)).item() > 0

    def _save_rng_state(self, output_dir: str) -> None:
        """The last thing that every process writes: all have to know whether one could not."""
        error: Exception | None = None
        try:
            super()._save_rng_state(output_dir)
        except (OSError, RuntimeError) as failure:
            error = failure
        if self._nspo2_any_rank(error is not None):
            raise error or OSError("another process could not write its part")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        known = {key for group in self.optimizer.param_groups for key in group}
        if checkpoint is not None and (missing := set(self.optimizer.defaults) - known):
            raise CheckpointError(
                f"`resume_from_checkpoint`: the state in {checkpoint!r} is of another optimizer, it has no "
                f"{' and '.join(f'`{key}`' for key in sorted(missing))}: resume with the `optim` of its run."
            )
        if not self.nspo2_projections or checkpoint is None:
            return
        self._nspo2_follow()
        path = os.path.join(checkpoint, NSPO2_STATE_NAME)
        reason = None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for projection in self.nspo2_projections:
                projection.load_state_dict(state)
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, UnpicklingError) as error:
            reason = "it is not there" if isinstance(error, FileNotFoundError) else first_line(error)
        # all ranks must go on from the same state
        if self._nspo2_any_rank(reason is not None):
            self._nspo2_start()
            logger.warning(
                "The NSPO2 state `%s` could not be used (%s): the noise estimate starts anew, the rest of the "
                "checkpoint is restored.",
                path,
                reason or "another process could not read it",
            )
