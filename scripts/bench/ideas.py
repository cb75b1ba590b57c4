"""Changes of the filter that were tried and are not in the package; docs/log.md has what came out.

Each function prepares a trainer as [`lean.train`] wants it. They wrap the parts of a trainer's engine: `step` sees the
samples (n, B, m, d) of a step, `head` makes the filter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nspo2_trl import NSPO2DPOTrainer
from nspo2_trl.core import NSPO2
from nspo2_trl.projection import ProjectionHead, coordinates

DECAY = 0.97  # a step


def first_moment(trainer: NSPO2DPOTrainer) -> Callable[[list[torch.Tensor]], None]:
    """Adam's first moment gets the filtered gradient, the second the raw one.

    The optimizer adds (1 - β₂)·filtered² to β₂·v: v is changed beforehand so that the raw square comes out.
    """
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    beta = trainer.args.adam_beta2

    @torch.no_grad()
    def step(raw: list[torch.Tensor]) -> None:
        for param, grad in zip(params, raw):
            if "exp_avg_sq" in trainer.optimizer.state[param]:
                missing = grad.square() - param.grad.square()
                trainer.optimizer.state[param]["exp_avg_sq"].add_(missing, alpha=(1 - beta) / beta)
        trainer.optimizer.step()

    return step


@dataclass
class SoftHead(ProjectionHead):
    """A filter that takes away a share (B, k) or (k,) of each direction."""

    shares: torch.Tensor | float = 1.0

    def restrict(self, coords: torch.Tensor) -> torch.Tensor:
        part, shares = super().restrict(coords), self.shares
        if isinstance(shares, torch.Tensor) and shares.ndim == 2:
            shares = shares.view(len(shares), *[1] * (coords.ndim - 2), -1)
        return part * shares


def _soft(part: NSPO2, head: Callable[[], ProjectionHead], shares: Callable) -> ProjectionHead:
    found = head()
    return SoftHead(found.basis, found.taken, found.kept, found.gain, found.total, shares(part, found))


def soft_gain(trainer: NSPO2DPOTrainer) -> None:
    """Each direction passes s = Hμ²/(Hμ² + σ²), H being the steps left; μ² and σ² are pooled over adapters."""
    pool: dict[str, torch.Tensor] = {}

    def shares(part: NSPO2, head: ProjectionHead) -> torch.Tensor:
        width = head.basis.shape[1]
        if not pool:
            return torch.zeros(width)
        left = trainer.args.max_steps * (1 - part.progress)
        snr = left * (pool["signal"] / pool["noise"].clamp_min(1e-30)).clamp_min(0)[:width]
        return 1 / (1 + snr)

    def step(part: NSPO2, inner: Callable, samples: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        if part.is_active and samples is not None:  # not every step is one to learn from
            n, basis = len(samples), part.cov.basis[:, : part.config.projection_rank + 1]
            inside = coordinates(samples.transpose(0, 1), basis)  # (B, n, m, k)
            total, squares = inside.sum(1).square().sum((0, 1)), inside.square().sum((0, 1, 2))
            new = {"signal": (total - squares) / (n * (n - 1)), "noise": (squares - total / n) / (n * (n - 1))}
            share = DECAY ** (1 / len(trainer.nspo2.parts))
            for name, value in new.items():
                pool[name] = share * pool[name] + value if name in pool else value
        return inner(samples, grad)

    for part in trainer.nspo2.parts:
        part.step = partial(step, part, part.step)
        part.head = partial(_soft, part, part.head, shares)


def cosine_shrinkage(trainer: NSPO2DPOTrainer) -> None:
    """Of each direction cos² is taken away, its expected squared cosine with a true one (spiked covariance)."""

    def shares(part: NSPO2, head: ProjectionHead) -> torch.Tensor:
        cov = part.cov
        values = cov.eigenvalues[:, : head.basis.shape[1]]
        rows = torch.tensor([part.config.cov_momentum**age for age, number in cov.ages() for _ in range(number)])
        gamma = cov.dim * float(rows.square().sum() / rows.sum() ** 2)
        left = cov.trace[:, None] - values.cumsum(1) + values  # what an eigenvalue and those after it share
        seen = values * (cov.dim - torch.arange(values.shape[1])) / left.clamp_min(1e-30)
        middle = seen + 1 - gamma
        true = (middle + (middle.square() - 4 * seen).clamp_min(0).sqrt()) / 2
        over = (true - 1).clamp_min(1e-6)
        return torch.where(over > gamma**0.5, (1 - gamma / over.square()) / (1 + gamma / over), 0.0).clamp_min(0)

    for part in trainer.nspo2.parts:
        part.head = partial(_soft, part, part.head, shares)


@dataclass
class SpanHead(ProjectionHead):
    """A filter that leaves in what lies in `span` (B, k, s), orthonormal columns within the directions taken."""

    span: torch.Tensor | None = None

    def restrict(self, coords: torch.Tensor) -> torch.Tensor:
        taken = coords * self.taken.view(len(self.taken), *[1] * (coords.ndim - 2), -1)
        flat = taken.flatten(1, -2)
        return taken - (flat @ self.span @ self.span.mT).view_as(taken)


def several_references(trainer: NSPO2DPOTrainer) -> None:
    """`keep` gives back the span of four running means of the gradient, with momenta 0, 0.5, 0.9 and 0.99."""
    momenta = torch.tensor([0.0, 0.5, 0.9, 0.99])

    def step(part: NSPO2, inner: Callable, means: dict, samples: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        found = inner(samples, grad)
        if samples is not None:  # after the filter, which would else leave the whole step's gradient in
            old = means.get("now", torch.zeros(len(grad), len(momenta), grad[0].numel()))
            means["now"] = old + (1 - momenta)[:, None] * (samples.mean(0).flatten(1)[:, None] - old)
        return found

    def head(part: NSPO2, inner: Callable, means: dict) -> ProjectionHead:
        found = inner()
        if "now" not in means:
            return found
        inside = coordinates(means["now"], found.basis) * found.taken[:, None]  # (B, 4, k)
        span = torch.linalg.qr(inside.mT).Q * found.taken[..., None]
        return SpanHead(found.basis, found.taken, found.kept, found.gain, found.total, span)

    for part in trainer.nspo2.parts:
        means: dict[str, torch.Tensor] = {}
        part.step, part.head = partial(step, part, part.step, means), partial(head, part, part.head, means)


def agreement(trainer: NSPO2DPOTrainer, over: tuple[int, ...] = (1, 2)) -> None:
    """Micro-batches count the less the farther out they lie in the noise directions: 1/(1 + distance²).

    Distances are in units of the step's spread in each direction, over the dimensions `over` of (B, n, m, k): in each
    adapter for itself, or pooled, so that adapters with little noise are left alone.
    """

    def step(part: NSPO2, inner: Callable, samples: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        if part.cov is not None and part.cov.solved and samples is not None:
            cov, rank = part.cov, part.config.projection_rank
            inside = coordinates(samples.transpose(0, 1), cov.basis[:, :rank])  # (B, n, m, k)
            inside = inside - inside.mean(1, keepdim=True)
            spread = inside.square().mean(over, keepdim=True).clamp_min(1e-30)
            far = (inside.square() / spread).mean((2, 3))  # (B, n), 1 on average
            weights = 1 / (1 + far)
            weights = (weights / weights.mean(1, keepdim=True)).T[..., None, None]
            mean = samples.mean(0)
            clipped = torch.linalg.vector_norm(grad) / torch.linalg.vector_norm(mean).clamp_min(1e-30)
            grad = grad + clipped * ((weights * samples).mean(0) - mean)
        return inner(samples, grad)

    for part in trainer.nspo2.parts:
        part.step = partial(step, part, part.step)


agreement_pooled = partial(agreement, over=(0, 1, 2))


def balance(vectors: torch.Tensor, order: list[int]) -> list[int]:
    """A new order whose partial sums stay nearer to 0, from `vectors` (n, k) with mean 0 (GraB, Lu et al. 2022)."""
    total, front, back = torch.zeros_like(vectors[0]), [], []
    for i in order:
        ahead = (total * vectors[i]).sum() <= 0
        total = total + vectors[i] if ahead else total - vectors[i]
        (front if ahead else back).append(i)
    return front + back[::-1]


def balanced_order(trainer: NSPO2DPOTrainer, new_order: Callable = balance) -> Callable[[list[torch.Tensor]], None]:
    """Micro-batches of the first epoch come again in each later one, balanced by their coordinates in K before it."""
    engine, batches, each = trainer.nspo2, trainer.batches, trainer.args.gradient_accumulation_steps
    length = len(trainer.train_dataset) // (each * trainer.args.train_batch_size)  # steps of an epoch
    seen: list[list[torch.Tensor]] = [[] for _ in engine.parts]
    done, engine.share = 0, 1.0  # the engine itself learns from a part of the steps

    def record(inner: Callable, own: list, samples: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        own.append(samples.clone())
        return inner(samples, grad)

    def step(raw: list[torch.Tensor]) -> None:
        nonlocal done
        trainer.optimizer.step()
        done += 1
        if done % length or done >= len(batches):
            return
        columns = []
        for part, own in zip(engine.parts, seen):
            basis = part.cov.basis[:, : part.config.projection_rank]
            columns.append(coordinates(torch.cat(own).transpose(0, 1), basis).transpose(0, 1).flatten(1))
            own.clear()
        vectors = torch.cat(columns, 1)
        micro = [rows for batch in batches[done - length : done] for rows in batch]
        new = [micro[i] for i in new_order(vectors - vectors.mean(0), list(range(len(micro))))]
        new = [new[i : i + each] for i in range(0, len(new), each)]
        batches[done : done + length] = new[: len(batches) - done]

    for part, own in zip(engine.parts, seen):
        part.share, part.step = 1.0, partial(record, part.step, own)
    return step


def frozen_batches(trainer: NSPO2DPOTrainer) -> Callable[[list[torch.Tensor]], None]:
    """The control of [`balanced_order`]: the same micro-batches again, in a random order."""
    generator = torch.Generator().manual_seed(trainer.args.seed)
    return balanced_order(trainer, lambda vectors, order: torch.randperm(len(order), generator=generator).tolist())
