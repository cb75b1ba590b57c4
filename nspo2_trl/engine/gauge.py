"""Gauge: how much of the gradient of each of B blocks is signal and how much is noise, without counting one as other.

The signal ‖E g‖² is made of products of different samples only, whose noise is independent: of each step's gradient
with the running mean of earlier ones. It needs that running mean, and some numbers a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .eigensolvers import Total, same
from .state import Saved

HISTORY = 512  # steps over which the logged figures are pooled
SPANS = 24  # parts of the run whose sums are kept; when all are full, each takes twice as many steps
MIN_STEPS = 16  # fewer give no standard error worth the name


class Gauge(Saved):
    """Signal and noise of B blocks of m vectors, with their running mean gradient.

    Args:
        like: (B, m, width) for shape, dtype and device. decay: of the running mean, per step.
        stored: the running mean's dtype. total: sums over the ranks that share the columns of a block.
    """

    _TENSORS = ("reference", "history", "spans")
    _NUMBERS = ("weight", "last", "samples", "steps", "span_steps", "weights", "noisy", "counts")

    def __init__(self, like: torch.Tensor, decay: float, stored: torch.dtype | None = None, total: Total = same):
        self.decay, self.total = decay, total
        self.reference = torch.zeros_like(like, dtype=stored)
        self.weight = 0.0  # of all gradients in the running mean, which grows from 0
        self.last = self.steps = 0  # the newest step that was counted, and how many were
        self.span_steps = self.samples = 1  # samples: micro-batches of the newest step
        # a step: <mean, reference>, energy of the noise; over all blocks, and of each block over spans of steps
        self.history = torch.zeros(HISTORY, 2, dtype=torch.float64, device=like.device)
        self.spans = like.new_zeros(SPANS, 2, len(like))
        self.weights: list[float] = []  # of the newest HISTORY steps: of the gradients in the reference
        self.noisy: list[bool] = []  # whether the energy of the noise is known
        self.counts: list[list[float]] = []  # of each span: steps, those whose noise is known, Σ weight

    def energy(self, part: torch.Tensor) -> torch.Tensor:
        """(B,) Σ of the squares of `part` (B, …), over all columns."""
        return self.total(torch.linalg.vector_norm(part.flatten(1), dim=1).square())

    def measure(self, samples: torch.Tensor, step: int) -> None:
        """Count a step by its n gradients (n, B, m, d), with n = 1 by what the gradient has beyond the signal."""
        n, mean, energy = len(samples), samples.mean(0), None
        if n > 1:
            squares = self.total(torch.linalg.vector_norm(samples.flatten(2), dim=2).square().sum(0))
            energy = (squares - n * self.energy(mean)) / (n * (n - 1))
        elif self.samples == 1 and self.weight > 0:  # a single one among several is a shorter step, with other noise
            energy = self.energy(mean) - self.product(mean) / self.weight
        self.samples = n
        self.add(mean, energy, step)

    def product(self, mean: torch.Tensor) -> torch.Tensor:
        """(B,) inner products of a step's gradient with the running mean."""
        reference = self.reference.to(mean.dtype)
        return self.total((mean.flatten(1)[:, None] @ reference.flatten(1)[:, :, None])[:, 0, 0])

    def add(self, mean: torch.Tensor, energy: torch.Tensor | None, step: int) -> None:
        """Count a step.

        Args:
            mean: (B, m, d) its gradient. energy: (B,) of its noise, None where it is not known. step: its number; the
                running mean fades with each, counted or not.
        """
        product = self.product(mean)
        noise = torch.zeros_like(product) if energy is None else energy
        self._count(torch.stack([product, noise]), energy is not None)
        beta, self.last = self.decay ** (step - self.last), step
        self.weight = beta * self.weight + 1 - beta
        self.reference.copy_(self.reference.to(mean.dtype).mul_(beta).add_(mean, alpha=1 - beta))

    def _count(self, found: torch.Tensor, known: bool) -> None:
        """`found` (2, B): product and energy of a step."""
        self.history[self.steps % HISTORY] = found.double().sum(1)
        self.weights, self.noisy = [*self.weights, self.weight][-HISTORY:], [*self.noisy, known][-HISTORY:]
        if self.steps == SPANS * self.span_steps:
            self.span_steps *= 2
            self.spans[: SPANS // 2] = self.spans.unflatten(0, (-1, 2)).sum(1)
            self.spans[SPANS // 2 :] = 0
            self.counts = [[sum(pair) for pair in zip(*two)] for two in zip(self.counts[::2], self.counts[1::2])]
        span = self.steps // self.span_steps
        self.spans[span] += found
        self.counts += [[0, 0, 0.0]] * (span == len(self.counts))
        self.counts[span] = [a + b for a, b in zip(self.counts[span], (1, known, self.weight))]
        self.steps += 1

    def newest(self, count: int) -> torch.Tensor:
        """The newest `count` steps, oldest first, on the host: (count, 4) with Σ over blocks of product and energy,
        weight times blocks, whether the energy is known.
        """
        order = torch.arange(self.steps - count, self.steps, device=self.history.device) % HISTORY
        weights = torch.tensor(self.weights[-count:], dtype=torch.float64) * self.spans.shape[2]
        known = torch.tensor(self.noisy[-count:], dtype=torch.float64)
        return torch.cat([self.history[order].cpu(), torch.stack([weights, known], 1)], 1)


@dataclass
class Reading:
    """Signal and noise over some steps, in one step's gradient.

    Parameters:
        steps: that were measured. signal: ‖E g‖², negative by chance. noise: tr Cov(g).
        signal_error: standard error of the signal. error: of noise / signal, as a share of it; from the scatter
            between spans of the run, so that drift counts as error too.
    """

    steps: int
    signal: float
    signal_error: float
    noise: float
    error: float

    @property
    def known(self) -> bool:
        """Whether the signal is at least twice its standard error."""
        return self.signal > 0 and self.error <= 0.5

    @property
    def scale(self) -> float:
        """Noise over signal: the noise scale in steps' batches."""
        return self.noise / self.signal

    @property
    def at_least(self) -> float:
        """What the noise scale is above, with a signal two standard errors higher."""
        return self.noise / (max(self.signal, 0.0) + 2 * self.signal_error)

    @property
    def wanted(self) -> int:
        """Steps like these after which it would be known; at least so many, where the signal is below its error."""
        error = self.error if self.signal > self.signal_error else 1.0
        return round(self.steps * (error / 0.5) ** 2)


def sums_of(gauges: Sequence[Gauge]) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans (k, 2, blocks) of all blocks that have been there all the time, and counts (k, 3); on the host in float64.

    The last span is added to the one before where it has less than half of its steps.
    """
    most = max(gauge.steps for gauge in gauges)
    counts = torch.tensor(next(gauge.counts for gauge in gauges if gauge.steps == most), dtype=torch.float64)
    sums = torch.cat([g.spans[: len(counts)].double().cpu() for g in gauges if g.steps == most], 2)
    if len(counts) > 1 and 2 * counts[-1, 0] < counts[0, 0]:
        for part in (sums, counts):
            part[-2] += part[-1]
        sums, counts = sums[:-1], counts[:-1]
    return sums, counts


def read(sums: torch.Tensor, counts: torch.Tensor) -> Reading | None:
    """The [`Reading`] of spans: `sums` (k, 2) of product and energy, `counts` (k, 3); None for too few steps."""
    (steps, known, weights), (product, energy) = counts.T, sums.T
    if steps.sum() < MIN_STEPS or known.sum() == 0 or weights.sum() <= 0 or len(sums) < 3:
        return None
    signal, noise = product.sum() / weights.sum(), energy.sum() / known.sum()
    freedom = len(sums) / (len(sums) - 1)
    off = (product - signal * weights) / weights.sum()
    both = (energy - noise * known) / known.sum() / noise - off / signal
    error, relative = ((freedom * part.square().sum()).sqrt().item() for part in (off, both))
    return Reading(int(steps.sum()), signal.item(), error, noise.item(), relative)
