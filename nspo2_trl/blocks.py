"""Blocks: parameters that are filtered together, stacked by shape so that one call serves all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .config import NSPO2Config
from .core import NSPO2
from .metrics import reset_sums, summarize


@dataclass
class Block:
    """Parameters whose gradients form one block, by name. A LoRA adapter of one module, as a rule."""

    name: str
    params: list[nn.Parameter]


@dataclass
class _Place:
    """Where a parameter's gradient stands in a buffer (…, B, m, d): `buffer[…, block, :, start:stop]`."""

    param: nn.Parameter
    block: int
    start: int
    transposed: bool

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The part of `buffer` (B, m, d), in the parameter's own shape."""
        if self.transposed:
            return buffer[self.block].mT
        return buffer[self.block, :, self.start :].flatten()[: self.param.numel()].view_as(self.param)


class Group:
    """Blocks of one shape on one device: their [`NSPO2`], and where each parameter stands in its buffers."""

    def __init__(self, shape: tuple[int, int], device: torch.device, config: NSPO2Config):
        self.shape, self.device, self.config = shape, device, config
        self.names: list[str] = []
        self.places: list[_Place] = []

    def add(self, name: str, params: list[nn.Parameter]) -> None:
        start = 0
        for param in params:
            transposed = self.shape[0] > 1 and param.shape[0] != self.shape[0]
            self.places.append(_Place(param, len(self.names), start, transposed))
            start += param.numel()
        self.names.append(name)

    def build(self) -> None:
        self.nspo2 = NSPO2(self.config, num_blocks=len(self.names))
        self.grad = self.buffer()
        self.views = self.views_of(self.grad)

    def buffer(self, *lead: int) -> torch.Tensor:
        """Zeros (*lead, B, m, d) in at least float32: the maths is never done in half precision."""
        dtype = torch.promote_types(self.places[0].param.dtype, torch.float32)
        return torch.zeros(*lead, len(self.names), *self.shape, dtype=dtype, device=self.device)

    def views_of(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """One view of `buffer` (B, m, d) a parameter, in the order of `places`."""
        return [place.view(buffer) for place in self.places]

    def read_grads(self) -> list[int]:
        """Copy the parameters' gradients into `grad`; returns the places that have one (missing ones count as 0)."""
        there = [i for i, place in enumerate(self.places) if place.param.grad is not None]
        if len(there) < len(self.places):
            self.grad.zero_()
        if there:
            torch._foreach_copy_([self.views[i] for i in there], [self.places[i].param.grad for i in there])
        return there

    def write_grads(self, result: torch.Tensor, there: list[int]) -> None:
        """Copy `result` (B, m, d) into the parameters' gradients."""
        self.grad.copy_(result)
        torch._foreach_copy_([self.places[i].param.grad for i in there], [self.views[i] for i in there])


def _units(blocks: list[Block], covariance: str):
    """(name, params, (m, d)) of what is filtered as one: a whole block, or each of its matrices when factored."""
    for block in blocks:
        if covariance == "adapter":
            yield block.name, block.params, (1, sum(p.numel() for p in block.params))
            continue
        for index, param in enumerate(block.params):
            matrix = param.ndim == 2 and min(param.shape) > 1
            yield (
                f"{block.name}.{index}",
                [param],
                (min(param.shape), max(param.shape)) if matrix else (1, param.numel()),
            )


class BlockGroups:
    """All blocks of a model, grouped by shape and device.

    Args:
        blocks: what forms a block.
        config: options, shared by all of them.
    """

    def __init__(self, blocks: list[Block], config: NSPO2Config):
        self.config = config
        found: dict[tuple, Group] = {}
        for name, params, shape in _units(blocks, config.covariance):
            key = (*shape, params[0].device, params[0].dtype)
            if key not in found:
                found[key] = Group(shape, params[0].device, config)
            found[key].add(name, params)
        self.groups = list(found.values())
        for group in self.groups:
            group.build()
        self.skipped_steps = 0
        self._norms = torch.zeros(3, dtype=torch.float64)  # Σ norm before, Σ norm after, steps
        self._active_steps = 0

    @property
    def parts(self) -> list[NSPO2]:
        return [group.nspo2 for group in self.groups]

    @torch.no_grad()
    def step(self, samples: list[torch.Tensor] | None = None) -> None:
        """Score, filter the parameters' gradients in place, learn.

        Args:
            samples: for each group (n, B, m, d), gradients of the step's micro-batches, finite; the gradients
                themselves where left out (one sample a step).
        """
        before, after = [], []
        active = False
        for i, group in enumerate(self.groups):
            there = group.read_grads()
            active |= group.nspo2.is_active
            own = group.grad[None] if samples is None else samples[i]
            result = group.nspo2.step(own, group.grad)
            before.append(torch.linalg.vector_norm(group.grad))
            if result is not group.grad:
                group.write_grads(result, there)
            after.append(before[-1] if result is group.grad else torch.linalg.vector_norm(result))
        norms = torch.stack([torch.stack([a.to(before[0]), b.to(before[0])]) for a, b in zip(before, after)])
        norms = torch.linalg.vector_norm(norms, dim=0)
        self._norms = self._norms.to(norms.device)
        self._norms[:2] += norms
        self._norms[2] += 1
        self._active_steps += active

    def set_progress(self, progress: float) -> None:
        """Share of training done, for `anneal`."""
        for part in self.parts:
            part.progress = progress

    def metrics(self, batch_size: float = 1.0) -> dict[str, float]:
        """Figures since the last call, see [`metrics.summarize`]; waits for the device."""
        before, after, steps = self._norms.tolist()
        found = {"skipped_steps": self.skipped_steps}
        if all(part.cov is not None for part in self.parts):
            found |= summarize(self.parts, batch_size)
            reset_sums(self.parts)
        if steps:
            found |= {
                "grad_norm_raw": before / steps,
                "grad_norm": after / steps,
                "active": self._active_steps / steps,
            }
        self._norms.zero_()
        self._active_steps = 0
        return found

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that training with NSPO2 holds on top of plain training, buffers of a step included."""
        tensors = [v for part in self.parts for v in (*vars(part).values(), *vars(part.cov or part).values())]
        tensors += [group.grad for group in self.groups]
        unique = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(unique.values())

    def state_dict(self) -> dict:
        """Tensors and plain numbers, keyed by the blocks' names."""
        state = {
            f"{group.names[0]} and {len(group.names) - 1} more": group.nspo2.state_dict() for group in self.groups
        }
        return {"groups": state, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: Mapping) -> None:
        """Raises `ValueError` where the state was saved for other blocks or other ranks."""
        wanted = [f"{group.names[0]} and {len(group.names) - 1} more" for group in self.groups]
        if list(state["groups"]) != wanted:
            raise ValueError(f"it was saved for the blocks {list(state['groups'])}, this run has {wanted}")
        for group, saved in zip(self.groups, state["groups"].values()):
            group.nspo2.load_state_dict(saved, device=group.device)
        self.skipped_steps = state["skipped_steps"]
