"""The part of NSPO2Mixin that keeps what the model does on retained texts: measures, KL term, projection."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from ..layout.roles import adds_something, input_adapters, unprotected
from ..projections.protocol import Projection
from ..retain_config import RetainConfig
from .options import retain_options
from .retain import Texts
from .retaining import Retained, adds
from .timing import Stopwatch

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer
else:
    _BaseTrainer = object

logger = logging.getLogger(__name__)
NAMES = {"kl": "kl", "loss_rise": "loss"}
UNPROJECTED = "unprojected"  # folder of the adapter as training left it


class RetainMixin(_BaseTrainer):
    """With `nspo2_enabled=False` the retained texts are measured on, and change nothing."""

    args: Any
    model: Any
    processing_class: Any
    loss_is_scaled_for_ga: Any
    nspo2_retained: Retained | None = None
    nspo2_projections: Sequence[Projection]
    _nspo2_save_sharded: Any
    nspo2_retain_projected: bool = False
    _nspo2_retain_sums: tuple[Any, int] = 0.0, 0  # of KL, micro-batches

    def _nspo2_retain_setup(self, dataset: Texts | None) -> None:
        config = RetainConfig(**retain_options(self.args))
        dataset = config.dataset if dataset is None else dataset
        if dataset is None:
            return
        args = self.args
        model: Any = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            raise ValueError(
                "`nspo2_retain_dataset` needs a LoRA adapter, whose base is the frozen model: pass `peft_config` "
                "(in a recipe `use_peft: true`)."
            )
        if len(model.active_adapters) > 1:
            raise ValueError(
                f"`nspo2_retain_dataset` with the active adapters {', '.join(model.active_adapters)}: leave the one "
                "that is trained, and merge the others into the base model."
            )
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if args.nspo2_enabled and config.project == "during" and deepspeed:
            raise ValueError("`nspo2_retain_project='during'` does not work with DeepSpeed: set it to 'after'.")
        if args.nspo2_enabled and config.project != "no":
            adapters = input_adapters(model, model.active_adapters[0])  # refuses other kinds, before texts are read
            if adds_something(adapters, model.active_adapters[0]):
                raise ValueError(
                    "`nspo2_retain_project` would take away what the adapter already does on the retained texts. If "
                    "it was trained before, merge it into the base model and train a new one. If it starts from the "
                    "base model's weights, as PiSSA, OLoRA and CorDA do, leave `init_lora_weights` out. Or set "
                    "`nspo2_retain_project` to 'no', which leaves the KL term."
                )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED) and adds(model):
            raise ValueError(
                "`nspo2_retain_dataset` with an adapter that was trained before needs the adapter as it was on each "
                "process, which FSDP2 and DeepSpeed shard: launch with DDP, or merge the adapter into the base model."
            )
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.nspo2_retained = Retained(model, dataset, tokenizer, config, str(args.output_dir), args.seed)
        self.nspo2_retained.refuse_pairs(self.train_dataset)
        self._nspo2_retain_time = Stopwatch(self.accelerator.device)
        self._nspo2_retain_micro = 0
        if not args.nspo2_enabled:
            return
        if not self.nspo2_retained.writes_tokens and config.kl:
            logger.warning("A reward model has no next-token distribution: there is no KL term, only the projection.")
        missed = unprotected(model, model.active_adapters[0]) if config.project != "no" else {}
        if missed and self.is_world_process_zero():
            kinds = ", ".join(f"{kind} ({len(names)})" for kind, names in missed.items())
            logger.warning(
                "The projection for retained texts does not reach, so not protect, these parameters: %s.", kinds
            )

    def _nspo2_other_projections(self) -> list[Projection]:
        """What the trainer's list holds beside the noise filter; new ones, for the parameters as they are now."""
        retained = self.nspo2_retained
        return [retained.null_space()] if retained is not None and retained.config.project != "no" else []

    @property
    def _nspo2_retain_kl(self) -> float:
        """Weight of the KL term, 0 where there is none."""
        retained = self.nspo2_retained
        return retained.config.kl if retained and retained.writes_tokens and self.args.nspo2_enabled else 0.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        weight = self._nspo2_retain_kl
        if not weight or not self.model.training:
            return result
        assert self.nspo2_retained is not None
        micro_batches = self.args.gradient_accumulation_steps
        world, own = self.accelerator.num_processes, self.nspo2_retained.config.kl_samples
        # the step's texts are the same, however they are shared out among micro-batches and processes
        number = (self.state.global_step * micro_batches + self._nspo2_retain_micro) * world
        self._nspo2_retain_micro += 1
        with self._nspo2_retain_time:
            kl = self.nspo2_retained.kl(
                self.accelerator.unwrap_model(model), (number + self.accelerator.process_index) * own
            )
        total, count = self._nspo2_retain_sums
        self._nspo2_retain_sums = total + kl.detach(), count + 1
        return self._nspo2_add(result, weight, kl, *args, **kwargs)

    def _nspo2_add(self, result: Any, weight: float, term: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`result` of `compute_loss`, and `weight` times the micro-batch's `term`; then the arguments of that."""
        if self._nspo2_scaled(*args, **kwargs):
            term = term / self.current_gradient_accumulation_steps
        if isinstance(result, tuple):
            return result[0] + weight * term, *result[1:]
        return result + weight * term

    def _nspo2_scaled(self, return_outputs: bool = False, num_items_in_batch: Any = None) -> bool:
        """Whether Trainer takes the loss as divided by the number of micro-batches already."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or bool(self.compute_loss_func)

    def _nspo2_retain_figures(self, steps: int) -> dict[str, float]:
        """Of the KL term since the last log; all processes ask."""
        (kl, count), self._nspo2_retain_sums = self._nspo2_retain_sums, (0.0, 0)
        if not count:
            return {}
        mean = self.accelerator.reduce(torch.as_tensor(kl / count, device=self.accelerator.device), "mean")
        return {"retain_kl": float(mean), "retain_ms": 1000 * self._nspo2_retain_time.take() / steps}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self.nspo2_retained is not None and prefix.startswith("eval"):
            figures = self.nspo2_retained.measure()
            output.metrics.update({f"eval_retain_{NAMES[name]}": value for name, value in figures.items()})
        return output

    def _nspo2_end(self) -> None:
        """End the projections; the adapter as it was before goes to `unprojected/`, and the figures to the log."""
        retained, before = self.nspo2_retained, {}
        trained = self.args.nspo2_enabled and self.state.global_step > 0
        if not (trained and retained is not None and retained.config.project == "after"):
            retained = None  # the adapter is not changed here, so there is nothing to compare
        if retained is not None:
            folder = os.path.join(str(self.args.output_dir), UNPROJECTED)
            self._nspo2_save_sharded(folder)
            self.save_model(folder, _internal_call=True)
            before = retained.measure()
        for projection in self.nspo2_projections:
            projection.end()
        if retained is None:
            return
        after, self.nspo2_retain_projected = retained.measure(), True
        figures = {f"nspo2/retain_{short}_unprojected": before.get(name) for name, short in NAMES.items()}
        figures |= {f"eval_retain_{short}": after.get(name) for name, short in NAMES.items()}
        self.log({name: value for name, value in figures.items() if value is not None})
