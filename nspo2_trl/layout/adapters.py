"""Which parameters of a PEFT model form which block: one LoRA adapter of one module."""

from __future__ import annotations

import re

from torch import nn

from .blocks import Block

# lora_A.default.weight, lora_B.default (target parameters), lora_embedding_A.default, lora_magnitude_vector.default…
_LORA = re.compile(r"^(?P<module>.*)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)\.(?P<adapter>[^.]+)")


def lora_blocks(model: nn.Module) -> list[Block]:
    """The trainable LoRA adapters of `model`, each one block of A, B and the DoRA magnitude, where there is one.

    Parameters that belong to no adapter (`modules_to_save`, trained biases) are in no block and are never touched.

    Raises:
        ValueError: the model has no trainable LoRA adapter.
    """
    found: dict[str, Block] = {}
    for name, param in model.named_parameters():
        match = _LORA.match(name)
        if match and param.requires_grad:
            key = f"{match['module']}:{match['adapter']}"
            found.setdefault(key, Block(key, [])).params.append(param)
    if not found:
        raise ValueError(
            "No trainable LoRA adapter was found: NSPO2 filters the gradients of LoRA adapters. Pass "
            "`peft_config=LoraConfig(...)` (in a recipe: `use_peft: true`) or a PeftModel whose adapter is trainable, "
            "or set `nspo2_enabled=False` to train without NSPO2."
        )
    return list(found.values())
