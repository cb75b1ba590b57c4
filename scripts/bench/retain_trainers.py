"""The trainers of the study `retain`: DPO, KTO and SFT on the same pairs, each with replay where a method has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import unpair_preference_dataset

from nspo2_trl import (
    NSPO2DPOConfig,
    NSPO2DPOTrainer,
    NSPO2KTOConfig,
    NSPO2KTOTrainer,
    NSPO2SFTConfig,
    NSPO2SFTTrainer,
)
from nspo2_trl.engine.divergence import token_loss
from nspo2_trl.projections.retain.passes import logits
from nspo2_trl.projections.retain.texts import Batch, batches

PROMPT, ANSWER = 48, 40  # tokens; longer ones are cut


def cut(pair: dict) -> dict:
    """The end of the prompt, the beginnings of the answers."""
    answers = {name: pair[name][:ANSWER] for name in ("chosen_ids", "rejected_ids")}
    return {"prompt_ids": pair["prompt_ids"][-PROMPT:], **answers}


class Replays:
    """A trainer to which the likelihood of a retained text per micro-batch can be added, `replay` times."""

    replay = 0.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not self.replay or not self.model.training:
            return loss
        drawn = torch.randint(len(self.nspo2_retained.texts), (1,)).item()
        batch = batches([self.nspo2_retained.texts[drawn]], 0)[0]
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        own = token_loss(logits(model, batch)[0, :-1], batch["input_ids"][0, 1:]).mean()
        return self._nspo2_add(loss, self.replay, own, *args, **kwargs)


class DPO(Replays, NSPO2DPOTrainer):
    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        return super()._prepare_dataset(*args, **kwargs).map(cut)


class KTO(Replays, NSPO2KTOTrainer): ...


class SFT(Replays, NSPO2SFTTrainer): ...


def answers(pairs: Dataset) -> Dataset:
    """What SFT learns: the chosen answers."""
    return pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")


# config, trainer, its rows from pairs; examples of a micro-batch, the same answers in each
TRAINERS = {
    "dpo": (NSPO2DPOConfig, DPO, lambda pairs: pairs, 6),
    "kto": (NSPO2KTOConfig, KTO, unpair_preference_dataset, 12),
    "sft": (NSPO2SFTConfig, SFT, answers, 6),
}


@torch.no_grad()
def answer_losses(model: Any, pairs: Sequence[Batch], points: Sequence[Callable[[], None]]) -> list[float]:
    """Loss per token of the chosen answers, nats, for each point: what SFT is judged by."""
    found = []
    for put in points:
        put()
        total = count = 0.0
        for batch in pairs:
            chosen = {name: tensor[0::2].to(model.device) for name, tensor in batch.items()}
            mask = chosen["completion_mask"][:, 1:].bool()
            losses = token_loss(logits(model, chosen)[:, :-1][mask], chosen["input_ids"][:, 1:][mask])
            total, count = total + losses.sum().item(), count + len(losses)
        found.append(total / count)
    return found
