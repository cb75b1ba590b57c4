"""What an adapter costs on retained texts: KL from the frozen model, and rise of the loss per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ...engine.divergence import token_kl, token_loss
from .passes import Frozen, logits, mine, reading, total
from .texts import Batch


def retention(
    model: nn.Module,
    batches: Sequence[Batch],
    points: Sequence[Callable[[], None]] = (lambda: None,),
    frozen: Frozen | None = None,
) -> list[dict[str, float]]:
    """`kl`, mean over tokens of KL(frozen ‖ policy), and `loss_rise`, of the loss per token, in nats, for each point.

    Counted are the tokens that have a next one in their text. The frozen pass is made once for all points.

    Args:
        batches: from [`texts.batches`], the same on all processes.
        points: each puts the policy into the state to be measured; the last one's stays.
        frozen: enters the frozen model's state; `model.disable_adapter` if left out.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(points), 2, dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    with reading(model):
        for batch, counts in mine(batches, device, "Measuring retained texts"):
            mask = batch["attention_mask"][:, 1:].bool()
            targets = batch["input_ids"][:, 1:][mask]
            with (frozen or model.disable_adapter)():  # type: ignore[operator]
                before = logits(model, batch)[:, :-1][mask]
            loss_before = token_loss(before, targets).double().sum()
            for i, put in enumerate(points):
                put()
                after = logits(model, batch)[:, :-1][mask]
                kl, loss = token_kl(before, after).double().sum(), token_loss(after, targets).double().sum()
                sums[i] += counts * torch.stack([kl, loss - loss_before])
            tokens += counts * len(targets)
    sums, tokens = total(sums), total(tokens).clamp_min(1)
    return [{"kl": float(kl / tokens), "loss_rise": float(rise / tokens)} for kl, rise in sums]
