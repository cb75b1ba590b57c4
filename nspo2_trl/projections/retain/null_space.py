"""NullSpace: training, or what comes of it, in the null space of retained inputs, as a trainer's projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ...layout.roles import InputAdapter
from ..protocol import Step
from .collect import InputSpace, mean_leakage
from .project import Point, local, project, put, space_of, starts

IN_NULL_SPACE = 1e-5  # share of the norm of A along K that is rounding: such an A is left as it is


class NullSpace:
    """Keeps every A orthogonal to K while training runs, or makes it so at the end.

    If A x = 0 for the inputs x of all adapted layers on a text, then each layer's output there is the frozen model's,
    and so is the next layer's input: what B learns cannot be seen on that text.

    `during`: A starts as A (I - K Kᵀ), its gradient is projected before each step, and A again after each step, which
    takes K out of whatever the optimizer did, weight decay included. `after`: training is as without, and `end`
    projects.

    Args:
        adapters: what is projected. collect: gives K; called once, when training starts.
        during: project while training runs. scale: of what is left of A, where it is projected at the end.
    """

    def __init__(
        self,
        adapters: Sequence[InputAdapter],
        collect: Callable[[], Sequence[InputSpace]],
        during: bool,
        rank: int,
        scale: float,
    ):
        self.adapters, self.collect, self.during, self.rank, self.scale = adapters, collect, during, rank, scale
        self.spaces: Sequence[InputSpace] | None = None
        self.pairs: list[tuple[InputAdapter, InputSpace]] = []  # empty but for `during`

    @torch.no_grad()
    def start(self) -> None:
        if self.spaces is not None:
            return
        self.spaces = self.collect()
        if not self.during:
            return
        of = space_of(self.spaces)
        self.pairs = [(adapter, of[adapter.name]) for adapter in self.adapters if adapter.name in of]
        for adapter, space in self.pairs:
            weight = local(adapter.weight)
            basis = space.vectors[:, : self.rank].to(weight.device)
            along = torch.linalg.vector_norm(weight.float() @ basis)
            if along > IN_NULL_SPACE * torch.linalg.vector_norm(weight.float()):  # else it is a resumed run's
                weight.copy_(self._off(weight, space))

    @torch.no_grad()
    def before_step(self, step: Step) -> bool:
        for adapter, space in self.pairs:
            if adapter.weight.grad is not None:
                grad = local(adapter.weight.grad)
                grad.copy_(self._off(grad, space))
        return True

    @torch.no_grad()
    def after_step(self) -> None:
        for adapter, space in self.pairs:
            weight = local(adapter.weight)
            weight.copy_(self._off(weight, space))

    def end(self) -> None:
        """Training has ended: project, where that was not done all along."""
        if not self.during and self.spaces is not None:
            put(self.adapters, starts(self.adapters), self.spaces, Point(self.rank, self.scale))

    def metrics(self, batch_size: float) -> dict[str, float]:
        return {"retain_leakage": mean_leakage(self.spaces, self.rank)} if self.spaces else {}

    def state_dict(self, keep: bool) -> dict:
        return {}  # K is made anew from the same texts, or read from its file

    def load_state_dict(self, state: Mapping) -> None:
        pass

    def _off(self, weight: torch.Tensor, space: InputSpace) -> torch.Tensor:
        return project(weight, space, Point(self.rank, 1.0))
