"""DeepSpeed ZeRO 1, 2 and 3: the gradient is filtered inside the engine's step.

The optimizer steps inside `accelerator.backward`, where Trainer has no callback, and ZeRO keeps parts of the gradient,
reduced, in its own buffers. So `engine.step` is wrapped: the whole gradient is put into `param.grad`, clipped and
filtered there, and handed back. DeepSpeed all-reduces (stage 3: all-gathers) each parameter's gradient for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layout.blocks import whole_shape

_KNOWN = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")  # stages 1 and 2, stage 3


def wrap_step(engine: Any, params: list[nn.Parameter], begin: Callable[[], None], writes: bool, update: bool) -> None:
    """Have a DeepSpeedEngine's `step` call `begin` with whole gradients, where it is about to step.

    Args:
        params: all that are trained.
        begin: filters `param.grad` in place, which has the parameter's shape and dtype, is the same on every rank, and
            is clipped as DeepSpeed would; `param` itself has its own value with `update` only.
        writes: whether `begin` may change gradients. If not, DeepSpeed steps with its own, bit for bit.
        update: whether the parameters themselves are going to be changed, in [`whole_params`].

    Raises:
        ValueError: the DeepSpeed config has something that NSPO2 cannot work with.
    """
    unwrap_step(engine)
    _refuse_unsupported(engine, params, update)
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad

    plain, optimizer = engine.step, engine.optimizer

    def step(*args: Any, **kwargs: Any) -> None:
        if not engine.is_gradient_accumulation_boundary():
            return plain(*args, **kwargs)
        clip, norm = optimizer.clip_grad, None
        grads = [safe_get_full_grad(param).to(param.dtype).view(whole_shape(param)) for param in params]
        values = [safe_get_full_fp32_param(param) for param in params] if update else grads
        own = [(param.data, param.grad) for param in params]
        for param, value, grad in zip(params, values, grads):
            # stage 3 may have an empty tensor there, which takes no gradient; anything of the shape will do
            param.data, param.grad = value, grad
        try:
            if clip > 0:
                norm = nn.utils.clip_grad_norm_(params, clip)
            begin()
        finally:
            for param, (value, grad) in zip(params, own):
                param.grad = None
                param.data, param.grad = value, grad
        if not writes:
            return plain(*args, **kwargs)
        # A gradient with NaN or Inf goes back as it is: DeepSpeed finds it and skips the step on all ranks.
        for param, grad in zip(params, grads):
            safe_set_full_grad(param, grad)
        optimizer.clip_grad = 0.0  # else what was clipped and filtered would be clipped once more
        try:
            plain(*args, **kwargs)
        finally:
            optimizer.clip_grad = clip  # it is saved with checkpoints
        if norm is not None and engine.was_step_applied():
            engine._global_grad_norm = norm  # what Trainer logs is the norm before clipping

    engine.step = step


def unwrap_step(engine: Any) -> None:
    """Give the engine its own `step` back."""
    vars(engine).pop("step", None)


@contextmanager
def whole_params(params: list[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters are whole and may be changed, alike on all ranks; ZeRO's float32 copies follow at the end."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    with GatheredParameters(params, modifier_rank=0):
        yield
        values = [param.detach().clone() for param in params]
    for param, value in zip(params, values):
        safe_set_full_fp32_param(param, value)


def _refuse_unsupported(engine: Any, params: list[nn.Parameter], update: bool) -> None:
    zero, name = engine._config.zero_config, type(engine.optimizer).__name__
    if engine.zero_optimization_stage() == 0:
        raise ValueError(
            "NSPO2 supports DeepSpeed with ZeRO: set `zero_optimization.stage` in the DeepSpeed config to 1, 2 or 3, "
            "or launch with DDP, which stage 0 is."
        )
    if engine.fp16_enabled() or getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None:
        raise ValueError(
            "NSPO2 does not support fp16 under DeepSpeed, which scales the loss in its own way: set `bf16=True`, or "
            "`fp16=False`, in the config, and in the DeepSpeed config `fp16.enabled` to `auto`."
        )
    for part, allowed in (("optimizer", ("none", "cpu")), ("param", ("none",))):
        device = getattr(getattr(zero, f"offload_{part}"), "device", "none")
        if getattr(device, "value", device) not in allowed:
            raise ValueError(
                f"NSPO2 does not support DeepSpeed's offloading there: set `zero_optimization.offload_{part}.device` "
                f"in the DeepSpeed config to {' or '.join(f'`{name}`' for name in allowed)}."
            )
    if name not in _KNOWN:
        raise ValueError(
            f"NSPO2 does not support DeepSpeed's {name}, only ZeRO 1, 2 and 3 as such: take `data_types`, `zenflow` "
            "and `mics_shard_size` out of the DeepSpeed config, or set `zero_optimization.stage` to 2."
        )
    if update and any(param.dtype != torch.float32 for param in params):
        raise ValueError(
            "`nspo2_apply_to='update'` under DeepSpeed needs adapters in float32, since ZeRO rounds its own float32 "
            "copies to get them: set `bf16=False`, or `nspo2_apply_to='gradient'`."
        )
