"""The methods that are compared: plain AdamW, NSPO2's variants, controls that a sceptic would ask for, and peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer

from nspo2_trl import NSPO2DPOTrainer

KEEP = {"nspo2_strategy": "keep", "nspo2_projection_rank": 16, "nspo2_covariance": "adapter"}
FACTORED = {"nspo2_covariance": "factored", "nspo2_projection_rank": 4, "nspo2_max_rank": 8}
# `change` and `optimizer` name functions below; everything else are options of the trainer. A step has 16 pairs in 4
# micro-batches, if nothing else is said; a third more would be 21.3 pairs, and 21 = 3 x 7 comes nearest.
METHODS = {
    "plain": {},
    "keep": KEEP,
    "noise": KEEP | {"nspo2_strategy": "noise"},
    "hybrid": KEEP | {"nspo2_strategy": "hybrid"},
    "keep-factored": KEEP | FACTORED,
    "keep-update": KEEP | {"nspo2_apply_to": "update"},
    "keep-anneal": KEEP | {"nspo2_anneal": 0.5},
    "random": KEEP | {"change": "random"},
    "norm-matched": KEEP | {"change": "norm_matched"},
    "beta1-0.95": {"adam_beta1": 0.95},
    "batch-x1.31": {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 3},
    "batch-x1.5": {"gradient_accumulation_steps": 6},
    "lora-plus": {"optimizer": "lora_plus"},
    "keep-lora-plus": KEEP | {"optimizer": "lora_plus"},
    "riemannian": {"optimizer": "riemannian"},
    "schedule-free": {"optimizer": "schedule_free"},
}
OURS = ("change", "optimizer")
WORDS = {
    "plain": "AdamW, TRL's DPOTrainer",
    "keep": "NSPO2 `keep`, rank at most 16 per adapter",
    "noise": "NSPO2 `noise`, rank at most 16 per adapter; the default bounds on the bias lower it",
    "hybrid": "NSPO2 `hybrid`, rank at most 16 per adapter; the default bounds on the bias lower it",
    "keep-factored": "`keep`, factored covariance, rank 4 per matrix",
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
    options = {name: value for name, value in METHODS[method].items() if name not in OURS}
    return {"nspo2_enabled": any(name.startswith("nspo2_") for name in options)} | options


def preparation(method: str) -> Callable[[NSPO2DPOTrainer], Callable | None] | None:
    """What [`lean.train`] is to do once optimizer and schedule are there."""
    settings = METHODS[method]
    return next((globals()[settings[name]] for name in OURS if name in settings), None)


def _replace(trainer: NSPO2DPOTrainer, optimizer: torch.optim.Optimizer) -> None:
    trainer.optimizer, trainer.lr_scheduler = optimizer, None
    trainer.create_scheduler(trainer.args.max_steps, optimizer)


def lora_plus(trainer: NSPO2DPOTrainer) -> None:
    lr = trainer.args.learning_rate
    _replace(trainer, create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16))


def riemannian(trainer: NSPO2DPOTrainer) -> None:
    lr = trainer.args.learning_rate
    _replace(trainer, create_riemannian_optimizer(trainer.model, torch.optim.AdamW, lr=lr, weight_decay=0))


def schedule_free(trainer: NSPO2DPOTrainer) -> None:
    from schedulefree import AdamWScheduleFree

    args = trainer.args
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = AdamWScheduleFree(params, lr=args.learning_rate, warmup_steps=int(args.warmup_steps))
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)


def random(trainer: NSPO2DPOTrainer) -> None:
    """Random orthonormal directions in the filter, new ones after each eigensolve; how many are the estimate's."""
    generator = torch.Generator().manual_seed(trainer.args.seed)
    for part in trainer.nspo2.filters:
        part.head = partial(_random_head, part, part.head, generator, {})


def _random_head(part, head: Callable, generator: torch.Generator, drawn: dict):
    cov = part.cov
    if drawn.get("solved") != cov.solved:
        shape = (len(cov.stack), cov.stack.shape[2], cov.rank)
        drawn["basis"] = torch.linalg.qr(torch.randn(shape, generator=generator)).Q.mT.contiguous()
        drawn["solved"] = cov.solved
    stack, cov.stack = cov.stack, drawn["basis"]  # the head reads the basis from there; what is learned stays
    try:
        return head()
    finally:
        cov.stack = stack


def norm_matched(trainer: NSPO2DPOTrainer) -> Callable[[list[torch.Tensor]], None]:
    """AdamW on the gradients before the filter; each step is scaled to the norm, over all adapters, of a twin's.

    The twin is AdamW on the filtered gradients of the same run, with its own moments; its weights are thrown away.
    """
    args = trainer.args
    if args.weight_decay:
        raise ValueError("The twin's step is its gradients' alone only without weight decay.")
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    shadows = [torch.zeros_like(p) for p in params]
    betas = (args.adam_beta1, args.adam_beta2)
    twin = torch.optim.AdamW(shadows, betas=betas, eps=args.adam_epsilon, weight_decay=0)

    @torch.no_grad()
    def step(raw: list[torch.Tensor]) -> None:
        twin.param_groups[0]["lr"] = trainer.optimizer.param_groups[0]["lr"]
        for shadow, param, grad in zip(shadows, params, raw):
            shadow.zero_()
            shadow.grad, param.grad = param.grad, grad
        twin.step()
        before = [p.detach().clone() for p in params]
        trainer.optimizer.step()
        change = torch._foreach_sub([p.detach() for p in params], before)
        own, wanted = (torch.stack(torch._foreach_norm(part)).norm() for part in (change, shadows))
        factor = float(wanted / own) if own > 0 else 1.0
        for param, start, part in zip(params, before, change):
            param.copy_(start + factor * part)

    return step
