"""Gradient samples: every micro-batch's gradient on every rank, caught by hooks before anything is reduced."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator

from .block_groups import BlockGroups
from .timing import Stopwatch


class SampleCollector:
    """Catches the gradient of each micro-batch of a step, and gathers them over ranks.

    `param.register_hook` sees this rank's gradient of this micro-batch before it is accumulated or reduced. Attach
    it when training starts and detach it when it ends; between the two every backward pass counts as part of a step.

    Args:
        groups: the blocks to watch.
        accelerator: gathers, and knows the loss scale of fp16.
        stopwatch: adds up the time in the hooks; on a CPU only, elsewhere the hooks only queue copies.
    """

    def __init__(self, groups: BlockGroups, accelerator: Accelerator, stopwatch: Stopwatch):
        self.groups, self.accelerator = groups, accelerator
        self.stopwatch = nullcontext() if stopwatch.cuda else stopwatch
        self.handles: list = []
        self.slot = 0
        self.buffers: list[torch.Tensor] = []  # a group: (slots, B, m, d)
        self.views: list[list[list[torch.Tensor]]] = []  # [group][slot][place]
        self._touched = False

    def attach(self) -> None:
        self.detach()
        self.buffers = [group.buffer(1) for group in self.groups.groups]
        self.views = [[group.views_of(buffer[0])] for group, buffer in zip(self.groups.groups, self.buffers)]
        for g, group in enumerate(self.groups.groups):
            for p, place in enumerate(group.places):
                self.handles.append(place.param.register_hook(self._hook(g, p)))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.buffers, self.views, self.slot, self._touched = [], [], [], 0, False

    def _hook(self, group: int, place: int):
        def keep(grad: torch.Tensor) -> None:
            with self.stopwatch:
                self._touched = True
                self.views[group][self.slot][place].add_(grad)

        return keep

    def next_micro_batch(self) -> None:
        """The samples that follow belong to another micro-batch."""
        self.slot += 1
        if self.slot < len(self.views[0]):
            return
        for g, group in enumerate(self.groups.groups):
            grown = group.buffer(2 * self.slot)
            grown[: self.slot] = self.buffers[g]
            self.buffers[g] = grown
            self.views[g] = [group.views_of(grown[slot]) for slot in range(2 * self.slot)]

    def collect(self) -> list[torch.Tensor]:
        """The samples of the step that is complete now, of all ranks, and a clean slate for the next.

        The loss of each of n micro-batches was divided so that the sum of their gradients is the step's gradient:
        times n, their mean is. Under fp16 the loss scale is divided out.

        Returns:
            for each group (ranks x n, B, m, d), the same on every rank; valid until `release`.

        Raises:
            RuntimeError: no backward pass reached the blocks since the last step.
        """
        if not self._touched:
            raise RuntimeError(
                "No gradient reached the LoRA adapters in this step: the loss does not depend on them. Check that the "
                "adapter that is trained is the active one."
            )
        n = self.slot + 1
        scale = n if self.accelerator.scaler is None else n / self.accelerator.scaler.get_scale()
        own = [buffer[:n] if scale == 1 else buffer[:n].mul_(scale) for buffer in self.buffers]
        return own if self.accelerator.num_processes == 1 else [self.accelerator.gather(part) for part in own]

    def release(self) -> None:
        """Forget the step's samples."""
        for buffer in self.buffers:
            buffer[: self.slot + 1].zero_()
        self.slot, self._touched = 0, False
