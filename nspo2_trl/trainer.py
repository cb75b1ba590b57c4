"""NSPO2DPOTrainer: TRL's DPOTrainer with the gradient of every step filtered by NSPO2.

The data flow of one step: each micro-batch's backward pass leaves its gradient with the [`SampleCollector`]; when the
last one is done and the gradient is clipped, `_nspo2_begin_step` hands each rank its columns of the samples of all,
and [`BlockGroups`] scores them, filters the gradient in place and learns; then the optimizer steps as ever. With
`nspo2_apply_to="update"` the filtering is done in `_nspo2_end_step`, on what the optimizer changed. Under DeepSpeed
`_nspo2_begin_step` is called from inside the engine's step, see [`deepspeed`].
"""

from __future__ import annotations

import inspect
import logging
import os
from contextlib import nullcontext
from dataclasses import asdict
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer
from trl.trainer.utils import get_config_model_id

from .adapters import lora_blocks
from .block_groups import BlockGroups, any_bad, entries
from .blocks import params_outside
from .card import add_to_card
from .checkpoints import (
    NSPO2_STATE_NAME,
    PREFIX_CHECKPOINT_DIR,
    first_line,
    half_saved,
    last_whole,
    refuse_half,
)
from .config import NSPO2Config
from .data import check_preferences
from .deepspeed import unwrap_step, whole_params, wrap_step
from .dpo_config import NSPO2Arguments, NSPO2DPOConfig, nspo2_options
from .refusals import refuse_unsupported
from .samples import SampleCollector, sample_share
from .timing import StepTimer, Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl.trainer.base_trainer import _BaseTrainer
else:
    _BaseTrainer = object  # the mixin has no base of its own, so that it can go before any trainer

logger = logging.getLogger(__name__)


class _StepCallback(TrainerCallback):
    """Calls the trainer at the points of a step that Trainer offers only to callbacks."""

    def __init__(self, trainer: NSPO2Mixin):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._nspo2_follow()
        self.trainer._nspo2_wrap_engine()
        self.trainer.nspo2_samples.attach()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nspo2_samples.next_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.deepspeed is None:  # else its engine has stepped by now, and called this before
            self.trainer._nspo2_begin_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._nspo2_end_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        losses = {name: value for name, value in (metrics or {}).items() if name == "eval_loss"}
        if losses and state.global_step > 0:
            self.trainer.nspo2.watch(losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nspo2_samples.detach()
        if self.trainer.deepspeed is not None:
            unwrap_step(self.trainer.deepspeed)


class NSPO2Mixin(_BaseTrainer):
    """What any TRL trainer needs to filter its gradients: stand it before the trainer among the bases of a class.

    The class sets `_nspo2_config_class`, a [`NSPO2Arguments`] that is the trainer's config too; `args` of that class
    is built when left out.

    Raises:
        TypeError: `args` is a plain TRL config, which cannot say how to filter.
        ValueError: NSPO2 is on and the run cannot have it: no trainable LoRA adapter, FSDP1, a model spread over
            tensor-parallel ranks; when training starts, a DeepSpeed config with more than ZeRO in bf16 or float32.
            The message says what to do.
    """

    args: NSPO2Arguments
    model: PreTrainedModel  # or a PeftModel, which has the attributes of the model in it
    optimizer: torch.optim.Optimizer
    deepspeed: Any  # its engine, None without DeepSpeed
    nspo2: BlockGroups | Any  # None where NSPO2 is off
    _nspo2_config_class: type[NSPO2Arguments]

    def _nspo2_init(self, *args: Any, **kwargs: Any) -> None:
        inits = (inspect.signature(vars(kind)["__init__"]) for kind in type(self).__mro__ if "__init__" in vars(kind))
        signature = next(found for found in inits if "model" in found.parameters)  # others hand on what they get
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        model, config, wanted = given["model"], given.get("args"), self._nspo2_config_class
        if config is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            config = given["args"] = wanted(f"{model_name.rstrip('/').split('/')[-1]}-NSPO2-{self._name}")
        if not isinstance(config, wanted):
            got = type(config).__name__
            raise TypeError(
                f"`args` must be an {wanted.__name__}, got {got}: replace `{got}(...)` by `{wanted.__name__}(...)` "
                "with the same arguments."
            )
        self._nspo2_check(given)
        super().__init__(**given)
        if self.args.nspo2_enabled:
            refuse_unsupported(self.accelerator)
        self._nspo2_setup()

    if not TYPE_CHECKING:  # type checkers shall see the arguments of the trainer itself
        __init__ = _nspo2_init

    def _nspo2_check(self, given: dict) -> None:
        """Refuse what can be refused before anything is loaded; `given` are the arguments by name."""
        model = given["model"]
        if given["args"].nspo2_enabled and given.get("peft_config") is None:
            lora_blocks(model if isinstance(model, torch.nn.Module) else torch.nn.Module())

    def _nspo2_setup(self) -> None:
        self.nspo2 = None
        self.nspo2_step_timer = StepTimer()
        self.add_callback(self.nspo2_step_timer)
        if not self.args.nspo2_enabled:
            return
        self.nspo2_time = Stopwatch(self.accelerator.device)
        self._nspo2_start()
        self.add_callback(_StepCallback(self))

    def _nspo2_follow(self) -> None:
        """FSDP2 puts sharded parameters in the place of those that the trainer was made with: work on these.

        So does a Trainer with `model_init`. DeepSpeed moves them to the device only when training starts.
        """
        if not self.nspo2.holds(self.model.parameters()):
            self._nspo2_start()
        self.nspo2.follow()

    def _nspo2_trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _nspo2_wrap_engine(self) -> None:
        """DeepSpeed's engine steps inside `backward`: have it call `_nspo2_begin_step` there."""
        if self.deepspeed is not None:
            update = self.args.nspo2_apply_to == "update"
            writes = self.args.nspo2_projection_rank > 0 and not update
            wrap_step(self.deepspeed, self._nspo2_trained(), self._nspo2_begin_step, writes, update)

    def _nspo2_start(self) -> None:
        """A noise estimate that knows nothing yet, of the parameters as they are now."""
        blocks = lora_blocks(self.model)
        self._nspo2_others = params_outside(blocks, self._nspo2_trained())
        micro_batches = self.args.gradient_accumulation_steps
        self.nspo2 = BlockGroups(
            blocks,
            NSPO2Config(**nspo2_options(self.args)),
            ranks=dist.group.WORLD if self.accelerator.num_processes > 1 or self.is_fsdp_enabled else None,
            share=sample_share(micro_batches * self.accelerator.num_processes),
        )
        self.nspo2_samples = SampleCollector(self.nspo2, self.model, self.accelerator, micro_batches, self.nspo2_time)

    def _nspo2_begin_step(self) -> None:
        """The gradient is complete, the optimizer about to step: filter it, and learn from the step's samples."""
        self.nspo2_samples.check()
        with self.nspo2_time:
            if self.state.max_steps > 0:
                self.nspo2.set_progress(self.state.global_step / self.state.max_steps)
            others = [p.grad for p in self._nspo2_others if p.grad is not None]
            fine = self.nspo2.begin_step(self.nspo2_samples.collect, [entries(grad) for grad in others])
        # A gradient that would ruin the weights is dropped; but at rank 0 a run is plain TRL to the bit, and under
        # fp16 the loss scaler skips the step itself.
        if fine or self.args.nspo2_projection_rank == 0 or self.accelerator.scaler is not None:
            return
        if any_bad((p.grad for p in self.model.parameters()), self.nspo2.total):
            self.optimizer.zero_grad(set_to_none=True)

    def _nspo2_end_step(self) -> None:
        changes = self.deepspeed is not None and self.args.nspo2_apply_to == "update"
        with self.nspo2_time, whole_params(self._nspo2_trained()) if changes else nullcontext():
            self.nspo2.end_step()
            self.nspo2_samples.release()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # only with the loss, or at the end: callbacks log other things, and these figures belong to a window of steps
        mine = "loss" in logs or "train_loss" in logs
        steps, seconds = self.nspo2_step_timer.take() if mine else (0, 0.0)
        if steps:
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            figures = {"batch_size": batch, "step_time": seconds / steps}
            if self.nspo2 is not None:
                figures |= self.nspo2.metrics(batch)
                figures["overhead_ms"] = 1000 * self.nspo2_time.take() / steps
                self.nspo2.watch({name: figures[name] for name in ("bias", "alpha") if name in figures})
                figures["sentinel_level"] = self.nspo2.sentinel.level
            logs = {**logs, **{f"nspo2/{name}": value for name, value in figures.items()}}
        super().log(logs, *args, **kwargs)

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
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(os.path.join(str(self.args.output_dir), "README.md"), self)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with half_saved(folder, writer=self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.nspo2 is None:
            return
        state = self.nspo2.state_dict(keep=self.args.should_save)  # every rank has a part of it
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, NSPO2_STATE_NAME))

    def _nspo2_any_rank(self, failed: bool) -> bool:
        """Whether it failed on any process; all have to ask."""
        return self.accelerator.reduce(torch.tensor(float(failed), device=self.accelerator.device)).item() > 0

    def _save_rng_state(self, output_dir: str) -> None:
        """The last thing that every process writes: all have to know whether one could not."""
        error = None
        try:
            super()._save_rng_state(output_dir)
        except (OSError, RuntimeError) as failure:
            error = failure
        failed = self._nspo2_any_rank(error is not None)
        if error is not None:
            raise error
        if failed:
            raise OSError("another process could not write its part")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.nspo2 is None or checkpoint is None:
            return
        self._nspo2_follow()
        path = os.path.join(checkpoint, NSPO2_STATE_NAME)
        reason = None
        try:
            self.nspo2.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
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


class NSPO2DPOTrainer(NSPO2Mixin, DPOTrainer):
    """[`~trl.DPOTrainer`] with NSPO2: the same arguments, `args` being a [`NSPO2DPOConfig`] (built when left out).

    A plain `DPOConfig` cannot say how to filter, so it is refused.
    """

    args: NSPO2DPOConfig
    _nspo2_config_class = NSPO2DPOConfig
    _tag_names = ["trl", "dpo", "nspo2"]

    def _nspo2_check(self, given: dict) -> None:
        if given.get("train_dataset") is not None:
            check_preferences(given["train_dataset"])
        super()._nspo2_check(given)


def attach_nspo2(trainer: Trainer, config: NSPO2Config | None = None) -> Trainer:
    """Have a trainer that was made without NSPO2 filter its gradients; call it before `trainer.train()`.

    Parameters:
        trainer: any [`~transformers.Trainer`] whose model has a trainable LoRA adapter, such as those of TRL. The
            object stays the same; its class becomes a subclass with [`NSPO2Mixin`].
        config: what to do; left out, the defaults of the trainers, which are `NSPO2Config(strategy="keep")`.

    Raises:
        ValueError: the trainer filters already, or the run cannot have NSPO2, see [`NSPO2Mixin`].
    """
    kind = type(trainer)
    if isinstance(trainer, NSPO2Mixin):
        raise ValueError(f"This {kind.__name__} has NSPO2 already: set the `nspo2_` options of its `args`.")
    assert trainer.model is not None
    lora_blocks(trainer.model)
    refuse_unsupported(trainer.accelerator)
    args: Any = trainer.args
    args.nspo2_enabled = True
    for name, value in asdict(config or NSPO2Config(strategy="keep")).items():
        setattr(args, f"nspo2_{name}", value)
    tags = {"_tag_names": [*getattr(kind, "_tag_names", []), "nspo2"]}
    trainer.__class__ = type(f"NSPO2{kind.__name__}", (NSPO2Mixin, kind), tags)
    assert isinstance(trainer, NSPO2Mixin)
    trainer._nspo2_setup()
    return trainer
