"""NSPO2Optimizer: NSPO2 around any torch optimizer, in any training loop."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any, overload

import torch
from torch import nn

from ..config import NSPO2Config, get_default_config
from ..engine.by_hand import published
from ..engine.finite import any_bad, entries
from ..layout.adapters import lora_blocks
from ..layout.blocks import Block, params_outside
from ..projections.noise import NoiseProjection
from ..projections.protocol import Step
from .wrapper import Wrapper

logger = logging.getLogger(__name__)


def _module_blocks(model: nn.Module) -> list[Block]:
    """Adapters where the model has trainable ones, else the trainable parameters of each module."""
    try:
        return lora_blocks(model)
    except ValueError:
        owners: dict[str, Block] = {}
        for name, param in model.named_parameters():  # a shared one once
            if param.requires_grad:
                owner = name.rpartition(".")[0] or "model"
                owners.setdefault(owner, Block(owner, [])).params.append(param)
        return list(owners.values())


def create_nspo2_optimizer(
    params: nn.Module | Iterable,
    optimizer_cls: type[torch.optim.Optimizer],
    optimizer_kwargs: Mapping | None = None,
    config: NSPO2Config | Mapping | None = None,
    blocks: Iterable[Iterable[nn.Parameter]] | None = None,
) -> NSPO2Optimizer:
    """Wrap a torch optimizer so that every step's gradient (or update) is filtered by NSPO2.

    Args:
        params: parameters, parameter groups, an iterator over either, or a model. Of a model, each adapter is a block,
            else each module; of parameters, each tensor is one. What is unfrozen or added later is one too.
        optimizer_cls: the optimizer to wrap, such as `torch.optim.Adam`. optimizer_kwargs: such as `{"lr": 1e-3}`.
        config: [`NSPO2Config`] or a mapping; `get_default_config()` if left out.
        blocks: lists of parameters that shall be filtered as one vector each; parameters in none are left alone.

    Raises:
        ValueError: no parameter, or one that cannot be filtered; a bad option; a parameter of `blocks` that is not
            optimized; an optimizer that evaluates gradients itself, as LBFGS and SAM do.
    """
    if not isinstance(config, NSPO2Config):
        config = get_default_config() if config is None else NSPO2Config(**config)
    found = None
    if isinstance(params, nn.Module):
        found = _module_blocks(params)
        params = params.parameters() if found else ()  # frozen ones too, which may be unfrozen later
    if not (params := list(params)):
        raise ValueError("`params` holds no trainable parameter: pass `model.parameters()` or the model itself.")
    optimizer = optimizer_cls(params, **(optimizer_kwargs or {}))
    if blocks is not None:
        found = [Block(f"block {i}", list(block)) for i, block in enumerate(blocks)]
    return NSPO2Optimizer(optimizer, config, found)


class NSPO2Optimizer(Wrapper):
    """A torch optimizer whose steps are filtered by NSPO2; `create_nspo2_optimizer` makes one.

    Schedulers, gradient scalers, clipping and Accelerate work on it as on any other, see [`Wrapper`]. One step is one
    gradient sample. A step whose gradient has NaN or Inf is not taken, and is counted. Each step asks the optimizer
    inside what it holds: a parameter that has come or is trainable since becomes a block of its own.

    Args:
        optimizer: the optimizer to wrap. config: the options.
        blocks: what is filtered as one; each trainable parameter for itself if left out.
    """

    _own = ("optimizer", "config", "blocks", "others", "enabled", "nspo2")

    def __init__(self, optimizer: torch.optim.Optimizer, config: NSPO2Config, blocks: list[Block] | None = None):
        super().__init__(optimizer)
        params = self._params()
        trained = [p for p in params if p.requires_grad]
        if blocks is None:
            blocks = [Block(f"param {i}", [p]) for i, p in enumerate(params) if p.requires_grad or not trained]
        left = {id(p) for p in params}
        for block in blocks:
            if not block.params or any(id(p) not in left for p in block.params):
                raise ValueError(
                    f"`blocks`: {block.name} is empty or holds a parameter that is not in `params`, or that is in a "
                    "block before."
                )
            left -= {id(p) for p in block.params}
        if not blocks:
            raise ValueError("`blocks` is empty: leave it out to filter each parameter for itself.")
        self.config, self.blocks, self.enabled = config, list(blocks), True
        self.others = params_outside(blocks, trained)
        self.nspo2 = NoiseProjection(blocks, config, recent=True)

    def _follow(self, also: Iterable[int] = ()) -> None:
        """Filter what the optimizer inside holds now: what is trainable, or has its index in `also`."""
        params = self._params()
        held = {id(p) for p in params}
        known = {id(p) for p in (*self.others, *(p for block in self.blocks for p in block.params))}
        new = {
            i: p
            for i, p in enumerate(params)
            if id(p) not in known and (p.requires_grad or p.grad is not None or i in also)
        }
        if not new and known <= held:
            return
        self.others = [p for p in self.others if id(p) in held]
        left = [Block(block.name, [p for p in block.params if id(p) in held]) for block in self.blocks]
        left = [block for block in left if block.params]
        taken = {block.name for block in left}
        for i, p in new.items():
            name = next(name for n in count(i) if (name := f"param {n}") not in taken)
            taken.add(name)
            left.append(Block(name, [p]))
        if left:
            self.blocks = left
            self.nspo2.follow(left)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters; each becomes a block of its own, and the noise estimate of the others goes on."""
        self.optimizer.add_param_group(param_group)
        self._follow()

    def set_enabled(self, enabled: bool) -> None:
        """Off, a step is the inner optimizer's own to the bit, and nothing is learned."""
        self.enabled = bool(enabled)
        for part in self.nspo2.filters:
            part.previous = None  # the steps in between are no noise

    @overload
    def step(self, closure: None = None, **options: Any) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], **options: Any) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, **options: Any) -> float | None:
        """Filter and step, with the `options` of the inner `step`.

        A closure is evaluated once, before; the optimizer inside is told its loss, and so is `report`.

        Raises:
            ValueError: the optimizer inside asks the closure for a gradient at other parameters.
        """
        if not self.enabled:
            return self.optimizer.step(**options) if closure is None else self.optimizer.step(closure, **options)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        if self._is_probe():
            self._take_step(loss, **options)
            return loss
        self.nspo2.read_grads()
        # entries of the gradients that are not filtered: of parameters in no block, and sparse ones
        sparse = [p for block in self.blocks for p in block.params if p.grad is not None and p.grad.is_sparse]
        others = [entries(p.grad) for p in (*self.others, *sparse) if p.grad is not None]
        if self.nspo2.before_step(Step(others=others)):
            self._take_step(loss, **options)
            self.nspo2.after_step()
            self._look(loss)
        elif self.config.projection_rank == 0 or not any_bad(p.grad for p in self._params()):
            self._take_step(loss, **options)
        return loss

    def _is_probe(self) -> bool:
        """Whether gradients and rates are all 0: torch's checkpoints step so to have the optimizer make its state."""
        still = all(float(group.get("lr", 0)) == 0 for group in self.param_groups)
        return still and not any(entries(p.grad).any() for p in self._params() if p.grad is not None)

    def _look(self, loss: float | None) -> None:
        """Have the sentinel see the loss of a closure, and at times what it can see from here."""
        if self.config.sentinel:
            due = self.nspo2.filters[0].step_count % self.config.update_freq == 0
            seen = ({} if loss is None else {"loss": float(loss)}) | (self.nspo2.metrics() if due else {})
            if seen:
                self.report(**seen)

    def report(self, **metrics: float) -> None:
        """Tell the sentinel what it cannot see from here: `loss=...` (noisy, is smoothed) or `eval_loss=...`.

        With several processes report the same figures on each, reduced first: the sentinel changes the filter.
        """
        self.nspo2.watch(metrics)

    def set_progress(self, progress: float) -> None:
        """Share of training done, from 0 to 1; needed for `anneal`."""
        self.nspo2.set_progress(progress)

    def get_metrics(self) -> dict:
        """Figures of recent steps, see [`published`]; waits for the device."""
        found = published(self.nspo2.filters, self.nspo2.metrics())
        return found | {"is_active": found["is_active"] and self.enabled}

    def _save(self) -> dict:
        self._follow()
        return super()._save() | {"nspo2": self.nspo2.state_dict() | {"enabled": self.enabled}}

    def _load(self, state: dict) -> None:
        own = state.pop("nspo2", None)
        # what was unfrozen by then, and is not yet here
        self._follow([int(i) for name in (own or {}).get("blocks", ()) for i in re.findall(r"^param (\d+)", name)])
        fresh = NoiseProjection(self.blocks, self.config, recent=True, layout=own and own["blocks"])
        if own is None:
            logger.warning("The optimizer state holds no NSPO2 state: the noise estimate starts anew.")
            own = {"enabled": self.enabled} | fresh.state_dict()
        try:
            fresh.load_state_dict(own)
        except ValueError as error:
            raise ValueError(
                f"The NSPO2 part of the optimizer state does not fit ({error}): make the optimizer with the config "
                "and blocks that it was saved with, or delete the key 'nspo2' to start afresh."
            ) from error
        self.enabled = own["enabled"]
        super()._load(state)
        self.nspo2 = fresh
