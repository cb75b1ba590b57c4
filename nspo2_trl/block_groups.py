"""BlockGroups: all blocks of a model, and what is done to them around each optimizer step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .blocks import Block, Group, units
from .config import NSPO2Config
from .core import NSPO2
from .eigensolvers import Total, same
from .metrics import forget_filter, reset_sums, summarize
from .sentinel import BiasSentinel

logger = logging.getLogger(__name__)


class BlockGroups:
    """All blocks of a model, grouped by shape and device: what a trainer or an optimizer calls around each step.

    `begin_step` before the optimizer steps, `end_step` after it. With `apply_to="gradient"` the first filters the
    gradients in place; with `"update"` the second filters what the optimizer changed.

    Args:
        blocks: what forms a block.
        config: options, shared by all of them.
        recent: see [`NSPO2`].
        layout: the `blocks` of a saved state, where some were added later; they are grouped as they were then.
        ranks: the processes that share the work, see [`Shards`]; None for one process.
        share: share of the steps that are learned from, see [`samples.sample_share`].
    """

    def __init__(
        self,
        blocks: list[Block],
        config: NSPO2Config,
        recent: bool = False,
        layout: Mapping[str, int] | None = None,
        ranks: dist.ProcessGroup | None = None,
        share: float = 1.0,
    ):
        self.config, self.recent, self.ranks, self.share = NSPO2Config(**config), recent, ranks, share
        self.sentinel = BiasSentinel.of(self.config)
        self.groups: list[Group] = []
        self.add(blocks, layout or {})
        self.skipped_steps = 0
        self._samples: list[torch.Tensor | None] = []  # of the step, a group; empty where it is left out
        self._norms = torch.zeros(4, dtype=torch.float64)  # Σ norm before, Σ norm after, steps, active steps

    def add(self, blocks: list[Block], layout: Mapping[str, int]) -> None:
        """Take up more blocks; their estimate starts now."""
        found: dict[tuple, Group] = {}
        for name, params, shape in units(blocks, self.config.covariance):
            key = (*shape, params[0].device, params[0].dtype, layout.get(name))
            if key not in found:
                found[key] = Group(shape, params[0].device, self.config, self.ranks)
            found[key].add(name, params)
        for group in found.values():
            group.build(self.sentinel, self.recent, self.share)
        self.groups += found.values()

    @property
    def parts(self) -> list[NSPO2]:
        return [group.nspo2 for group in self.groups]

    @property
    def total(self) -> Total:
        """Sums over the ranks that share the work."""
        return self.groups[0].nspo2.total

    def holds(self, params: Iterable[torch.Tensor]) -> bool:
        """Whether every parameter that is filtered is one of `params`."""
        known = {id(p) for p in params}
        return all(id(place.param) in known for group in self.groups for place in group.places)

    def follow(self) -> None:
        """Move to where the parameters are, should they have been moved since."""
        for group in self.groups:
            group.follow()

    @property
    def learns(self) -> bool:
        """Whether the next step is one to learn from: `share` of them are, at even distances.

        The second of a run is the first: before, lora_B is 0 and so are the gradients of lora_A.
        """
        step = self.groups[0].nspo2.step_count + math.ceil(1 / self.share) - 1
        return int(step * self.share) > int((step - 1) * self.share)

    @torch.no_grad()
    def begin_step(
        self, samples: Callable[[], list[torch.Tensor]] | None = None, others: Sequence[torch.Tensor] = ()
    ) -> bool:
        """Score, filter and learn, or prepare for it; call it when the step's gradients are complete.

        Args:
            samples: called where the step is one to learn from; gives for each group (n, B, m, d), gradients of the
                step's micro-batches, to stay as they are until `end_step`. If left out, the gradients themselves
                (one sample a step).
            others: gradients of parameters in no block; they are only looked at for bad numbers.

        Returns:
            False where a sample or another gradient has NaN or Inf: nothing is learned or filtered, and the step is
            counted.
        """
        self.follow()
        there = self._there = [group.read_grads() for group in self.groups]
        update = self.config.apply_to == "update"
        if samples is not None:
            found = samples() if self.learns else []
        else:  # kept apart where `grad` is needed for the change of the parameters later
            found = [group.grad.clone()[None] if update else group.grad[None] for group in self.groups]
        if not all_finite([*(found or [group.grad for group in self.groups]), *others], self.total):
            self._samples = []
            self.skipped_steps += 1
            if self.skipped_steps == 1:
                logger.warning(
                    "A gradient sample is NaN or infinite: NSPO2 learns nothing from this step. Further ones are "
                    "counted in `skipped_steps`."
                )
            return False
        self._samples = [*found] or [None] * len(self.groups)
        if update:
            for group in self.groups:
                group.read_params()
                group.before.copy_(group.grad)
        else:
            self._filter(lambda group, i, result: group.write_grads(result, there[i]))
        return True

    @torch.no_grad()
    def end_step(self) -> None:
        """Call it when the optimizer has stepped, and only after a `begin_step` that returned True."""
        if self.config.apply_to == "update" and self._samples:
            for group in self.groups:
                group.read_params()
                group.grad.sub_(group.before)
            self._filter(lambda group, i, result: group.write_params(result, self._there[i]))
        self._samples = []

    def _filter(self, write: Callable[[Group, int, torch.Tensor], None]) -> None:
        """Filter what is in each group's `grad`; `write` is called with the result where it differs."""
        energies = []
        active = any(part.is_active for part in self.parts)
        for i, group in enumerate(self.groups):
            before = torch.linalg.vector_norm(group.grad)
            result = group.nspo2.step(self._samples[i], group.grad)
            after = before
            if result is not group.grad:
                after = torch.linalg.vector_norm(result)
                write(group, i, result)
            energies.append(torch.stack([before, after]).to(self.groups[0].device).square())
        norms = self.total(torch.stack(energies).sum(0)).sqrt()
        self._norms = self._norms.to(norms.device) * self.parts[0].sums_decay
        self._norms[:2] += norms
        self._norms[2] += 1
        self._norms[3] += active

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Let the sentinel see figures, and the filter obey it."""
        if self.sentinel.check(metrics, self.parts[0].step_count):
            forget_filter(self.parts)

    def set_progress(self, progress: float) -> None:
        """Share of training done, for `anneal`."""
        for part in self.parts:
            part.progress = progress

    def metrics(self, batch_size: float = 1.0) -> dict[str, float]:
        """Figures since the last call, or of recent steps, see [`metrics.summarize`]; waits for the device."""
        before, after, steps, active = self._norms.tolist()
        found: dict[str, float] = {"skipped_steps": self.skipped_steps}
        if all(part.cov is not None for part in self.parts):
            found |= summarize(self.parts, batch_size)
        if steps:
            found |= {"grad_norm_raw": before / steps, "grad_norm": after / steps, "active": active / steps}
        if not self.recent:
            self._norms.zero_()
            reset_sums(self.parts)
        return found

    def spectrum(self) -> list[float]:
        """Tracked eigenvalues as shares of the noise, mean over blocks, largest first; waits for the device."""
        shares = [part.cov.eigenvalues / part.cov.trace[:, None].clamp_min(1e-30) for part in self.parts if part.cov]
        width = min((share.shape[1] for share in shares), default=0)
        return torch.cat([share[:, :width].double().cpu() for share in shares]).mean(0).tolist() if width else []

    @property
    def state_bytes(self) -> int:
        """Bytes that NSPO2 holds on top of plain training, without the samples of a step."""
        tensors = [v for part in self.parts for v in (*vars(part).values(), *vars(part.cov or part).values())]
        tensors += [tensor for group in self.groups for tensor in vars(group).values()]
        unique = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(unique.values())

    def state_dict(self, keep: bool = True) -> dict:
        """Tensors and plain numbers; the blocks' names are keys, so that other blocks are noticed.

        Where ranks share the work, each must call it; it gives whole blocks, for any number of ranks to load, to
        those that `keep` them.
        """
        groups = {}
        for i, group in enumerate(self.groups):
            groups[str(i)] = group.nspo2.state_dict()
            if group.shards:
                groups[str(i)] = _map_columns(groups[str(i)], partial(group.shards.whole, keep=keep))
        return {
            "groups": groups,
            "blocks": self._names(),
            "sentinel": self.sentinel.state_dict(),
            "skipped_steps": self.skipped_steps,
            "norms": self._norms.clone(),
        }

    def _names(self) -> dict[str, int]:
        return {name: i for i, group in enumerate(self.groups) for name in group.names}

    def load_state_dict(self, state: Mapping) -> None:
        """Raises `ValueError` where the state was saved for other blocks or other ranks."""
        if list(state["blocks"].items()) != list(self._names().items()):
            raise ValueError(f"it was saved for {len(state['blocks'])} blocks, which are not the ones of this run")
        for group, saved in zip(self.groups, state["groups"].values()):
            if group.shards:
                saved = _map_columns(saved, group.shards.cut)
            group.nspo2.load_state_dict(saved, device=group.device)
        self.sentinel.load_state_dict(state["sentinel"])
        self.skipped_steps = state["skipped_steps"]
        self._norms = state["norms"].to(self._norms, copy=True)


def _map_columns(state: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """`state` of an [`NSPO2`] with `change` done to every tensor whose last dimension are a block's columns."""
    state = dict(state)
    for name in ("reference", "previous"):
        if name in state:
            state[name] = change(state[name])
    if "cov" in state:
        state["cov"] = state["cov"] | {"stack": change(state["cov"]["stack"])}
    return state


def all_finite(tensors: list[torch.Tensor], total: Total = same) -> bool:
    """Whether none has NaN, Inf or entries so large that their squares overflow, on any rank that `total` sums over.

    Waits for the device once.
    """
    norms = torch.stack([torch.linalg.vector_norm(part).to(tensors[0].device) for part in tensors])
    return bool(torch.isfinite(total(norms.square().sum())))


def any_bad(grads: Iterable[torch.Tensor | None], total: Total = same) -> bool:
    """Whether any entry is NaN or Inf, on any rank that `total` sums over.

    For the rare case that `all_finite` said no; waits for the device.
    """
    bad = [(~torch.isfinite(entries(grad))).any() for grad in grads if grad is not None]
    return bool(total(torch.stack(bad).sum()))


def entries(grad: torch.Tensor) -> torch.Tensor:
    """What stands in a gradient: of a sparse one its values, of a sharded one what this rank has, else all of it."""
    if isinstance(grad, DTensor):
        return grad.to_local()
    return grad.coalesce().values() if grad.is_sparse else grad
