"""What a resumed run has other than the run of its checkpoint: refused where it cannot work, said where it can."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from .card import recipe

RUN_NAME = "nspo2_run.json"
ROWS_LOOKED_AT = 8
# what the optimizer and the scheduler go on with, as they are in the checkpoint
KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# options that change nothing of what is trained
ASIDE = ("logging_", "save_", "eval_", "hub_", "dataloader_", "per_device_eval_", "load_best_", "metric_for_best_")


def save_run(folder: str | os.PathLike, trainer: Any) -> None:
    """Write the settings of a run and what its training data is into a checkpoint."""
    (Path(folder) / RUN_NAME).write_text(json.dumps(_run(trainer), indent=1))


def _run(trainer: Any) -> dict[str, Any]:
    settings = {name: value for name, value in recipe(trainer).items() if not name.startswith(ASIDE)}
    found = {name: value for name, value in settings.items() if " at 0x" not in str(value)}  # an object's address
    return found | {"training data": _fingerprint(trainer.train_dataset)}


def _fingerprint(dataset: Any) -> str:
    """How many rows, and a hash of some of them; of a stream nothing, since it may be one that is read once."""
    if not isinstance(dataset, Sized):
        return "a stream"
    words = f"{len(dataset)} rows"
    if not isinstance(dataset, Dataset):
        return words
    names = [
        name for name in dataset.column_names if not name.startswith("ref_")
    ]  # computed, so not the same to the bit
    rows = dataset.select_columns(names).with_format(None)
    step = max(1, len(rows) // ROWS_LOOKED_AT)
    try:
        text = json.dumps([rows[i] for i in range(0, len(rows), step)])
    except TypeError:  # images
        return words
    return f"{words} {hashlib.sha1(text.encode()).hexdigest()[:8]}"


def differences(checkpoint: str | os.PathLike, trainer: Any) -> str:
    """In words, what is other now than in the run of the checkpoint; empty where nothing is, or it is not known."""
    file = Path(checkpoint) / RUN_NAME
    try:
        was = json.loads(file.read_text())
    except (OSError, ValueError):
        return ""
    now, told = _run(trainer), []
    off = False in (was.get("nspo2_enabled"), now.get("nspo2_enabled"))
    for name in [*now, *(name for name in was if name not in now)]:
        idle = off and name.startswith("nspo2_") and name != "nspo2_enabled" and not name.startswith("nspo2_retain_")
        if was.get(name) != now.get(name) and not idle:
            kept = " (the checkpoint's stays)" if name in KEPT else ""
            told.append(f"`{name}` {was.get(name, 'default')} -> {now.get(name, 'default')}{kept}")
    return ", ".join(told)


def refuse_other_adapter(checkpoint: str | os.PathLike, model: Any) -> None:
    """Raises `ValueError` where the LoRA adapter in the checkpoint has other tensors than that of `model`."""
    if not isinstance(model, PeftModel):
        return
    name = model.active_adapters[0]
    folder = Path(checkpoint) / ("" if name == "default" else name)
    if not (folder / "adapter_model.safetensors").is_file():
        return
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = {key: list(file.get_slice(key).get_shape()) for key in file.keys() if "lora_" in key}
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    own = {key: list(tensor.shape) for key, tensor in tensors.items() if "lora_" in key}
    whole = all(0 not in shape for shape in own.values())  # ZeRO-3 has parts
    if own == saved if whole else own.keys() == saved.keys():
        return
    config = json.loads((folder / "adapter_config.json").read_text())
    raise ValueError(
        f"`resume_from_checkpoint`: the adapter in {str(checkpoint)!r} does not fit this run's: it has `r` "
        f"{config['r']} and `target_modules` {config['target_modules']}; resume with the LoRA options of its run."
    )
