"""The adapters of a model without the model, with random gradients: bytes, and time of each kind of step."""

from __future__ import annotations

import statistics
import time

import torch
from rich.progress import track
from rich.table import Table
from torch import nn

from nspo2_trl import NSPO2Config
from nspo2_trl.engine.second_moment import ROWS_AT_ONCE, SecondMoment, random_probe
from nspo2_trl.layout.blocks import Block
from nspo2_trl.projections.noise import NoiseProjection
from nspo2_trl.projections.protocol import Step
from nspo2_trl.training.options import default_max_rank
from nspo2_trl.training.samples import sample_share

# hidden, intermediate, layers, heads, key-value heads, vocabulary: 135m as SmolLM2-135M, 0.5b as Qwen2.5-0.5B, 1b as
# Llama-3.2-1B, 8b as Llama-3.1-8B; 10m is none in particular
SIZES = {
    "10m": (256, 1024, 8, 8, 4, 4096),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def adapters(size: str, lora_r: int, device: torch.device) -> list[Block]:
    """LoRA on all linear layers of a model of that size, with random numbers."""
    hidden, intermediate, layers, heads, kv_heads, _ = SIZES[size]
    kv = hidden // heads * kv_heads
    shapes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden)}
    shapes |= {"gate": (hidden, intermediate), "up": (hidden, intermediate), "down": (intermediate, hidden)}
    make = lambda *shape: nn.Parameter(torch.randn(shape, device=device) / 100)  # noqa: E731
    return [
        Block(f"{layer}.{name}", [make(lora_r, fan_in), make(fan_out, lora_r)])
        for layer in range(layers)
        for name, (fan_in, fan_out) in shapes.items()
    ]


def measure(cell: dict, micro_batches: int, device: torch.device) -> dict:
    """Figures of one cell.

    State is all that is held between two steps: directions, what is summed up for the next ones, running mean, what
    is small. Samples are the micro-batches' gradients of one step; beside them a step has a copy of the gradient.
    """
    blocks, rank = adapters(cell["model"], cell["lora_r"], device), cell["projection_rank"]
    entries = sum(p.numel() for block in blocks for p in block.params)
    options = {name: cell[name] for name in ("covariance", "update_freq", "projection_rank", "basis_dtype")}
    tracked = default_max_rank(rank, cell["covariance"])
    config = NSPO2Config(strategy="keep", max_rank=tracked, min_rank=rank, **options)
    noise = NoiseProjection(blocks, config, share=sample_share(micro_batches))
    samples = [stack.buffer(micro_batches).normal_() for stack in noise.stacks]
    for stack in noise.stacks:
        for place in stack.places:
            place.param.grad = torch.zeros_like(place.param)
    kinds: dict[str, list[float]] = {"filter": [], "learn": [], "solve": []}
    solves, parts = [], noise.filters
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in track(range(2 * config.update_freq + 1), description=cell["label"]):
        for stack, buffer in zip(noise.stacks, samples):
            buffer.copy_(buffer.roll(1, -1))  # as good as new numbers, and made faster
            torch._foreach_copy_([place.param.grad for place in stack.places], stack.views_of(buffer[0]))
        solved = parts[0].cov.solved if parts[0].cov else 0
        kind = "learn" if noise.learns else "filter"
        synchronize()
        start = time.perf_counter()
        noise.read_grads()
        noise.before_step(Step(samples if noise.learns else []))
        noise.after_step()
        synchronize()
        seconds = time.perf_counter() - start
        if parts[0].cov and parts[0].cov.solved > solved:
            kind = "solve"
            solves.append(step)
        if step > 0:
            kinds[kind].append(seconds)
    return {
        "entries": entries,
        "blocks": len(blocks),
        "adamw_mib": 8 * entries / 2**20,
        "basis_mib": sum(part.cov.basis.numel() * part.cov.stack.element_size() for part in parts) / 2**20,
        "state_mib": noise.state_bytes / 2**20,
        "state_of_adamw": noise.state_bytes / (8 * entries),
        "samples_mib": sum(buffer.nbytes for buffer in samples) / 2**20,
        "ms": {kind: 1000 * statistics.median(values) if values else None for kind, values in kinds.items()},
        # oftener than `update_freq` says where the buffer of 2 max_rank rows is full before
        "solve_every": (solves[-1] - solves[0]) / (len(solves) - 1),
    }


def retained(size: str, rank: int) -> dict:
    """Bytes of collecting retained texts' second moments for a model of that size, however many tokens are read.

    In each layer what has one input shares it: q, k and v; o; gate and up; down.
    """
    hidden, intermediate, layers, *_ = SIZES[size]
    widths = [hidden, hidden, hidden, intermediate]
    moments = [SecondMoment(random_probe(width, 2 * rank + 32).float()) for width in widths]
    held = layers * sum(moment.sum.nbytes + moment.probe.nbytes for moment in moments)
    once = 8 * ROWS_AT_ONCE * (max(widths) + 2 * rank + 32)  # rows in float64 and their products
    return {"retained_rank": rank, "retained_mib": (held + once) / 2**20}


def table(cells: list[dict], device: str) -> Table:
    columns = ("cell", "AdamW", "state", "state / AdamW", "directions", "samples", "filter ms", "learn ms", "solve ms")
    result = Table(*columns, title=f"NSPO2 on adapters alone, {device}; MiB")
    for cell in cells:
        memory = [f"{cell[f'{name}_mib']:.4g}" for name in ("adamw", "state", "basis", "samples")]
        memory.insert(2, f"{cell['state_of_adamw']:.2f}")
        times = ("-" if value is None else f"{value:.0f}" for value in cell["ms"].values())
        result.add_row(cell["label"], *memory, *times)
    return result
