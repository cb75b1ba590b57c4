"""Which parameters of a PEFT model form which block: one adapter of one module, LoRA's or another kind's."""

from __future__ import annotations

from torch import nn

from .blocks import Block


def lora_blocks(model: nn.Module) -> list[Block]:
    """The trainable adapters of `model`, each one block of all that PEFT trains for it on one module.

    That is A and B of LoRA, with the DoRA magnitude, AdaLoRA's E and the like where there is one; of other kinds (IA3,
    LoHa, OFT, ...) what they have. A tensor that modules share is in the block of the first. Parameters that belong to
    no adapter of a module (`modules_to_save`, trained tokens and biases) are in no block and are never touched.

    Raises:
        ValueError: the model has no trainable adapter on a module.
    """
    parts = _parts(model)
    found: dict[str, Block] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        steps = name.split(".")  # module, part such as lora_A, adapter, and what is in the part
        for i in range(1, len(steps) - 1):
            module = ".".join(steps[:i])
            if steps[i] in parts.get(module, ()):
                key = f"{module}:{steps[i + 1]}"
                found.setdefault(key, Block(key, [])).params.append(param)
    if not found:
        raise ValueError(
            "No trainable LoRA adapter was found: NSPO2 filters the gradients of LoRA adapters, or of PEFT's other "
            "adapters of modules. Pass `peft_config=LoraConfig(...)` (in a recipe: `use_peft: true`) or a PeftModel "
            "whose adapter is trainable, or set `nspo2_enabled=False` to train without NSPO2."
        )
    return list(found.values())


def _parts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the parts that PEFT's layers keep their adapters in, by module: those that stand on a base layer.

    PEFT is not imported for it: it takes seconds, which an optimizer for another model does not need.
    """
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "original_module")}  # as a whole
    return {
        name: module.adapter_layer_names
        for name, module in model.named_modules()
        if hasattr(module, "adapter_layer_names") and name not in wrapped and name.rpartition(".")[0] not in wrapped
    }
