"""KL divergence and loss per token of two models' logits, by chunks of tokens: a vocabulary may be large."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

TOKENS_AT_ONCE = 128


def token_kl(frozen: torch.Tensor, policy: torch.Tensor, chunk: int = TOKENS_AT_ONCE) -> torch.Tensor:
    """(N,) KL(frozen ‖ policy) in nats of each token's distribution, float32, differentiable in `policy`.

    Args:
        frozen, policy: (N, vocabulary) logits.
        chunk: tokens whose probabilities exist at a time, in the backward pass too.
    """

    def part(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    # (the chunk's probabilities are computed anew in the backward pass)
    parts = zip(frozen.split(chunk), policy.split(chunk))
    if policy.requires_grad:
        return torch.cat([checkpoint(part, p, q, use_reentrant=False) for p, q in parts])
    return torch.cat([part(p, q) for p, q in parts])


def token_loss(logits: torch.Tensor, targets: torch.Tensor, chunk: int = TOKENS_AT_ONCE) -> torch.Tensor:
    """(N,) negative log-probability in nats of each `targets` (N,) under `logits` (N, vocabulary), float32."""
    parts = zip(logits.split(chunk), targets.split(chunk))
    return torch.cat([torch.nn.functional.cross_entropy(x.float(), t, reduction="none") for x, t in parts])
