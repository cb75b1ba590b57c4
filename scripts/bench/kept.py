"""Two ways to keep what the reference knew, tried and not in the package; docs/log.md has what came out.

As in [`ideas`], each function prepares a trainer as [`lean.train`] wants it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nspo2_trl import NSPO2Config, NSPO2DPOTrainer
from nspo2_trl.adapters import lora_blocks
from nspo2_trl.block_groups import BlockGroups
from nspo2_trl.projection import coordinates

from . import lean
from .judge import draw, longest_answer
from .packed import Packed, PackedLlama, Pair
from .variance import directions, sample_gradients, stacked

TEXTS = 256  # answers that the reference writes, to prompts of the training data


def _reference_texts(trainer: NSPO2DPOTrainer) -> list[Pair]:
    pairs = lean.pairs_of(trainer.train_dataset.select(range(TEXTS)), trainer.args.max_length)
    return draw(trainer, [pair.prompt for pair in pairs], longest_answer(pairs), seed=1, adapted=False)


def retain(trainer: NSPO2DPOTrainer, rank: int = 16) -> Callable[[list[torch.Tensor]], None]:
    """What the optimizer changes is projected onto the null space of the gradients of the reference's own texts.

    The directions are the `rank` strongest of each adapter at the start, where only `lora_B` has a gradient.
    """
    llama, texts = PackedLlama(trainer.model), _reference_texts(trainer)
    grads = sample_gradients(llama, texts, 1, lambda policy, part: policy[0].sum())
    groups = BlockGroups(lora_blocks(trainer.model), NSPO2Config())
    bases = [directions(part, rank) for part in stacked(groups, grads)]

    @torch.no_grad()
    def step(raw: list[torch.Tensor]) -> None:
        before = {id(p): p.detach().clone() for p in llama.factors}
        trainer.optimizer.step()
        change = {id(p): (p.detach() - before[id(p)])[None] for p in llama.factors}
        for group, part, basis in zip(groups.groups, stacked(groups, change), bases):
            kept = part[:, 0] - coordinates(part[:, 0], basis) @ basis
            for place, value in zip(group.places, group.views_of(kept)):
                place.param.copy_(before[id(place.param)] + value)

    return step


def replay(trainer: NSPO2DPOTrainer, weight: float = 0.02) -> Callable[[list[torch.Tensor]], None]:
    """Each step's loss has `weight` times the mean negative log-likelihood of 4 of the reference's own texts."""
    llama, texts = PackedLlama(trainer.model), _reference_texts(trainer)
    generator = torch.Generator().manual_seed(trainer.args.seed)

    def step(raw: list[torch.Tensor]) -> None:
        picked = torch.randperm(len(texts), generator=generator)[:4].tolist()
        with torch.enable_grad():
            loss = -weight * llama.log_probs(Packed([texts[i] for i in picked]))[0].mean()
        loss.backward()  # onto the gradient that is there
        trainer.optimizer.step()

    return step
