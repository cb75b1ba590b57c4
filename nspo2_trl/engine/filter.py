"""NoiseFilter for B blocks of one shape: samples in, filtered gradient out, statistics kept on the device.

One step, in `step`: score the step's noise rows with the filter in force, filter the gradient, then learn. The filter
is made of what earlier steps showed, so what it is scored on, and what it is applied to, took no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import NSPO2Config
from .covariance import CovEstimator, noise_rows
from .eigensolvers import EigSolver, Spread, Total, alone, same
from .gauge import Gauge
from .power import PowerEstimator
from .projection import ProjectionHead, coordinates
from .sentinel import BiasSentinel
from .shards import Shards
from .signal_to_noise import SignalRemoved
from .state import load_tensors
from .strategies import Choice
from .sums import FilterSums, summarize


class NoiseFilter:
    """The parts of NSPO2 put together for B blocks of the same shape. With `projection_rank` 0 it only measures.

    Args:
        config: [`NSPO2Config`] or a mapping with its fields, which are checked.
        sentinel: the [`BiasSentinel`] to obey, where several of these share one; else it gets its own.
        recent: whether figures fade with `cov_momentum`, or add up until `sums.reset()`.
        share: share of the steps that are learned from. shards: the columns that this rank has, where ranks share.
    """

    def __init__(
        self,
        config: NSPO2Config | Mapping,
        sentinel: BiasSentinel | None = None,
        recent: bool = True,
        share: float = 1.0,
        shards: Shards | None = None,
    ):
        self.config = NSPO2Config(**config)  # a copy: what was allocated for it must not change later
        self.sums_decay = self.config.cov_momentum if recent else 1.0
        self.share, self.shards = share, shards
        self.total: Total = shards.sum if shards else same
        self.spread: Spread = shards.spread if shards else alone
        self._shared_sentinel = sentinel
        self.reset()

    def reset(self) -> None:
        """Forget everything that was learned; the options stay."""
        self.sentinel = self._shared_sentinel or BiasSentinel.of(self.config)
        self.active = True
        self.progress = 0.0  # share of training done, for `anneal`
        self.step_count = self.skipped_steps = 0
        self.samples = 1  # micro-batches of the newest step that was learned from
        self.gauge: Gauge | None = None  # both made at the first step that is learned from
        self.cov: CovEstimator | None = None

    def step(self, samples: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Score, filter, learn. With `shards`, d is their `width` in all of it.

        Args:
            samples: (n, B, m, d) gradients of the step's n micro-batches, finite, at least float32, scaled so that
                their mean is the step's gradient. None only filters.
            grad: (B, m, d) the gradient to filter: that mean, perhaps clipped. None only scores and learns.

        Returns:
            (B, m, d) the filtered gradient; `grad` itself while nothing is projected.
        """
        self.step_count += 1
        if self.gauge is None:
            if samples is None:
                return grad
            self._allocate(samples[0], len(samples))
        gauge, cov = self.gauge, self.cov
        if cov is None:
            if samples is not None and gauge is not None:
                gauge.measure(samples, self.step_count)
            return grad
        self.sums.decay(self.sums_decay)
        head = self.head() if self.is_active else None
        result = grad if head is None or grad is None else head.apply(grad)
        if samples is None:
            cov.advance()
        else:
            self._learn(head, samples)
        if cov.is_due():
            self._solve()
        return result

    def _allocate(self, like: torch.Tensor, n: int) -> None:
        """Room for blocks `like` (B, m, d), of which a step has n samples."""
        config, (blocks, vectors, width) = self.config, like.shape
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        stored = torch.bfloat16 if config.basis_dtype == "bfloat16" else like.dtype
        self.sums = FilterSums(like.device)
        self.gauge = Gauge(like, config.cov_momentum, stored, self.total)
        if config.projection_rank == 0:
            return
        dim = self.shards.dim if self.shards else width
        self.most = min(config.projection_rank, dim // 2)  # directions that may be removed, the sentinel aside
        solver = EigSolver(config.eigensolver, config.epsilon, config.seed, self.total, self.spread)
        options: dict[str, Any] = {"samples": n, "vectors": vectors, "share": self.share, "width": width, **kind}
        rank, every, decay = config.max_rank, config.update_freq, config.cov_momentum
        kind_of = CovEstimator if vectors == 1 else PowerEstimator
        self.cov = kind_of(blocks, dim, rank, every, decay, solver, stored=stored, **options)
        self.cov.step = self.step_count - 1  # steps before, that were not learned from
        self.previous: torch.Tensor | None = None  # the last step's gradient, where that had one sample
        self.rank = torch.zeros(blocks, dtype=torch.long, device=like.device)
        directions = min(config.projection_rank + 1, self.cov.rank)
        self.signal_removed = SignalRemoved(blocks, vectors, directions, **kind)

    @property
    def reference(self) -> torch.Tensor:
        """(B, m, d) the running mean of raw gradients, in at least float32."""
        assert self.gauge is not None
        return self.gauge.reference.to(self.gauge.spans.dtype)

    @property
    def is_active(self) -> bool:
        """Whether the next step will be projected."""
        solved = self.cov is not None and self.cov.solved > 0
        return self.active and solved and self.rank_limit > 0 and self.strength > 0

    @property
    def rank_limit(self) -> int:
        """What may be removed at most: `projection_rank`, less where the sentinel says so; half of a small block."""
        return math.ceil(self.most * self.sentinel.rank_share)

    @property
    def strength(self) -> float:
        """`strength` after `anneal`."""
        if self.config.anneal == 0:
            return self.config.strength
        return self.config.strength * max(0.0, 1 - self.progress / self.config.anneal)

    def head(self) -> ProjectionHead:
        """The filter that the present state gives; also counts bias, α and rank of it."""
        assert self.cov is not None and self.gauge is not None  # while nothing was learned there is no filter
        config, mean = self.config, self.reference
        directions = min(config.projection_rank + 1, self.cov.rank)
        basis = self.cov.basis[:, :directions].to(mean.dtype)
        reference = self.total(coordinates(mean, basis))
        rank = self.rank.clamp(max=self.rank_limit)
        floor = min(config.min_rank, self.rank_limit)
        choice = Choice(self.sentinel.strategy, self.strength, config.trust_radius, config.target_bias, floor)
        head, did = choice.head(basis, rank, reference, self.gauge.energy(mean), self.total)
        self.sums.add_filter(*did)
        return head

    def _learn(self, head: ProjectionHead | None, samples: torch.Tensor) -> None:
        """Score the noise rows of `samples` (n, B, m, d) with the filter that was in force, then learn from them."""
        assert self.cov is not None and self.gauge is not None
        n, vectors = len(samples), samples.shape[2]
        self.samples = n
        mean = samples[0] if n == 1 else samples.mean(0)
        energy = None
        if n > 1 or self.previous is not None:
            buffered = self.cov.room(n, vectors)
            whole = buffered is not None and buffered.shape[2] == vectors
            rows = buffered if buffered is not None and whole else torch.empty_like(samples.transpose(0, 1))
            noise_rows(samples, mean, self.previous, out=rows)
            energy = self._score(head, rows, mean)
            self.cov.learn(rows, buffered, energy, self.config.seed + self.step_count)
        self.gauge.add(mean, energy, self.step_count)
        self.previous = mean.clone() if n == 1 else None

    def _score(self, head: ProjectionHead | None, rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Noise energy (B,) of the step; adds it, and what the filter takes of it and of the signal, to the sums."""
        assert self.gauge is not None
        energy = self.gauge.energy(rows)
        if head is not None:
            inside = head.coordinates(rows)
            removed = head.removed_share * torch.linalg.vector_norm(head.restrict(inside), dim=(1, 2, 3)).square()
            self.sums.add_noise(energy, removed)
            self.signal_removed.add_projected(head, mean, inside, single=rows.shape[1] == 1)
        return energy

    def _solve(self) -> None:
        """Merge what was learned into the basis, and find how much of it is significant."""
        assert self.cov is not None
        single = self.samples == 1
        self.signal_removed.close_window()
        self.cov.solve(hold_last=self.cov.row_steps.count(self.cov.step) if single else 0)
        found = self.cov.significant(self.most, held=single)
        if found is not None:
            self.rank = found.clamp(min=min(self.config.min_rank, self.most))

    _NUMBERS = ("step_count", "samples", "skipped_steps", "progress", "active")

    def state_dict(self) -> dict:
        """Tensors and plain numbers only, so that `torch.load(weights_only=True)` reads it."""
        state: dict[str, Any] = {} if self._shared_sentinel else {"sentinel": self.sentinel.state_dict()}
        state |= {name: getattr(self, name) for name in self._NUMBERS}
        if self.gauge is None:
            return state
        state |= {"gauge": self.gauge.state_dict(), "sums": self.sums.tensor.clone()}
        if self.cov is None:
            return state
        if self.previous is not None:
            state["previous"] = self.previous.clone()
        return state | {
            "rank": self.rank.clone(),
            "cov": self.cov.state_dict(),
            "removed": self.signal_removed.state_dict(),
        }

    def load_state_dict(self, state: dict, device: torch.device | str | None = None) -> None:
        """Bring back what `state_dict` gave, on `device` or where it lies: the next step is as if nothing had been.

        Raises:
            ValueError: the state is of other blocks, or of other LoRA ranks or `max_rank`.
        """
        self.reset()
        if "sentinel" in state:
            self.sentinel.load_state_dict(state["sentinel"])
        for name in self._NUMBERS:
            setattr(self, name, state[name])
        if "gauge" not in state:
            return
        saved = state["gauge"]
        self._allocate(saved["reference"].to(device or saved["reference"].device, saved["spans"].dtype), n=1)
        assert self.gauge is not None
        self.gauge.load_state_dict(saved)
        load_tensors(self.sums, ["tensor"], {"tensor": state["sums"]})
        if (self.cov is None) != ("cov" not in state):
            raise ValueError("`projection_rank` is 0 in one of both runs and not in the other")
        if self.cov is None:
            return
        self.cov.load_state_dict(state["cov"])
        self.signal_removed.load_state_dict(state["removed"])
        load_tensors(self, ["rank"], state)
        self.previous = state["previous"].to(self.rank.device, copy=True) if "previous" in state else None


def figures(filters: Sequence[NoiseFilter], batch_size: float = 1.0) -> dict[str, float]:
    """What `filters` of one model measured, pooled, see [`summarize`]; waits for the device."""
    gauges = [part.gauge for part in filters if part.gauge is not None]
    if len(gauges) < len(filters):
        return {}  # nothing was learned yet
    removals = [part.signal_removed for part in filters if part.cov is not None]
    return summarize([part.sums for part in filters], gauges, removals, batch_size)
