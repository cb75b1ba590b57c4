"""Retained: the texts of a run that the model is to go on handling as before; what they cost, and the KL term."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.divergence import token_kl
from ..layout.roles import input_adapters
from ..projections.retain.measure import retention
from ..projections.retain.null_space import NullSpace
from ..projections.retain.passes import Frozen, logits, reading
from ..projections.retain.texts import batches, check_texts, hold_out, refuse_same_texts
from ..retain_config import RetainConfig
from .retain import Texts, input_spaces, retained_batches, retained_texts

PAIRS_LOOKED_AT = 2000


class Retained:
    """Retained texts, tokenised and split: four fifths for K and the KL term, a fifth to measure on.

    Args:
        model: with the trainable adapter. dataset: the texts. config: what is done with them.
        folder: where K is kept. seed: of the order in which the KL term takes texts.

    Raises:
        ValueError: texts that cannot work, see [`projections.retain.texts`].
    """

    def __init__(
        self,
        model: PeftModel,
        dataset: Texts,
        tokenizer: PreTrainedTokenizerBase,
        config: RetainConfig,
        folder: str | Path,
        seed: int,
    ):
        self.model, self.tokenizer, self.config, self.folder, self.seed = model, tokenizer, config, folder, seed
        self.frozen = frozen_state(model)
        samples, length, option = config.samples, config.max_length, "nspo2_retain_dataset"
        texts = retained_texts(model, dataset, tokenizer, samples, length, option, folder=folder, frozen=self.frozen)
        self.texts, held_out = hold_out(texts)
        rank = config.rank if config.project != "no" else 0
        self.tokens = check_texts(self.texts, model, rank, option="nspo2_retain_dataset")
        self.held_out = retained_batches(held_out, tokenizer)
        self.writes_tokens = model.get_output_embeddings() is not None  # a reward model has no next token

    def refuse_pairs(self, dataset: Any) -> None:
        """Refuse retained texts that are those of `dataset`, preference pairs that are tokenised."""
        if isinstance(dataset, Dataset) and {"prompt_ids", "chosen_ids"} <= set(dataset.column_names):
            rows = dataset.select(range(min(PAIRS_LOOKED_AT, len(dataset))))
            refuse_same_texts(
                self.texts, [row["prompt_ids"] + row["chosen_ids"] for row in rows], "nspo2_retain_dataset"
            )

    def null_space(self) -> NullSpace:
        """The projection of the trained adapter; K is collected when training starts."""
        adapter = self.model.active_adapters[0]
        adapters = input_adapters(self.model, adapter)
        narrowest = min(found.width for found in adapters)
        config = self.config
        if config.rank >= narrowest:
            raise ValueError(
                f"`nspo2_retain_rank` ({config.rank}) would take all {narrowest} directions of an input away: set "
                f"it to {max(1, narrowest // 50)}, or anything far below {narrowest}."
            )
        return NullSpace(
            adapters,
            lambda: input_spaces(
                self.model, adapters, self.texts, self.held_out, self.tokenizer, config.rank, self.folder, self.frozen
            ),
            during=config.project == "during",
            rank=config.rank,
            scale=config.scale,
        )

    def measure(self) -> dict[str, float]:
        """`kl` and `loss_rise` on held-out retained texts, in nats per token; nothing for a reward model."""
        if not self.writes_tokens:
            return {}
        return retention(self.model, self.held_out, frozen=self.frozen)[0]

    def kl(self, model: nn.Module, first: int) -> torch.Tensor:
        """Mean over tokens of KL(frozen ‖ policy) on `kl_samples` texts, from number `first` of their order on.

        Args:
            model: the policy as the trainer runs it.
        """
        texts = [self._text(first + i) for i in range(self.config.kl_samples)]
        device = next(self.model.parameters()).device
        batch = batches(texts, self.tokenizer.pad_token_id or 0, tokens=self.config.max_length * len(texts))[0]
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        mask = batch["attention_mask"].bool()
        with reading(self.model), (self.frozen or self.model.disable_adapter)():
            before = logits(model, batch)[mask]
        return token_kl(before, logits(model, batch)[mask]).mean()

    def _text(self, number: int) -> list[int]:
        """Texts in an order that is drawn anew each time through."""
        count = len(self.texts)
        order = torch.Generator().manual_seed(self.seed + number // count)
        return self.texts[int(torch.randperm(count, generator=order)[number % count])]


def frozen_state(model: PeftModel) -> Frozen | None:
    """Enters what "frozen" means, the model as the run found it; `None` where that is the base with its adapter off.

    That is so where the adapter adds nothing yet. Where a trained adapter is trained on, it is the adapter as it is
    now, of which a copy is kept.
    """
    return swapped([param for param in model.parameters() if param.requires_grad]) if adds(model) else None


def adds(model: PeftModel) -> bool:
    """Whether what is trained may change the base model already: a trained adapter is trained on."""
    active = set(model.active_adapters)
    params = ((set(name.split(".")), param) for name, param in model.named_parameters())
    return any(_adds(parts, param) for parts, param in params if param.requires_grad or parts >= {"lora_B"} | active)


def _adds(parts: set[str], param: torch.Tensor) -> bool:
    """Whether the value of a parameter, of which `parts` is the name, is not that of the base with the adapter off."""
    if "lora_B" in parts or "lora_embedding_B" in parts:
        return param.device.type != "meta" and bool(param.detach().any())
    return not any("lora_" in part for part in parts) and "modules_to_save" not in parts


def swapped(params: Sequence[nn.Parameter]) -> Frozen:
    """Enters `params` with the values that they have now."""
    kept = [param.detach().clone() for param in params]

    @contextmanager
    def frozen() -> Iterator[None]:
        now = [param.data for param in params]
        try:
            for param, value in zip(params, kept):
                param.data = value.to(param.device)
            yield
        finally:
            for param, value in zip(params, now):
                param.data = value

    return frozen
