"""NSPO2Mixin: a TRL trainer that hands every step's gradient to its projections.

One step: each micro-batch's backward pass leaves its gradient with the [`SampleCollector`]. When the gradient is
clipped, `_nspo2_before_step` reads it, has each rank get its columns of all samples, and hands both to the
projections; the optimizer steps as ever, and `_nspo2_after_step` tells them so. For DeepSpeed see [`deepspeed`].
"""

from __future__ import annotations

import inspect
import logging
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from trl.trainer.utils import get_config_model_id

from ..config import NSPO2Config, check_options
from ..engine.finite import any_bad, entries
from ..layout.adapters import lora_blocks
from ..layout.blocks import params_outside
from ..projections.noise import NoiseProjection
from ..projections.protocol import Step
from .callback import StepCallback
from .card import add_to_card
from .deepspeed import whole_params
from .diverged import Diverged
from .micro_batches import MicroBatchMixin
from .options import TRAINER_OPTIONS, NSPO2Arguments, nspo2_options
from .refusals import refuse_arguments, refuse_optimizer, refuse_unsupported, say_what_is_plain, warn_of_unmatched
from .retain import Texts
from .retain_mixin import RetainMixin
from .samples import SampleCollector, sample_share
from .saving import SavingMixin
from .timing import StepTimer, Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)
DIVERGED = "lower `learning_rate`, and go on from a checkpoint before"


def _by_name(kind: type, args: tuple, kwargs: dict) -> dict:
    """The arguments of the trainer that the mixin stands before, by name; classes after it may have their own."""
    below = kind.__mro__[kind.__mro__.index(NSPO2Mixin) + 1 :]
    inits = (inspect.signature(vars(part)["__init__"]) for part in below if "__init__" in vars(part))
    signature = next(found for found in inits if "model" in found.parameters)  # others hand on what they get
    given = dict(signature.bind_partial(None, *args, **kwargs).arguments)
    del given[next(iter(signature.parameters))]
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


class NSPO2Mixin(MicroBatchMixin, RetainMixin, SavingMixin):
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
    _nspo2_diverged_at: int | None = None  # as said last

    def _nspo2_init(self, *args: Any, retain_dataset: Texts | None = None, **kwargs: Any) -> None:
        given = _by_name(type(self), args, kwargs)
        config, wanted = given.get("args"), self._nspo2_config_class
        if config is None:
            model: Any = given.get("model")
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            config = given["args"] = wanted(f"{model_name.rstrip('/').split('/')[-1]}-NSPO2-{self._name}")
        if not isinstance(config, wanted):
            got = type(config).__name__
            raise TypeError(
                f"`args` must be an {wanted.__name__}, got {got}: replace `{got}(...)` by `{wanted.__name__}(...)` "
                "with the same arguments."
            )
        self._nspo2_check(given)
        try:
            super().__init__(**given)
        except StopIteration:  # from TRL's look at the first row
            raise ValueError("The dataset `train_dataset` is empty.") from None
        self._nspo2_setup(retain_dataset)

    if not TYPE_CHECKING:  # type checkers shall see the arguments of the trainer itself
        __init__ = _nspo2_init

    def _nspo2_check(self, given: dict) -> None:
        """Refuse what can be refused before anything is loaded; `given` are the arguments by name."""
        if not given["args"].nspo2_enabled:
            return
        refuse_arguments(given["args"])
        refuse_optimizer(given["args"], given.get("optimizers", (None,))[0])
        model = given.get("model")
        if given.get("peft_config") is None:
            lora_blocks(model if isinstance(model, torch.nn.Module) else torch.nn.Module())

    def _nspo2_setup(self, retain_dataset: Texts | None = None) -> None:
        self.nspo2, self.nspo2_projections = None, []
        self._nspo2_retain_setup(retain_dataset)
        self.nspo2_step_timer, self.nspo2_diverged = StepTimer(), Diverged()
        self.add_callback(self.nspo2_step_timer)
        if not self.args.nspo2_enabled:
            return
        refuse_unsupported(self.accelerator)
        self.nspo2_time = Stopwatch(self.accelerator.device)
        self._nspo2_start()
        if self.is_world_process_zero():
            warn_of_unmatched(self.accelerator.unwrap_model(self.model))
            say_what_is_plain(self.model, self._nspo2_others)
        self.add_callback(StepCallback(self))

    def _nspo2_start(self) -> None:
        """Projections that know nothing yet, of the parameters as they are now; the others stay while those do."""
        options = nspo2_options(self.args)
        users = {name: value for name, value in options.items() if name in TRAINER_OPTIONS}
        check_options(users, prefix="nspo2_")  # they may have been changed
        blocks, trained, same = lora_blocks(self.model), self._nspo2_trained(), False
        if self.nspo2 is not None:
            self.nspo2_samples.detach()
            same = self.nspo2.holds(self.model.parameters())
        rest = self.nspo2_projections[1:] if same else self._nspo2_other_projections()
        self._nspo2_others, self._nspo2_made_for = params_outside(blocks, trained), self._nspo2_now(trained)
        micro_batches = self.args.gradient_accumulation_steps
        self.nspo2 = NoiseProjection(
            blocks,
            NSPO2Config(**options),
            process_group=dist.group.WORLD if self.accelerator.num_processes > 1 or self.is_fsdp_enabled else None,
            share=sample_share(micro_batches * self.accelerator.num_processes),
        )
        self.nspo2_projections = [self.nspo2, *rest]
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
        if self.accelerator.scaler is not None:
            return
        self.nspo2_diverged.see_gradient(all(found), self.state.global_step + 1)
        if all(found) or not self._nspo2_drops():
            return
        if any_bad((p.grad for p in self.model.parameters()), self.nspo2.filters[0].total):
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
        trains = self.is_in_train and self.nspo2 is not None
        if trains and "train_loss" in logs and self.state.global_step == self._initial_global_step:
            return  # of a run that was finished before: no step was taken, and no loss seen
        steps, seconds, examples = self.nspo2_step_timer.take() if mine else (0, 0.0, 0.0)
        if steps:
            batch = examples / steps
            figures = {"batch_size": batch, "step_time": seconds / steps}
            if self.nspo2 is not None:
                for projection in self.nspo2_projections:
                    figures |= projection.metrics(batch)
                figures |= self._nspo2_retain_figures(steps)
                figures["overhead_ms"] = 1000 * self.nspo2_time.take() / steps
                self.nspo2.watch({name: figures[name] for name in ("bias", "alpha") if name in figures})
                figures["sentinel_level"] = self.nspo2.sentinel.level
            logs = {**logs, **{f"nspo2/{name}": value for name, value in figures.items()}}
            told, at = self._nspo2_diverged_at, self.nspo2_diverged_at
            self._nspo2_diverged_at = at
            if at is not None and at != told and self.is_world_process_zero():
                logger.warning("The loss or a gradient is not finite from step %d on: %s.", at, DIVERGED)
        super().log(logs, *args, **kwargs)

    @property
    def nspo2_diverged_at(self) -> int | None:
        """The step from which on, up to now, each loss or gradient was not finite; None where the run is sound."""
        return self.nspo2_diverged.since(self.state.global_step, self._nspo2_drops())

    def _nspo2_drops(self) -> bool:
        """Whether a gradient with NaN or Inf is dropped, which would ruin the weights.

        At rank 0 a run is plain TRL to the bit; under fp16 the loss scaler skips the step itself.
        """
        return self.accelerator.scaler is not None or (self.nspo2 is not None and self.args.nspo2_projection_rank > 0)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.nspo2_enabled != (self.nspo2 is not None):
            raise ValueError("`nspo2_enabled` was changed after the trainer was made: make the trainer anew.")
        self.nspo2_diverged, self._nspo2_diverged_at = Diverged(), None
        output = super().train(*args, **kwargs)
        self._nspo2_end()
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(os.path.join(str(self.args.output_dir), "README.md"), self)
