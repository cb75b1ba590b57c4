"""Wrapper: an optimizer that stands for another one, with its groups, its state and its attributes."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_EVALUATES = (
    "{name} evaluates its closure several times a step, or elsewhere than at the parameters, each time with another "
    "gradient, which NSPO2 cannot filter: use a first-order optimizer such as torch.optim.AdamW."
)


def _arguments(optimizer: torch.optim.Optimizer) -> list[inspect.Parameter]:
    """What its `step` takes."""
    return list(inspect.signature(type(optimizer).step).parameters.values())[1:]


def _inner(name: str) -> property:
    """An attribute of the optimizer inside."""
    return property(lambda self: getattr(self.optimizer, name), lambda self, v: setattr(self.optimizer, name, v))


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one: torch takes it for any optimizer, users for the one inside.

    Groups, state and defaults are those of the optimizer inside, and so is every public attribute that the wrapper
    has not itself; hooks are the wrapper's own.

    Args:
        optimizer: the one inside.

    Raises:
        ValueError: it evaluates gradients itself, as LBFGS and SAM do.
    """

    optimizer: torch.optim.Optimizer
    _own: tuple[str, ...] = ("optimizer",)  # attributes that are never the inner one's, and are pickled
    _step_supports_amp_scaling = False  # a gradient scaler is to unscale before `step`

    def __init__(self, optimizer: torch.optim.Optimizer):
        needed = [a for a in _arguments(optimizer) if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
        if needed or any(hasattr(optimizer, name) for name in ("first_step", "perturb_weights")):
            raise ValueError(_EVALUATES.format(name=type(optimizer).__name__))
        # what the base constructor does besides groups, state and defaults, which are there
        self.__setstate__({"optimizer": optimizer})

    param_groups, state = _inner("param_groups"), _inner("state")
    defaults = property(lambda self: getattr(self.optimizer, "defaults", {}))  # not every wrapper of others has some

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self._own or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(self.optimizer, name):
            super().__setattr__(name, value)
        else:
            setattr(self.optimizer, name, value)

    def __getstate__(self) -> dict:
        return {name: self.__dict__[name] for name in self._own}

    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _take_step(self, loss: Any, **options: Any) -> None:
        """Have the optimizer inside step; `loss` is what it gets where it asks a closure, which it was not handed."""
        if loss is None or not _arguments(self.optimizer):
            self.optimizer.step(**options)
            return
        stepped = [p for p in self._params() if p.grad is not None]
        norms = [torch.linalg.vector_norm(p) for p in stepped]

        def known() -> Any:
            now = (torch.linalg.vector_norm(p) for p in stepped)
            if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(norms, now)):
                raise ValueError(_EVALUATES.format(name=type(self.optimizer).__name__))
            return loss

        self.optimizer.step(known, **options)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict:
        """The inner optimizer's state, and NSPO2's under the key `nspo2`: tensors and plain numbers.

        Raises:
            ValueError: torch's `get_optimizer_state_dict` asks for it in a form that has no place for all of it.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = _packed(self._save())
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Bring back what `state_dict` gave; a state of the bare optimizer too, with a fresh noise estimate.

        Raises:
            ValueError: the state was saved for other parameters, blocks or `max_rank`.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else changed
        self._load(_unpacked(state))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _save(self) -> dict:
        return self.optimizer.state_dict()

    def _load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)


# torch's `get_optimizer_state_dict` keeps the entries `state` and `param_groups` and drops any other, so what it asks
# for has the others in a group: as bytes, which no helper casts, reshapes or takes apart.
_CHECKPOINT, _KEPT, _PACKED = "torch.distributed.checkpoint.state_dict", ("state", "param_groups"), "nspo2"


def _packed(state: dict) -> dict:
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != _CHECKPOINT:
        frame = frame.f_back
    if frame is None:
        return state
    if getattr(frame.f_locals.get("info"), "flatten_optimizer_state_dict", False):
        raise ValueError(
            "`flatten_optimizer_state_dict` has no place for NSPO2's part of the optimizer's state: leave it out, or "
            "save `optimizer.state_dict()`."
        )
    file = io.BytesIO()
    torch.save({name: value for name, value in state.items() if name not in _KEPT}, file)
    first, *others = state["param_groups"]
    return {"state": state["state"], "param_groups": [first | {_PACKED: file.getvalue()}, *others]}


def _unpacked(state: dict) -> dict:
    groups = state.get("param_groups", [])
    packed = [group[_PACKED] for group in groups if _PACKED in group]
    if not packed:
        return state
    groups = [{name: value for name, value in group.items() if name != _PACKED} for group in groups]
    return state | {"param_groups": groups} | torch.load(io.BytesIO(packed[0]), weights_only=True)
