"""The adapters of a model without the model, with random gradients: bytes, time of a step, memory traffic."""

from __future__ import annotations

import statistics
import time

import torch
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nspo2_trl import NSPO2Config
from nspo2_trl.layout.blocks import Block
from nspo2_trl.projections.noise import NoiseProjection
from nspo2_trl.projections.protocol import Step
from nspo2_trl.training.samples import sample_share

from .overhead import SIZES

# An H100's step on a model with P parameters, estimated: 16 pairs of 2 x 512 tokens; 2 P operations a token forwards,
# 2 P backwards (adapters alone have weight gradients), 2 P for gradient checkpointing, 2 P for the reference model; at
# 40 % of 989 TFLOP/s. NSPO2's part: its memory traffic at 60 % of 3.35 TB/s, and 1 ms for each matrix handed to eigh,
# as if they were solved one after the other (assumed, not measured).
TOKENS, FLOPS, BANDWIDTH, EIGH_SECONDS = 16 * 2 * 512, 0.4 * 989e12, 0.6 * 3.35e12, 1e-3


def parameters(size: str) -> int:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    attention = hidden * hidden * 2 + 2 * hidden * (hidden // heads * kv_heads)
    return layers * (attention + 3 * hidden * intermediate) + vocabulary * hidden


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each tensor once an operation; views move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes, self.eigh = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        if "eigh" in str(function):
            self.eigh += args[0].shape[0]
        return result


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

    State is what a resumed run needs: directions, buffered samples of their noise, running mean. Scratch is a copy of
    the gradient and what is small; samples are the micro-batches' gradients of one step.
    """
    blocks = adapters(cell["model"], cell["lora_r"], device)
    params = [p for block in blocks for p in block.params]
    entries = sum(p.numel() for p in params)
    rank = cell["projection_rank"]
    config = NSPO2Config(
        strategy="keep",
        covariance=cell["covariance"],
        update_freq=cell["update_freq"],
        projection_rank=rank,
        max_rank=2 * rank,
        min_rank=rank,
        basis_dtype=cell["basis_dtype"],
    )
    noise = NoiseProjection(blocks, config, share=sample_share(micro_batches))
    samples = [stack.buffer(micro_batches).normal_() for stack in noise.stacks]
    for stack in noise.stacks:
        for place in stack.places:
            place.param.grad = torch.zeros_like(place.param)
    kinds: dict[str, list[float]] = {"filter": [], "learn": [], "solve": []}
    bytes_, eigh, solves = {}, 0, []
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in track(range(2 * config.update_freq + 1), description=cell["label"]):
        for stack, buffer in zip(noise.stacks, samples):
            buffer.copy_(buffer.roll(1, -1))  # as good as new numbers, and made faster
            torch._foreach_copy_([place.param.grad for place in stack.places], stack.views_of(buffer[0]))
        solved = noise.filters[0].cov.solved if noise.filters[0].cov else 0
        kind = "learn" if noise.learns else "filter"
        synchronize()
        start = time.perf_counter()
        if step < 2 * config.update_freq - 5:
            noise.read_grads()
            noise.before_step(Step(samples if noise.learns else []))
            noise.after_step()
        else:  # the last steps are counted, not timed
            with Traffic() as traffic:
                noise.read_grads()
                noise.before_step(Step(samples if noise.learns else []))
                noise.after_step()
        synchronize()
        seconds = time.perf_counter() - start
        if noise.filters[0].cov and noise.filters[0].cov.solved > solved:
            kind = "solve"
            solves.append(step)
        if step >= 2 * config.update_freq - 5:
            bytes_[kind], eigh = traffic.bytes, max(eigh, traffic.eigh)
        elif step > 0:
            kinds[kind].append(seconds)
    # oftener than `update_freq` says where the buffer of 2 max_rank rows is full before
    parts, every = noise.filters, (solves[-1] - solves[0]) / (len(solves) - 1)
    state = sum(part.cov.stack.nbytes + part.reference.nbytes for part in parts)
    shares = {"filter": 1 - noise.share, "learn": noise.share - 1 / every, "solve": 1 / every}
    return {
        "entries": entries,
        "blocks": len(blocks),
        "adamw_mib": 8 * entries / 2**20,
        "basis_mib": sum(part.cov.basis.numel() * part.cov.stack.element_size() for part in parts) / 2**20,
        "state_mib": state / 2**20,
        "scratch_mib": (noise.state_bytes - state) / 2**20,
        "samples_mib": sum(buffer.nbytes for buffer in samples) / 2**20,
        "ms": {kind: 1000 * statistics.median(values) if values else None for kind, values in kinds.items()},
        "gib_moved": {kind: value / 2**30 for kind, value in bytes_.items()},
        "eigh_matrices": eigh,
        "solve_every": every,
        "gib_moved_a_step": sum(shares[kind] * value for kind, value in bytes_.items()) / 2**30,
    }


def estimate(size: str, found: dict) -> dict:
    """Seconds on an H100, see above: of a training step, and of NSPO2 in it."""
    step = 8 * parameters(size) * TOKENS / FLOPS
    moved = found["gib_moved_a_step"] * 2**30 / BANDWIDTH
    solved = found["eigh_matrices"] * EIGH_SECONDS / found["solve_every"]
    return {"step_s": step, "traffic_s": moved, "eigh_s": solved, "share": (moved + solved) / step}


def table(cells: list[dict], device: str) -> Table:
    result = Table(title=f"NSPO2 on adapters alone, {device}; MiB; estimate for an H100")
    columns = ("cell", "AdamW", "directions", "state", "scratch", "samples", "filter ms", "learn ms", "solve ms")
    for name in (*columns, "GiB a step", "H100: share of step"):
        result.add_column(name, justify="left" if name == "cell" else "right")
    for cell in cells:
        memory = (cell[name] for name in ("adamw_mib", "basis_mib", "state_mib", "scratch_mib", "samples_mib"))
        times = ("-" if value is None else f"{value:.0f}" for value in cell["ms"].values())
        share = f"{100 * cell['h100']['share']:.2f} %"
        moved = f"{cell['gib_moved_a_step']:.2f}"
        result.add_row(cell["label"], *(f"{value:.0f}" for value in memory), *times, moved, share)
    return result
