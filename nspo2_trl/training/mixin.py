"""NSPO2Mixin: a TRL trainer that hands every step's gradient to its projections.

One step: each micro-batch's backward pass leaves its gradient with the [`SampleCollector`]. When the gradient is
clipped, `_nspo2_before_step` reads it, has each rank get its columns of all samples, and hands both to the
projections; the optimizer steps as ever, and `_nspo2_after_step` tells them so. For DeepSpeed see [`deepspeed`].
"""

from __future__ import annotations

import inspect
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from trl.trainer.utils import get_config_model_id

from ..config import NSPO2Config
from ..engine.finite import any_bad, entries
from ..layout.adapters import lora_blocks
from ..layout.blocks import params_outside
from ..projections.noise import NoiseProjection
from ..projections.protocol import Step
from .card import add_to_card
from .deepspeed import unwrap_step, whole_params, wrap_step
from .options import NSPO2Arguments, nspo2_options
from .refusals import refuse_unsupported, say_what_is_plain
from .retain import Texts
from .retain_mixin import RetainMixin
from .samples import SampleCollector, sample_share
from .saving import SavingMixin
from .timing import StepTimer, Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _StepCallback(TrainerCallback):
    """Calls the trainer at the points of a step that Trainer offers only to callbacks."""

    def __init__(self, trainer: NSPO2Mixin):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._nspo2_follow()
        if trainer.deepspeed is not None:  # its engine steps inside `backward`: it is to call us there
            update = trainer.args.nspo2_apply_to == "update"
            writes = trainer.args.nspo2_projection_rank > 0 and not update
            wrap_step(trainer.deepspeed, trainer._nspo2_trained(), trainer._nspo2_before_step, writes, update)
        trainer.nspo2_samples.attach()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nspo2_samples.next_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.deepspeed is None:  # else its engine has stepped by now, and called this before
            self.trainer._nspo2_before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._nspo2_after_step()
        self.trainer._nspo2_retain_micro = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        if metrics and "eval_loss" in metrics and state.global_step > 0:
            self.trainer.nspo2.watch({"eval_loss": metrics["eval_loss"]})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nspo2_samples.detach()
        if self.trainer.deepspeed is not None:
            unwrap_step(self.trainer.deepspeed)


class NSPO2Mixin(RetainMixin, SavingMixin):
    """What any TRL trainer needs to filter its gradients: stand it before the trainer among the bases of a class.

    The class sets `_nspo2_config_class`, a [`NSPO2Arguments`] that is the trainer's config too; `args` of that class
    is built when left out. `retain_dataset` is an argument besides the trainer's own: texts that the model is to keep
    handling as before, in the place of `nspo2_retain_dataset`.

    Raises:
        TypeError: `args` is a plain TRL config, which cannot say how to filter.
        ValueError: NSPO2 is on and the run cannot have it: no trainable LoRA adapter, a launch that is not supported.
    """

    args: NSPO2Arguments
    model: PreTrainedModel  # or a PeftModel, which has the attributes of the model in it
    optimizer: torch.optim.Optimizer
    deepspeed: Any  # its engine, None without DeepSpeed
    nspo2: NoiseProjection | Any  # None where NSPO2 is off
    _nspo2_config_class: type[NSPO2Arguments]

    def _nspo2_init(self, *args: Any, retain_dataset: Texts | None = None, **kwargs: Any) -> None:
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
        self._nspo2_setup(retain_dataset)

    if not TYPE_CHECKING:  # type checkers shall see the arguments of the trainer itself
        __init__ = _nspo2_init

    def _nspo2_check(self, given: dict) -> None:
        """Refuse what can be refused before anything is loaded; `given` are the arguments by name."""
        model = given["model"]
        if given["args"].nspo2_enabled and given.get("peft_config") is None:
            lora_blocks(model if isinstance(model, torch.nn.Module) else torch.nn.Module())

    def _nspo2_setup(self, retain_dataset: Texts | None = None) -> None:
        self.nspo2, self.nspo2_projections = None, []
        self._nspo2_retain_setup(retain_dataset)
        self.nspo2_step_timer = StepTimer()
        self.add_callback(self.nspo2_step_timer)
        if not self.args.nspo2_enabled:
            return
        refuse_unsupported(self.accelerator)
        self.nspo2_time = Stopwatch(self.accelerator.device)
        self._nspo2_start()
        if self.is_world_process_zero():
            say_what_is_plain(self.model, self._nspo2_others)
        self.add_callback(_StepCallback(self))

    def _nspo2_follow(self) -> None:
        """Work on the parameters that are trained: FSDP2 and `model_init` put others in their place.

        DeepSpeed moves them to the device only when training starts.
        """
        if not self.nspo2.holds(self.model.parameters()):
            self._nspo2_start()
        for projection in self.nspo2_projections:
            projection.start()

    def _nspo2_trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _nspo2_start(self) -> None:
        """Projections that know nothing yet, of the parameters as they are now."""
        blocks = lora_blocks(self.model)
        self._nspo2_others = params_outside(blocks, self._nspo2_trained())
        micro_batches = self.args.gradient_accumulation_steps
        self.nspo2 = NoiseProjection(
            blocks,
            NSPO2Config(**nspo2_options(self.args)),
            process_group=dist.group.WORLD if self.accelerator.num_processes > 1 or self.is_fsdp_enabled else None,
            share=sample_share(micro_batches * self.accelerator.num_processes),
        )
        self.nspo2_projections = [self.nspo2, *self._nspo2_retain_projections()]
        self.nspo2_samples = SampleCollector(self.nspo2, self.model, self.accelerator, micro_batches, self.nspo2_time)

    def _nspo2_before_step(self) -> None:
        """The gradient is complete, the optimizer about to step: filter it, and learn from the step's samples."""
        self.nspo2_samples.check()
        with self.nspo2_time:
            self.nspo2.read_grads()
            others = [entries(p.grad) for p in self._nspo2_others if p.grad is not None]
            progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else None
            step = Step(self.nspo2_samples.collect(), others, progress)
            found = [projection.before_step(step) for projection in self.nspo2_projections]
        # A gradient that would ruin the weights is dropped; but at rank 0 a run is plain TRL to the bit, and under
        # fp16 the loss scaler skips the step itself.
        if all(found) or self.args.nspo2_projection_rank == 0 or self.accelerator.scaler is not None:
            return
        if any_bad((p.grad for p in self.model.parameters()), self.nspo2.total):
            self.optimizer.zero_grad(set_to_none=True)

    def _nspo2_after_step(self) -> None:
        changes = self.deepspeed is not None and self.args.nspo2_apply_to == "update"
        with self.nspo2_time, whole_params(self._nspo2_trained()) if changes else nullcontext():
            for projection in self.nspo2_projections:
                projection.after_step()
            self.nspo2_samples.release()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # only with the loss, or at the end: callbacks log other things, and these figures belong to a window of steps
        mine = "loss" in logs or "train_loss" in logs
        steps, seconds = self.nspo2_step_timer.take() if mine else (0, 0.0)
        if steps:
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            figures = {"batch_size": batch, "step_time": seconds / steps}
            if self.nspo2 is not None:
                for projection in self.nspo2_projections:
                    figures |= projection.metrics(batch)
                figures |= self._nspo2_retain_figures(steps)
                figures["overhead_ms"] = 1000 * self.nspo2_time.take() / steps
                self.nspo2.watch({name: figures[name] for name in ("bias", "alpha") if name in figures})
                figures["sentinel_level"] = self.nspo2.sentinel.level
            logs = {**logs, **{f"nspo2/{name}": value for name, value in figures.items()}}
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self._nspo2_retain_end()
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(os.path.join(str(self.args.output_dir), "README.md"), self)
