"""NoiseProjection: NSPO2's filter on all blocks of a model, around each optimizer step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist

from ..config import NSPO2Config
from ..engine.eigensolvers import check_exact
from ..engine.filter import NoiseFilter, figures
from ..engine.finite import all_finite
from ..engine.sentinel import BiasSentinel
from ..engine.state import in_dtype, map_columns
from ..engine.sums import Norms, spectrum
from ..layout.blocks import Block, units
from ..layout.stacks import Stack, stacked
from ..metrics import VANISHED
from .protocol import Step
from .ranks import config_for, mean_width

logger = logging.getLogger(__name__)

STEADY = 10  # solutions after which the estimate needs less
PARTS = ("gauge", "cov", "signal_removed", "sums")  # of a filter, that hold tensors


class NoiseProjection:
    """All blocks of a model, stacked by shape and device, and the [`NoiseFilter`] of each stack.

    With `apply_to="gradient"` `before_step` filters gradients in place; with `"update"` `after_step` filters changes.

    Args:
        blocks: what forms a block. config: options, shared by all of them. recent: see [`NoiseFilter`].
        layout: the `blocks` of a saved state, where some were added later; they are stacked as they were then.
        process_group: the processes that share the work, see [`Shards`]; None for one process.
        share: share of the steps that are learned from, see [`samples.sample_share`].

    Raises:
        ValueError: `eigensolver="exact"` with large blocks or several processes.
    """

    def __init__(
        self,
        blocks: list[Block],
        config: NSPO2Config,
        recent: bool = False,
        layout: Mapping[str, int] | None = None,
        process_group: dist.ProcessGroup | None = None,
        share: float = 1.0,
    ):
        self.config, self.recent, self.process_group = NSPO2Config(**config), recent, process_group
        self.share, self.updates = share, self.config.apply_to == "update"
        self.sentinel = BiasSentinel.of(self.config)
        self.stacks: list[Stack] = []
        self.filters: list[NoiseFilter] = []
        self.width = 0.0  # that the ranks of the options are for, see [`config_for`]
        self.follow(blocks, layout)
        self.skipped_steps, self.norms = 0, Norms()
        self._samples: list[torch.Tensor | None] = []  # of the step, for each stack; empty where it is left out

    def follow(self, blocks: list[Block], layout: Mapping[str, int] | None = None) -> None:
        """Filter `blocks` from now on: the estimate of stacks whose blocks are all among them as they were goes on."""
        found = {unit.name: unit for unit in units(blocks, self.config.covariance)}
        self.width = self.width or mean_width(found.values())
        progress = self.filters[0].progress if self.filters else 0.0
        kept = [i for i, stack in enumerate(self.stacks) if stack.is_of(found)]
        self.stacks, self.filters = [self.stacks[i] for i in kept], [self.filters[i] for i in kept]
        there = self._names()
        new = [unit for name, unit in found.items() if name not in there]
        for stack in stacked(new, layout or {}, self.updates, self.process_group):
            if self.config.eigensolver == "exact":
                check_exact(stack.shape[1], stack.shards)
            stack.build()
            self.stacks.append(stack)
            self.filters.append(self._filter(stack))
        self.set_progress(progress)

    def _filter(self, stack: Stack) -> NoiseFilter:
        config = config_for(self.config, stack.shape[1], self.width)
        return NoiseFilter(config, self.sentinel, self.recent, self.share, stack.shards)

    def holds(self, params: Iterable[torch.Tensor]) -> bool:
        """Whether every parameter that is filtered is one of `params`."""
        return {id(place.param) for stack in self.stacks for place in stack.places} <= {id(p) for p in params}

    def start(self) -> None:
        """Move to where the parameters are, should they have been moved since, and to their dtype."""
        for i, stack in enumerate(self.stacks):
            dtype = stack.grad.dtype
            if stack.follow():
                state = in_dtype(self.filters[i].state_dict(), dtype, stack.grad.dtype)
                self.filters[i].load_state_dict(state, device=stack.device)

    @property
    def learns(self) -> bool:
        """Whether the next step is one to learn from: `share` of them are, at even distances, first the second.

        After `STEADY` times `update_freq` steps, 50 at least, it is half as many; not where a step is one sample,
        which is compared with the one before, nor where nothing is filtered.
        """
        step = self.filters[0].step_count + math.ceil(1 / self.share) - 1
        late = STEADY * max(self.config.update_freq, 5)
        halves = self.config.projection_rank > 0 and self.share < 1  # asked for each gradient: cheap things first
        share = self.share / (2 if halves and all(part.step_count >= late for part in self.filters) else 1)
        return int(step * share) > int((step - 1) * share)

    @torch.no_grad()
    def read_grads(self) -> None:
        """Copy the gradients of the step into the stacks: for `before_step`, and for who collects its samples."""
        self.start()
        for stack in self.stacks:
            stack.read_grads()

    @torch.no_grad()
    def before_step(self, step: Step) -> bool:
        """Score, filter and learn, or prepare for it; the gradients have been read.

        Returns:
            False where a sample or another gradient has NaN or Inf: nothing is learned or filtered, and the step is
            counted.
        """
        if step.progress is not None:
            self.set_progress(step.progress)
        found = step.samples
        if found is None:  # kept apart where `grad` is needed for the change of the parameters later
            found = [stack.grad.clone()[None] if self.updates else stack.grad[None] for stack in self.stacks]
        if not all_finite([*(found or [stack.grad for stack in self.stacks]), *step.others], self.filters[0].total):
            self._samples = []
            self.skipped_steps += 1
            if self.skipped_steps == 1:
                logger.warning(
                    "A gradient sample is NaN or infinite: NSPO2 learns nothing from this step. Further ones are "
                    "counted in `skipped_steps`."
                )
            return False
        self._samples = [*found] or [None] * len(self.stacks)
        if self.updates:
            for stack in self.stacks:
                stack.read_params()
                stack.before.copy_(stack.grad)
        else:
            self._apply(Stack.write_grads)
        return True

    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizer has stepped; nothing is done where `before_step` returned False."""
        if self.updates and self._samples:
            for stack in self.stacks:
                stack.read_params()
                stack.grad.sub_(stack.before)
            self._apply(Stack.write_params)
        self._samples = []
        for stack in self.stacks:
            stack.release()

    def end(self) -> None:
        """What was filtered is in the parameters."""

    def _apply(self, write: Callable[[Stack, torch.Tensor], None]) -> None:
        """Filter what is in each stack's `grad`, and have the stack `write` the result where it differs."""
        energies = []
        active = any(part.is_active for part in self.filters)
        for stack, part, samples in zip(self.stacks, self.filters, self._samples):
            before = after = torch.linalg.vector_norm(stack.grad)
            result = part.step(samples, stack.grad)
            if result is not None and result is not stack.grad:
                after = torch.linalg.vector_norm(result)
                write(stack, result)
            energies.append(torch.stack([before, after]).to(self.stacks[0].device).square())
        self.norms.add(self.filters[0].total(torch.stack(energies).sum(0)), active, self.filters[0].sums_decay)

    def set_progress(self, progress: float) -> None:
        """Share of training done, for `anneal`."""
        for part in self.filters:
            part.progress = progress

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Let the sentinel see figures, and the filter obey it."""
        if self.sentinel.check(metrics, self.filters[0].step_count):
            for part in self.filters:
                if part.gauge is not None:
                    part.sums.forget_filter()

    def metrics(self, batch_size: float = 1.0) -> dict[str, float]:
        """Figures since the last call, or of recent steps, see [`summarize`]; waits for the device."""
        norms = self.norms.figures()
        found = {"skipped_steps": self.skipped_steps, **figures(self.filters, batch_size), **norms}
        if norms and norms["grad_norm_raw"] < VANISHED * self.norms.largest:
            found.pop("variance_reduction", None)
        if not self.recent:
            self.norms.tensor.zero_()
            for part in self.filters:
                if part.gauge is not None:
                    part.sums.reset()
        return found

    def spectrum(self) -> list[float]:
        """See [`spectrum`]; waits for the device."""
        known = [part.cov for part in self.filters if part.cov is not None]
        return spectrum([cov.values for cov in known], [cov.trace for cov in known])

    @property
    def state_bytes(self) -> int:
        """Bytes that NSPO2 holds between steps on top of plain training, without the samples of a step."""
        owners = [*self.filters, *self.stacks, *(vars(part).get(name) for part in self.filters for name in PARTS)]
        tensors = [value for owner in owners if owner for value in vars(owner).values() if torch.is_tensor(value)]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def state_dict(self, keep: bool = True) -> dict:
        """Tensors and plain numbers, of whole blocks, for any number of ranks to load.

        Where ranks share the work, each must call it; those that do not `keep` it get their own columns.
        """
        states = {}
        for i, (stack, part) in enumerate(zip(self.stacks, self.filters)):
            states[str(i)] = part.state_dict()
            if stack.shards:
                states[str(i)] = map_columns(states[str(i)], partial(stack.shards.whole, keep=keep))
        return {
            "groups": states,  # as version 0.2 called them
            "blocks": self._names(),
            "sentinel": self.sentinel.state_dict(),
            "skipped_steps": self.skipped_steps,
            "norms": self.norms.tensor.clone(),
            "width": self.width,
            "largest": self.norms.largest,
        }

    def _names(self) -> dict[str, int]:
        return {name: i for i, stack in enumerate(self.stacks) for name in stack.names}

    def load_state_dict(self, state: Mapping) -> None:
        """Raises `ValueError` where the state was saved for other blocks, LoRA ranks or `max_rank`."""
        if list(state["blocks"].items()) != list(self._names().items()):
            raise ValueError(f"it was saved for {len(state['blocks'])} blocks, which are not the ones of this run")
        self.width = state.get("width", math.inf)
        self.filters = [self._filter(stack) for stack in self.stacks]
        for stack, part, saved in zip(self.stacks, self.filters, state["groups"].values()):
            part.load_state_dict(map_columns(saved, stack.shards.cut) if stack.shards else saved, stack.device)
        self.sentinel.load_state_dict(state["sentinel"])
        self.skipped_steps, self.norms.largest = state["skipped_steps"], state.get("largest", 0.0)
        self.norms.tensor = state["norms"].to(self.norms.tensor, copy=True)
