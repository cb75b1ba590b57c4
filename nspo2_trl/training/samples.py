"""Gradient samples: every micro-batch's gradient on every rank, caught by hooks before anything is reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..engine.shards import Shards
from ..projections.noise import NoiseProjection
from .timing import Stopwatch


def sample_share(samples: int) -> float:
    """Share of the steps to learn from, where a step has `samples` micro-batches over all ranks.

    It depends on nothing else, so that the same micro-batches teach the same wherever they ran, and is low enough for
    the traffic of [`SampleCollector`] to stay below that of an all-reduce of the gradients.
    """
    return 1.0 if samples == 1 else min(0.8, 1.6 / max(1, samples - 2))


class SampleCollector:
    """Catches the gradient of each micro-batch of a step, and hands every rank its columns of all of them.

    `param.register_hook` sees this rank's gradient of this micro-batch before it is accumulated or reduced. Between
    `attach` and `detach` every backward pass counts as part of a step.

    Traffic, in entries that a rank sends a step on average, with D entries in all blocks, W ranks, n micro-batches a
    rank and f = `sample_share(n W)`, beside some numbers a block (see below):

    - DDP: (W - 1)/W · D · (f n' + 1), where n' = n samples are exchanged, n - 1 for W = 2; the 1 is the filtered
      gradient that comes back. It is at most 1.8 (W - 1)/W · D; an all-reduce of the gradients sends 2 (W - 1)/W · D.
    - FSDP2: (W - 1)/W · D · (f n + 2/W); nothing comes back but what a rank has of the gradient. In update space the
      parameters travel too: 4/W in place of 2/W.
    - Small sums, through all-reduces, 2 (W - 1)/W of: for each block with m vectors m (n W + 3) (k + 1) + n W + 3
      numbers a step, with k = `projection_rank`, and at an eigensolve of N rows, k' = `max_rank` of them directions,
      (N - k') N + k'², and as much again for eigenvectors that come back. Little beside D, but in tiny models.

    Args:
        noise: the blocks to watch. model: where they are. accelerator: knows the loss scale of fp16.
        slots: micro-batches that a rank has in a step.
        stopwatch: adds up the time in the hooks; on a CPU only, elsewhere the hooks only queue copies.
    """

    def __init__(
        self, noise: NoiseProjection, model: nn.Module, accelerator: Accelerator, slots: int, stopwatch: Stopwatch
    ):
        self.noise, self.model, self.accelerator, self.slots = noise, model, accelerator, slots
        self.stopwatch = nullcontext() if stopwatch.cuda else stopwatch
        self.handles: list = []
        self.slot = 0
        self.buffers: list[torch.Tensor] = []  # for each stack (slots, B, m, d)
        self.views: list[list[list[torch.Tensor]]] = []  # [stack][slot][place]
        self._touched = self._sampled = False  # whether a gradient came in this step; whether it was kept
        self._seen: list[torch.Tensor] = []  # whether each had other entries than 0, until a parameter's `grad` has
        # DeepSpeed steps in the backward pass and calls NSPO2 before; of FSDP2's parameters the gradient comes last
        self._sees = accelerator.distributed_type != DistributedType.DEEPSPEED and noise.stacks[0].moves is None
        self._trusts = not self._sees

    def attach(self) -> None:
        self.detach()
        stacks = self.noise.stacks
        self.buffers = [stack.buffer(self.slots) for stack in stacks]
        self._view()
        places = [
            (place.param, self._hook(s, p)) for s, stack in enumerate(stacks) for p, place in enumerate(stack.places)
        ]
        hooks = {id(param): hook for param, hook in places}
        for module, name, param in _owners(self.model):
            if id(param) in hooks and isinstance(param, DTensor):
                self._refuse_wrapped(module)
                self.handles.append(module.register_forward_pre_hook(_WhenWhole(name, hooks[id(param)], self.handles)))
            elif id(param) in hooks:
                self.handles.append(param.register_hook(hooks[id(param)]))

    def _view(self) -> None:
        pairs = zip(self.noise.stacks, self.buffers)
        self.views = [[stack.views_of(part) for part in buffer] for stack, buffer in pairs]

    def _refuse_wrapped(self, owner: nn.Module) -> None:
        wrapped = (module for module in self.model.modules() if isinstance(module, ParamWrapper))
        if any(owner is part for wrapper in wrapped for part in wrapper.modules()):
            raise ValueError(
                "NSPO2 cannot see the gradient samples of LoRA on single parameters under FSDP2: use `target_modules` "
                "instead of `target_parameters` in the LoRA config, or DDP."
            )

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.buffers, self.views, self.slot = [], [], [], 0
        self._touched = self._sampled = False
        self._seen, self._trusts = [], not self._sees

    def _hook(self, stack: int, place: int) -> Callable[[torch.Tensor], None]:
        def keep(grad: torch.Tensor) -> None:
            self._touched = True
            if not self._trusts:
                self._seen.append(grad.any())
            if self.noise.learns:
                self._sampled = True
                with self.stopwatch:
                    self.views[stack][self.slot][place].add_(grad)

        return keep

    def next_micro_batch(self) -> None:
        """The samples that follow belong to another micro-batch."""
        self.slot += 1
        if self.slot == len(self.buffers[0]):  # a step that has more of them than was said when training began
            self.buffers = [torch.cat([buffer, torch.zeros_like(buffer[:1])]) for buffer in self.buffers]
            self._view()

    def versions(self) -> list[int]:
        """Of the parameters in blocks: a change in place counts one up."""
        return [place.param._version for stack in self.noise.stacks for place in stack.places]

    def stepped(self, versions: list[int]) -> bool:
        """Whether in the backward pass since then parameters were changed, or all of their gradient was taken away.

        What has to be read from the device for that is read until a gradient was there once.
        """
        if not self._sees:
            return False
        grads = [place.param.grad for stack in self.noise.stacks for place in stack.places]
        there = [grad for grad in grads if grad is not None]
        lost = self._touched and not there
        if there and any(self._seen):
            lost = not any(grad.is_sparse or grad.any() for grad in there)
            self._trusts = not lost
        self._seen = []
        return lost or versions != self.versions()

    def check(self) -> None:
        """Raise `RuntimeError` where no backward pass reached the blocks since the last step."""
        if not self._touched:
            raise RuntimeError(
                "No gradient reached the LoRA adapters in this step: the loss does not depend on them. Check that the "
                "adapter that is trained is the active one."
            )

    def collect(self) -> list[torch.Tensor]:
        """The samples of the step that is complete now, of all ranks; the stacks have read its gradient already.

        The sum of the n micro-batches' gradients is the step's gradient: times n, their mean is. Under fp16 the loss
        scale is divided out.

        Returns:
            for each stack (ranks x n, B, m, d), with d the columns that this rank has; valid until `release`. Empty
            where the step is not one to learn from.
        """
        if not self.noise.learns:
            return []
        n = self.slot + 1
        scale = n if self.accelerator.scaler is None else n / self.accelerator.scaler.get_scale()
        own = [buffer[:n] if scale == 1 else buffer[:n].mul_(scale) for buffer in self.buffers]
        shards = [stack.shards for stack in self.noise.stacks if stack.shards]
        if not shards:
            return own
        if shards[0].ranks == 2 and self.noise.stacks[0].moves is None:
            return self._exchange_differences(own, shards)
        return [shard.exchange(part).flatten(0, 1) for shard, part in zip(shards, own)]

    def _exchange_differences(self, own: list[torch.Tensor], shards: list[Shards]) -> list[torch.Tensor]:
        """The same for two ranks that both have the gradient of the step: its mean tells what the other's mean is.

        So one sample less has to travel. The gradient may have been clipped since: by what factor follows from
        <c g, mean of the ranks' g> = c |g|², one sum over ranks.
        """
        means = [part.mean(0) for part in own]
        full = [stack.full for stack in self.noise.stacks]
        products = ((g * mean).sum() for g, mean in zip(full, means))
        inner = shards[0].sum(sum(products, torch.zeros(()))) / 2
        clipped = sum(torch.linalg.vector_norm(g).square() for g in full) / inner
        clipped = torch.where(torch.isfinite(clipped) & (clipped > 0), clipped, 1.0)
        found = []
        for stack, shard, part, mean, g in zip(self.noise.stacks, shards, own, means, full):
            others = part.new_zeros(len(part), *stack.grad.shape)
            if len(part) > 1:
                others[:-1] = shard.exchange(part[:-1] - mean)[1 - shard.rank]
                others[-1] = -others[:-1].sum(0)
            others += 2 * shard.cut(g) / clipped - shard.cut(mean)
            pair = (shard.cut(part), others)
            found.append(torch.cat(pair if shard.rank == 0 else pair[::-1]))
        return found

    def release(self) -> None:
        """Forget the step's samples."""
        if self._sampled:
            for buffer in self.buffers:
                buffer[: self.slot + 1].zero_()
        self.slot, self._touched, self._sampled = 0, False, False


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module whose forward uses it, attribute path, parameter) of all parameters of `model`."""
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if isinstance(module, nn.ParameterDict):  # has no forward of its own
                parent, _, own = path.rpartition(".")
                yield model.get_submodule(parent), f"{own}.{name}", param
            else:
                yield module, name, param


class _WhenWhole:
    """A forward-pre-hook: FSDP2 has put the whole parameter in place by then, the same one each time."""

    def __init__(self, name: str, hook: Callable[[torch.Tensor], None], handles: list):
        self.name, self.hook, self.handles, self.seen = name, hook, handles, None

    def __call__(self, module: nn.Module, inputs: object) -> None:
        path, _, name = self.name.rpartition(".")
        param = getattr(module.get_submodule(path) if path else module, name)
        if param is not self.seen and not isinstance(param, DTensor) and param.requires_grad:
            self.seen = param
            self.handles.append(param.register_hook(self.hook))
