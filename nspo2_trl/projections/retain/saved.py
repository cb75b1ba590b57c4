"""Input spaces in a file, so that a model reads its retained texts once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...layout.roles import InputAdapter
from .collect import InputSpace, collect
from .passes import Frozen
from .project import local
from .texts import SKIP_TOKENS, Batch

PROBED = 64  # entries of each parameter that tell one model from another


def collect_once(
    model: nn.Module,
    adapters: Sequence[InputAdapter],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    rank: int,
    folder: str | Path,
    frozen: Frozen | None = None,
    skip: int = SKIP_TOKENS,
) -> list[InputSpace]:
    """What [`collect.collect`] gives, from `folder` where it was collected before from the same model and texts.

    The file is `retained-KEY.safetensors`, KEY a hash of the frozen model's parameters (of some entries of each), the
    texts, the adapted modules and the settings. `folder` is one that all processes see.
    """
    settings = [rank, skip, [adapter.name for adapter in adapters]]
    with (frozen or nullcontext)():
        keys = [key_of(model, [*batches, *held_out], settings, whole=frozen is not None)]
    broadcast_object_list(keys)  # of a sharded model each process sees other entries
    path = Path(folder) / f"retained-{keys[0]}.safetensors"
    there = [path.is_file()]
    broadcast_object_list(there)
    if there[0]:
        return load(path, adapters)
    spaces = collect(model, adapters, batches, held_out, rank, frozen, skip)
    if PartialState().is_main_process:
        save(path, spaces)
    PartialState().wait_for_everyone()
    return spaces


def save(path: Path, spaces: Sequence[InputSpace]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for i, space in enumerate(spaces):
        tensors |= {f"{i}.vectors": space.vectors, f"{i}.shares": space.shares, f"{i}.held_out": space.held_out}
    part = path.with_suffix(".part")
    names = json.dumps([space.modules for space in spaces])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"modules": names})
    part.replace(path)  # whole or absent


def load(path: Path, adapters: Sequence[InputAdapter]) -> list[InputSpace]:
    """The spaces of a file, each on the device of its first module."""
    devices = {adapter.name: adapter.weight.device for adapter in adapters}
    spaces = []
    with safe_open(path, framework="pt") as file:
        for i, modules in enumerate(json.loads(file.metadata()["modules"])):
            tensors = (file.get_tensor(f"{i}.{name}") for name in ("vectors", "shares", "held_out"))
            spaces.append(InputSpace(modules, *(tensor.to(devices[modules[0]]) for tensor in tensors)))
    return spaces


def key_of(model: nn.Module, batches: Sequence[Batch], settings: list, whole: bool) -> str:
    """12 hexadecimal digits; the adapter counts only where the frozen model is the `whole`, adapter included."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for batch in batches:
        digest.update(json.dumps([tensor.tolist() for tensor in batch.values()]).encode())
    for name, param in model.named_parameters():
        if not whole and ("lora_" in name or ".modules_to_save." in name):
            continue
        flat = local(param.detach()).flatten()
        some = flat[:: max(1, flat.numel() // PROBED)].to(torch.float32)
        digest.update(f"{name} {tuple(param.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:12]
