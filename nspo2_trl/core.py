"""NSPO2 for B blocks of one shape: samples in, filtered gradient out, statistics kept on the device.

One step, in `step`: score the step's noise rows with the filter in force, filter the gradient, then learn. The filter
is made of what earlier steps showed, so what it is scored on, and what it is applied to, took no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .config import NSPO2Config, get_default_config
from .covariance import CovEstimator, noise_rows
from .eigensolvers import EigSolver
from .metrics import forget_filter, published, summarize
from .projection import ProjectionHead, coordinates
from .sentinel import BiasSentinel
from .signal import SignalEstimate
from .state import load_tensors
from .strategies import limit_bias, noise_edge, select, significant_rank
from .trust_region import trust_alpha


class NSPO2:
    """The parts of NSPO2 put together for B blocks of the same shape (one block, when used by hand).

    By hand, in any loop: `grad = nspo2.hook(grad)` once a micro-batch, then `nspo2.step_end()`. The trainer and the
    optimizer wrapper call `step` with the gradients of many blocks at once.

    Args:
        config: [`NSPO2Config`] or a mapping with its fields; the published defaults where it is left out.
        num_blocks: B.
        sentinel: the [`BiasSentinel`] to obey, where several of these share one; else it gets its own.
        recent: whether figures fade with `cov_momentum`, or add up until `reset_sums`.

    Raises:
        ValueError: a bad option, or a gradient whose size is not `config.dim`.
    """

    def __init__(
        self,
        config: NSPO2Config | Mapping | None = None,
        num_blocks: int = 1,
        sentinel: BiasSentinel | None = None,
        recent: bool = True,
    ):
        if config is None:
            config = get_default_config()
        self.config = NSPO2Config(**config)  # a copy: what was allocated for it must not change later
        self.num_blocks = num_blocks
        self.sums_decay = self.config.cov_momentum if recent else 1.0
        self._shared_sentinel = sentinel
        self.reset()

    def reset(self) -> None:
        """Forget everything that was learned; the options stay."""
        config = self.config
        self.sentinel = self._shared_sentinel or BiasSentinel.of(config)
        self.active = True
        self.progress = 0.0  # share of training done, for `anneal`
        self.step_count = self.skipped_steps = 0
        self.cov: CovEstimator | None = None
        self._hooked: list[torch.Tensor] = []

    # ---- one step ----

    def step(self, samples: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Score, filter, learn.

        Args:
            samples: (n, B, m, d) gradients of the step's n micro-batches, finite, at least float32, scaled so that
                their mean is the step's gradient.
            grad: (B, m, d) the gradient to filter: that mean, perhaps clipped. None only scores and learns.

        Returns:
            (B, m, d) the filtered gradient; `grad` itself while nothing is projected.
        """
        n = len(samples)
        if self.cov is None:
            self._allocate(samples[0], n)
        self.sums.mul_(self.sums_decay)
        mean = samples[0] if n == 1 else samples.mean(0)
        head = self.head() if self.is_active else None
        result = grad if head is None or grad is None else head.apply(grad)
        energy = None
        if n > 1 or self.previous is not None:
            slot = self.cov.slot(n * mean.shape[1])
            rows = slot.unflatten(1, (n, -1))
            noise_rows(samples, mean, self.previous, out=rows)
            energy = self._score(head, rows, mean, single=n == 1)
            self.cov.commit(slot)
            self._learn(n, vectors=mean.shape[1])
        self.signal.add_step(mean, self.reference, energy)
        beta = self.config.cov_momentum
        self.reference.mul_(beta).add_(mean, alpha=1 - beta)
        if n > 1:
            self.previous = None
        elif self.previous is None:
            self.previous = mean.clone()
        else:
            self.previous.copy_(mean)
        self.step_count += 1
        return result

    def _allocate(self, like: torch.Tensor, n: int) -> None:
        config, (blocks, vectors, dim) = self.config, like.shape
        solver = EigSolver(config.eigensolver, config.epsilon, config.seed)
        kind = {"dtype": like.dtype, "device": like.device}
        self.cov = CovEstimator(
            blocks,
            dim,
            config.max_rank,
            config.update_freq,
            config.cov_momentum,
            config.shrinkage,
            solver,
            rows=n * vectors,
            **kind,
        )
        self.reference = torch.zeros(blocks, vectors, dim, **kind)  # running mean of raw gradients
        self.previous: torch.Tensor | None = None  # the last step's gradient, where a step has one sample
        self.rank = torch.zeros(blocks, dtype=torch.long, device=like.device)
        width = min(config.projection_rank + 1, self.cov.rank)
        self.signal = SignalEstimate(blocks, vectors, width, **kind)
        self.sums = torch.zeros(8, dtype=torch.float64, device=like.device)  # see `metrics.summarize`

    # ---- the filter in force ----

    @property
    def is_active(self) -> bool:
        """Whether the next step will be projected."""
        solved = self.cov is not None and self.cov.solved > 0
        return self.active and solved and self.rank_limit > 0 and self.strength > 0

    @property
    def rank_limit(self) -> int:
        """What may be removed at most: `projection_rank`, less where the sentinel says so; half of a small block."""
        share = self.sentinel.rank_share
        asked = self.config.projection_rank
        return min(asked if share == 1 else math.ceil(asked * share), self.cov.stack.shape[2] // 2)

    @property
    def strength(self) -> float:
        """`strength` after `anneal`."""
        if self.config.anneal == 0:
            return self.config.strength
        return self.config.strength * max(0.0, 1 - self.progress / self.config.anneal)

    def head(self) -> ProjectionHead:
        """The filter that the present state gives; also counts bias, α and rank of it."""
        config, strategy = self.config, self.sentinel.strategy
        width = min(config.projection_rank + 1, self.cov.rank)
        basis = self.cov.basis[:, :width]
        reference = coordinates(self.reference, basis)
        norm_squared = torch.linalg.vector_norm(self.reference, dim=(1, 2)).square()
        rank = self.rank.clamp(max=self.rank_limit)
        rank = limit_bias(strategy, rank, reference, norm_squared, config.target_bias)
        rank = rank.clamp(min=min(config.min_rank, self.rank_limit))
        taken, kept = select(strategy, rank, reference)
        head = ProjectionHead(basis, taken, kept, gain=torch.ones_like(norm_squared))
        lost = torch.linalg.vector_norm(head.restrict(reference), dim=(1, 2))
        alpha = trust_alpha(lost * self.strength, norm_squared.sqrt(), config.trust_radius)
        head.gain = alpha * self.strength
        # m·m′ and ‖m′‖², with m′ = m - gain R m and R m orthogonal to m - R m
        dot = norm_squared - head.gain * lost.square()
        filtered = (norm_squared - head.removed_share * lost.square()).clamp_min(0)
        size = torch.full_like(alpha, 1.0)
        self.sums[2:] += torch.stack([dot, norm_squared, filtered, alpha, rank.to(alpha.dtype), size]).sum(1)
        return head

    # ---- what is measured and learned ----

    def _score(
        self, head: ProjectionHead | None, rows: torch.Tensor, mean: torch.Tensor, single: bool
    ) -> torch.Tensor:
        """Noise energy (B,) of the step; adds it, and what the filter takes of it and of the signal, to the sums."""
        energy = torch.linalg.vector_norm(rows, dim=(1, 2, 3)).square()
        if head is not None:
            inside = coordinates(rows, head.basis)
            removed = head.removed_share * torch.linalg.vector_norm(head.restrict(inside), dim=(1, 2, 3)).square()
            self.sums[:2] += torch.stack([energy, removed]).sum(1)
            self.signal.add_projected(head, mean, inside, single)
        return energy

    def _learn(self, n: int, vectors: int) -> None:
        config, single = self.config, n == 1
        if not self.cov.is_due(n * vectors):
            return
        self.signal.close_window()
        if config.projection_rank == 0:  # only measures
            self.cov.row_steps.clear()
            self.cov.solved = self.cov.step
            return
        self.cov.solve(hold_last=vectors if single else 0)
        dim = self.cov.stack.shape[2]
        limit = min(config.projection_rank, dim // 2)
        # the rows of one matrix share their tokens: a micro-batch counts once, however many rows it has
        steps = self.cov.step - single  # the newest difference is held back
        edge = noise_edge(dim, limit, steps, config.cov_momentum, max(1, n - 1), overlapping=single)
        rank = significant_rank(self.cov.eigenvalues, self.cov.trace, edge)
        self.rank = rank.clamp(min=min(config.min_rank, limit))

    # ---- by hand ----

    def hook(self, grad: torch.Tensor) -> torch.Tensor:
        """Filter one micro-batch's gradient of any shape, and keep it as a sample for `step_end`.

        A gradient with NaN or Inf in it comes back as it is; its step teaches nothing and is counted.
        """
        known = self.config.dim or (self._hooked or [grad])[0].numel()
        if self.cov is not None:
            known = self.reference.numel()
        if grad.numel() != known:
            raise ValueError(
                f"`dim` is {known}, but the gradient has {grad.numel()} entries: set `dim` to that or leave it out, "
                "and use one NSPO2 for each gradient."
            )
        sample = grad.detach().to(torch.promote_types(grad.dtype, torch.float32), copy=True).reshape(1, 1, -1)
        self._hooked.append(sample)
        if not self.is_active or not torch.isfinite(torch.linalg.vector_norm(sample)):
            return grad
        return self.head().apply(sample).to(grad.dtype).view_as(grad)

    def step_end(self, metrics: Mapping | None = None) -> None:
        """Close the step: learn from the gradients that `hook` saw since the last call.

        Args:
            metrics: what the sentinel shall see, such as `{"loss": ...}` or `{"eval_loss": ...}`.
        """
        samples, self._hooked = self._hooked, []
        if not samples:
            return
        stacked = torch.stack(samples)
        if torch.isfinite(torch.linalg.vector_norm(stacked)):
            self.step(stacked, None)
        else:
            self.skipped_steps += 1
        due = self.cov is not None and self.step_count % self.config.update_freq == 0
        if metrics or due:
            seen = {**(summarize([self]) if due else {}), **(metrics or {})}
            if self.sentinel.check(seen, self.step_count):
                forget_filter([self])

    def set_active(self, active: bool) -> None:
        """Switch the projection on or off; learning goes on."""
        self.active = bool(active)

    def get_metrics(self) -> dict:
        """Figures of recent steps under their published names, see [`metrics.published`]. Waits for the device."""
        return published([self], self.skipped_steps)

    # ---- state ----

    _TENSORS = ("reference", "rank", "sums")
    _NUMBERS = ("step_count", "skipped_steps", "progress")

    def state_dict(self) -> dict:
        """Tensors and plain numbers only, so that `torch.load(weights_only=True)` reads it."""
        own = {} if self._shared_sentinel else {"sentinel": self.sentinel.state_dict()}
        if self.cov is None:
            return own
        state = own | {name: getattr(self, name).clone() for name in self._TENSORS}
        state |= {name: getattr(self, name) for name in self._NUMBERS}
        if self.previous is not None:
            state["previous"] = self.previous.clone()
        parts = {name: getattr(self, name).state_dict() for name in ("cov", "signal")}
        return state | parts | {"active": self.active}

    def load_state_dict(self, state: dict, device: torch.device | str | None = None) -> None:
        """Bring back what `state_dict` gave; a step after it equals the step that would have come without it.

        Args:
            device: where the tensors shall lie; where they lie in `state` if left out.

        Raises:
            ValueError: the state is of other blocks or other ranks.
        """
        self.reset()
        if "sentinel" in state:
            self.sentinel.load_state_dict(state["sentinel"])
        if "cov" not in state:
            return
        self._allocate(state["reference"].to(device or state["reference"].device), n=1)
        self.cov.load_state_dict(state["cov"])
        self.signal.load_state_dict(state["signal"])
        load_tensors(self, self._TENSORS, state)
        for name in (*self._NUMBERS, "active"):
            setattr(self, name, state[name])
        self.previous = state["previous"].to(self.reference, copy=True) if "previous" in state else None
