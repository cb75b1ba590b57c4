"""Which module a LoRA adapter stands on, and which trained parameters no projection of its input reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn

# ‖B A‖ as a share of ‖B‖ ‖A‖: `orthogonal` starts with B A = 0, which bfloat16 rounds; trained ones have 0.1 and more
ROUNDING = 1e-2


@dataclass
class InputAdapter:
    """One adapter of one linear module: what it adds to the module's output is scaling · B A x.

    Args:
        name: of the module in the model. module: the PEFT layer, whose input is x.
        weight: (r, width) the parameter A.
    """

    name: str
    module: nn.Module
    weight: torch.Tensor

    @property
    def width(self) -> int:
        return self.weight.shape[1]


def adapter_config(model: nn.Module, adapter_name: str) -> PeftConfig:
    """The config of the LoRA adapter `adapter_name`.

    Raises:
        ValueError: the model has no such adapter, or it is no LoRA adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise ValueError("The model has no adapter: pass a PeftModel with a LoRA adapter.")
    if adapter_name not in configs:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, but the model has {', '.join(map(repr, configs))}.")
    config = configs[adapter_name]
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"The adapter {adapter_name!r} is of the kind {config.peft_type.value}: only LoRA adapters can be "
            "projected, since they act on a module's output through A x alone; make it with `LoraConfig(...)`."
        )
    return config


def input_adapters(model: nn.Module, adapter_name: str) -> list[InputAdapter]:
    """The linear modules that adapter `adapter_name` stands on, in the model's order; rsLoRA and DoRA among them.

    Raises:
        ValueError: there is none, or one that is no linear map of the module's input: LoRA on a convolution, on a
            single parameter or on `nn.MultiheadAttention`; or the adapter is merged into the model.
    """
    adapter_config(model, adapter_name)
    found = []
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, module in layers:
        if adapter_name not in module.lora_A:
            continue
        down = module.lora_A[adapter_name]
        if isinstance(module, ParamWrapper):
            raise ValueError(
                f"LoRA on single parameters (`target_parameters`, here {name}) is not supported: their input is not "
                "a module's. Use `target_modules`."
            )
        if isinstance(module, MultiheadAttention) or type(down) is not nn.Linear:  # convolutions among others
            raise ValueError(
                f"LoRA on {type(module).__name__} (here {name}, where A is a {type(down).__name__}) is not supported: "
                "adapt linear layers alone, with A as one matrix."
            )
        if module.merged:
            raise ValueError("The adapter is merged into the model: call `unmerge_adapter()` before.")
        found.append(InputAdapter(name, module, down.weight))
    if not found:
        raise ValueError(f"The adapter {adapter_name!r} stands on no linear layer, so there is nothing to project.")
    return found


def adds_something(adapters: Sequence[InputAdapter], adapter_name: str) -> bool:
    """Whether B A is more than rounding in one of `adapters`: ‖B A‖² = tr(BᵀB AAᵀ). What is sharded is skipped."""
    for adapter in adapters:
        layer: Any = adapter.module
        down, up = adapter.weight.detach(), layer.lora_B[adapter_name].weight.detach()
        if down.is_meta or not down.numel() or not up.numel():
            continue
        down, up = down.double(), up.double()
        square = ((up.T @ up) * (down @ down.T)).sum()
        if square > (ROUNDING * torch.linalg.vector_norm(up) * torch.linalg.vector_norm(down)) ** 2:
            return True
    return False


def unprotected(model: nn.Module, adapter_name: str) -> dict[str, list[str]]:
    """Names of the adapter's parameters that change the model whatever A x is, by kind.

    These are: LoRA on embeddings, DoRA's magnitude, biases of `lora_B`, trained biases of the base (`bias` in the
    config), `modules_to_save` and trained tokens.
    """
    kinds: dict[str, list[str]] = {}
    bias = getattr(adapter_config(model, adapter_name), "bias", "none")
    tuned = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        module = name.rpartition(".base_layer.")[0]
        kind = None
        if adapter_name in parts:
            for part, words in {
                "lora_embedding_A": "LoRA on embeddings",
                "lora_magnitude_vector": "DoRA's magnitude",
                "modules_to_save": "modules_to_save",
                "trainable_tokens_delta": "trained tokens",
            }.items():
                kind = words if part in parts else kind
            if "lora_B" in parts and parts[-1] == "bias":
                kind = "biases of lora_B"
        elif (
            parts[-1] == "bias"
            and "lora_B" not in parts
            and (bias == "all" or bias == "lora_only" and module in tuned)
        ):
            kind = "biases of the base"
        if kind:
            kinds.setdefault(kind, []).append(name)
    return kinds
