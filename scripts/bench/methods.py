"""The methods that are compared: plain AdamW, NSPO2's variants, and the controls that a sceptic would ask for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nspo2_trl import NSPO2DPOTrainer

# what was measured with; the trainers' defaults were others then
KEEP = {"nspo2_strategy": "keep", "nspo2_projection_rank": 16, "nspo2_covariance": "adapter"}
KEEP |= {"nspo2_update_freq": 10, "nspo2_basis_dtype": "float32"}
FACTORED = {"nspo2_covariance": "factored", "nspo2_projection_rank": 4, "nspo2_max_rank": 8}
# Options of the trainer; `random` gets its directions in [`prepare`]. A step has 16 pairs in 4 micro-batches.
METHODS = {
    "plain": {},
    "keep": KEEP,
    "noise": KEEP | {"nspo2_strategy": "noise"},
    "hybrid": KEEP | {"nspo2_strategy": "hybrid"},
    "keep-factored": KEEP | FACTORED,
    "default": {"nspo2_strategy": "keep"},
    "random": KEEP,
    "batch-x1.5": {"gradient_accumulation_steps": 6},
}
# of the methods that tables show; those that are not in METHODS are in the raw files alone (docs/log.md)
WORDS = {
    "plain": "AdamW, TRL's DPOTrainer",
    "keep": "NSPO2 `keep`, rank at most 16 per adapter",
    "noise": "NSPO2 `noise`, rank at most 16 per adapter; the default bounds on the bias lower it",
    "hybrid": "NSPO2 `hybrid`, rank at most 16 per adapter; the default bounds on the bias lower it",
    "keep-factored": "`keep`, factored covariance, rank 4 per matrix, as it was before the power method",
    "default": "the trainers' defaults of this version: `keep`, factored covariance, rank 8 for the mean width",
    "keep-update": "`keep` on the optimizer's change, not on the gradient",
    "keep-anneal": "`keep`, fading out over the first half of the run",
    "random": "`keep` with random directions in the place of the estimated ones, as many of them",
    "norm-matched": "AdamW's step, each time with the length that `keep`'s would have after the same gradients",
    "beta1-0.95": "AdamW with beta1 0.95 instead of 0.9",
    "batch-x1.31": "AdamW, 21 pairs per step instead of 16 (as much less noise as removing 24 % of it)",
    "batch-x1.5": "AdamW, 24 pairs per step instead of 16 (as much less noise as removing 33 % of it)",
    "lora-plus": "PEFT's LoRA+, B learns 16 times as fast as A",
    "keep-lora-plus": "LoRA+ on gradients filtered as by `keep`",
    "riemannian": "PEFT's Riemannian preconditioning of AdamW",
    "schedule-free": "schedule-free AdamW (package schedulefree): warm-up, then a constant rate",
}


def options_of(method: str) -> dict:
    """The trainer's options of a method."""
    return {"nspo2_enabled": "nspo2_strategy" in METHODS[method]} | METHODS[method]


def prepare(trainer: NSPO2DPOTrainer, method: str) -> None:
    """For `random` orthonormal directions in the filter, new ones after each eigensolve; as many as the estimate's."""
    if method != "random":
        return
    generator = torch.Generator().manual_seed(trainer.args.seed)
    for part in trainer.nspo2.filters:
        part.head = _random_head(part, part.head, generator)


def _random_head(part, head: Callable, generator: torch.Generator) -> Callable:
    drawn: dict[int, torch.Tensor] = {}

    def found():
        cov = part.cov
        if cov.solved not in drawn:
            shape = (len(cov.stack), cov.stack.shape[2], cov.rank)
            drawn.clear()
            drawn[cov.solved] = torch.linalg.qr(torch.randn(shape, generator=generator)).Q.mT.contiguous()
        stack, cov.stack = cov.stack, drawn[cov.solved]  # the head reads the basis there; what is learned stays
        try:
            return head()
        finally:
            cov.stack = stack

    return found
