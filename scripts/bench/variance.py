"""What a filter does to the gradient at frozen parameters: fitted on some micro-batches, scored on others.

At four points of a plain run, gradients of micro-batches of 4 pairs are taken: some give noise directions and
reference, others, fresh ones, say what a filter takes away of their variance and of their mean. With
r_i the part of fresh gradient g_i that is taken away, which is orthogonal to the rest, the trace of the covariance is
(Σ|r_i|² - |Σr_i|²/n)/(n - 1) and the mean's square without bias (|Σr_i|² - Σ|r_i|²)/(n(n - 1)).
The mean is that of the population that the data are drawn from, not of the data: no pair is in two samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from nspo2_trl import NSPO2Config, NSPO2DPOTrainer
from nspo2_trl.engine.projection import coordinates, restrict
from nspo2_trl.engine.strategies import select
from nspo2_trl.layout.adapters import lora_blocks
from nspo2_trl.projections.noise import NoiseProjection

from .tasks import LOOKS, make_trainer, short

PAIRS = 4  # a micro-batch
POINTS = {"start": 0.0, "early": 0.1, "middle": 0.5, "end": 1.0}
RANKS = {"adapter": [1, 4, 16, 32, 64], "factored": [1, 2, 4, 8]}
STRATEGIES = ("keep", "noise", "hybrid", "random")


class Snapshots(TrainerCallback):
    """The trained parameters at each of `POINTS` of a run."""

    def __init__(self, trainer: NSPO2DPOTrainer):
        self.params = [p for p in trainer.model.parameters() if p.requires_grad]
        self.wanted = {round(share * trainer.args.max_steps): name for name, share in POINTS.items()}
        self.found = {"start": [p.detach().clone() for p in self.params]}

    def on_step_end(self, args, state, control, **kwargs):
        if name := self.wanted.get(state.global_step):
            self.found[name] = [p.detach().clone() for p in self.params]


def gradients(trainer: NSPO2DPOTrainer, rows: list[int]) -> dict[int, torch.Tensor]:
    """By `id` of a LoRA matrix its gradient in each micro-batch of `PAIRS` of the `rows`, (n, *shape)."""
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    found = {id(p): torch.zeros(len(rows) // PAIRS, *p.shape) for p in params}
    for i in range(len(rows) // PAIRS):
        batch = [trainer.train_dataset[row] for row in rows[i * PAIRS : (i + 1) * PAIRS]]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(batch))
        for p, grad in zip(params, torch.autograd.grad(loss, params)):
            found[id(p)][i] = grad
    return found


def stacked(noise: NoiseProjection, grads: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """For each stack of equal blocks (B, n, m, d)."""
    found = []
    for stack in noise.stacks:
        buffer = stack.buffer(len(next(iter(grads.values()))))
        for i, sample in enumerate(buffer):
            torch._foreach_copy_(stack.views_of(sample), [grads[id(place.param)][i] for place in stack.places])
        found.append(buffer.transpose(0, 1))
    return found


def directions(samples: torch.Tensor, number: int) -> torch.Tensor:
    """(B, number, d) leading eigenvectors of the covariance of `samples` (B, n, m, d), zeros where it has fewer."""
    rows = (samples - samples.mean(1, keepdim=True)).flatten(1, 2).double()
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    vectors = (vectors * (values > 1e-6 * values[:, :1])[..., None])[:, :number]
    return F.pad(vectors, (0, 0, 0, number - vectors.shape[1])).to(samples)


def moments(parts: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Trace of the covariance of one sample, and the square of the mean without bias; `parts` are (B, n, m, k)."""
    squares = total = n = 0
    for part in parts:
        n = part.shape[1]
        squares += part.double().square().sum().item()
        total += part.double().sum(1).square().sum().item()
    return (squares - total / n) / (n - 1), (total - squares) / (n * (n - 1))


def measure(noise: NoiseProjection, fit: dict, fresh: dict, covariance: str, generator: torch.Generator) -> dict:
    """[noise, signal] of the fresh micro-batches, and of what each filter of one covariance takes away of both."""
    fit_samples, samples = stacked(noise, fit), stacked(noise, fresh)
    most = max(RANKS[covariance]) + 1  # `keep` gives one back
    fitted, random = [], []  # coordinates of the fresh samples (B, n, m, k) and of the fitted mean, once for all
    for own, other in zip(samples, fit_samples):
        drawn = torch.randn(len(own), own.shape[-1], min(most, own.shape[-1]), generator=generator)
        for found, basis in ((fitted, directions(other, most)), (random, torch.linalg.qr(drawn).Q.mT)):
            found.append((coordinates(own, basis), coordinates(other.mean(1), basis)))
    taken = {"unfiltered": moments(samples)}
    for strategy in STRATEGIES:
        for rank in RANKS[covariance]:
            parts = []
            for coords, reference in random if strategy == "random" else fitted:
                number = torch.full((len(coords),), min(rank, coords.shape[3] - 1))
                how = select("noise" if strategy == "random" else strategy, number, reference)
                parts.append(restrict(coords, *how))
            taken[f"{strategy}-{rank}"] = moments(parts)
    return taken


def run_cell(cell: dict, folders: dict[str, str]) -> dict:
    """One run's figures at all points; its record."""
    start, trainer = time.process_time(), make_trainer(cell, folders, range(50), stride=LOOKS)
    points = Snapshots(trainer)
    trainer.add_callback(points)
    trainer.train()
    generator = torch.Generator().manual_seed(cell["seed"])
    order = torch.randperm(len(trainer.train_dataset), generator=generator).tolist()
    split, end = cell["fit"] * PAIRS, (cell["fit"] + cell["fresh"]) * PAIRS
    found = {}
    for name, values in points.found.items():
        with torch.no_grad():
            torch._foreach_copy_(points.params, values)
        fit, fresh = (gradients(trainer, rows) for rows in (order[:split], order[split:end]))
        for covariance in RANKS:
            noise = NoiseProjection(lora_blocks(trainer.model), NSPO2Config(covariance=covariance))
            found[f"{name} {covariance}"] = measure(noise, fit, fresh, covariance, generator)
    return short({"cell": cell, "taken": found, "seconds": time.process_time() - start})
