"""Shards: how the entries of equal blocks are spread over processes, and what travels between them.

Every rank keeps the same columns of all blocks of a group, (B, m, d / W), and does NSPO2's work on them: inner
products are summed over ranks, a few numbers a block, and everything else is local. State and work shrink with the
number of ranks W; the samples of a step and the gradient are whole on each. Eigenvectors, whose signs are arbitrary,
are found on one rank for each block, so that ranks of different hardware cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad


class Shards:
    """Columns of (…, d) tensors: `width` of them on each rank, those of the last ranks padded with zeros.

    Args:
        dim: d. process_group: the ranks; the default group where left out.
    """

    def __init__(self, dim: int, process_group: dist.ProcessGroup | None = None):
        self.group = process_group
        self.ranks, self.rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        self.dim, self.width = dim, math.ceil(dim / self.ranks)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, a new tensor, the same bits on every rank."""
        part = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(part, group=self.group)
        return part

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's columns (…, width) of `full` (…, d): a view, or a copy where they are padded."""
        part = full[..., self.rank * self.width : (self.rank + 1) * self.width]
        missing = self.width - part.shape[-1]
        return pad(part, (0, missing)) if missing else part

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All columns (…, d) of what each rank has (…, width) of. Sends (W - 1)/W of the result's entries a rank."""
        return self._gather(part).unflatten(0, (self.ranks, -1)).movedim(0, -2).flatten(-2)[..., : self.dim]

    def whole(self, part: torch.Tensor, keep: bool) -> torch.Tensor:
        """`gather` of (B, …, width) to the host, block by block, so that the device needs no room for all of it.

        Every rank must call it; those that do not `keep` the result get `part` back.
        """
        blocks = []
        for block in part:
            block = self.gather(block)
            if keep:
                blocks.append(block.cpu())
        return torch.stack(blocks) if keep else part

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """(W b, …): `part` (b, …) of all ranks, one after the other."""
        found = part.new_empty(self.ranks * part.shape[0], *part.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(found, part.contiguous(), group=self.group)
        return found

    def spread(self, function: Callable, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`function(matrix)` of B matrices (B, …), which all ranks have: each does B/W of them."""
        blocks, own = len(matrix), math.ceil(len(matrix) / self.ranks)
        padded = torch.cat([matrix, matrix.new_zeros(own * self.ranks - blocks, *matrix.shape[1:])])
        results = function(padded[self.rank * own : (self.rank + 1) * own])
        return tuple(self._gather(result)[:blocks] for result in results)

    def exchange(self, full: torch.Tensor) -> torch.Tensor:
        """Of `full` (n, …, d), different on each rank, this rank's columns of all ranks': (W, n, …, width).

        Sends (W - 1)/W of the entries of `full`.
        """
        padded = pad(full, (0, self.ranks * self.width - self.dim))
        send = padded.unflatten(-1, (self.ranks, self.width)).movedim(-2, 0).contiguous()
        found = torch.empty_like(send)
        dist.all_to_all_single(found, send, group=self.group)
        return found


class LocalParts:
    """Moves values between FSDP2's parameters, of which a rank has some rows, and a rank's columns of their blocks.

    One all-to-all for all parameters of a group, each way: a rank sends less than 1/W of their entries.

    Args:
        shards: the columns. positions: for each parameter, a tensor of its shape with the place of every entry in
            (B, m, d), counted flat. params: the parameters, sharded over one mesh dimension.

    Raises:
        ValueError: a parameter is sharded in another way.
    """

    def __init__(self, shards: Shards, positions: list[torch.Tensor], params: Sequence[DTensor]):
        for param in params:
            if param.device_mesh.ndim != 1 or param.placements != (Shard(0),):
                raise ValueError(
                    f"NSPO2 supports FSDP2 with every parameter sharded over all ranks, but found {param.placements} "
                    f"on a mesh of {param.device_mesh.ndim} dimensions: use full sharding "
                    "(`fsdp_reshard_after_forward: true`, no hybrid sharding), or DDP."
                )
        self.shards = shards
        d, width, ranks = shards.dim, shards.width, shards.ranks
        held = []  # by rank: places in (B, m, d) of what it has of the parameters, in its order
        for rank in range(ranks):
            rows = [torch.tensor_split(p, _bounds(len(p), ranks))[rank].flatten() for p in positions]
            held.append(torch.cat(rows))
        owner = (held[shards.rank] % d) // width
        self.order = torch.argsort(owner, stable=True)  # my entries, by the rank whose columns they are in
        self.sends = torch.bincount(owner, minlength=ranks).tolist()
        mine = [places[(places % d) // width == shards.rank] for places in held]
        self.receives = [len(places) for places in mine]
        places = torch.cat(mine)
        self.places = places // d * width + places % d - shards.rank * width

    def take(self, local: list[torch.Tensor], out: torch.Tensor) -> None:
        """Fill `out` (B, m, width) from what the ranks have of the parameters."""
        send = torch.cat([part.flatten().to(out.dtype) for part in local])[self.order]
        found = send.new_empty(len(self.places))
        dist.all_to_all_single(found, send, self.receives, self.sends, group=self.shards.group)
        out.view(-1)[self.places] = found

    def give(self, part: torch.Tensor, local: list[torch.Tensor]) -> None:
        """The way back: write `part` (B, m, width) into what this rank has of the parameters."""
        send = part.flatten()[self.places]
        found = send.new_empty(len(self.order))
        dist.all_to_all_single(found, send, self.sends, self.receives, group=self.shards.group)
        flat = torch.empty_like(found)
        flat[self.order] = found
        for target, piece in zip(local, flat.split([t.numel() for t in local])):
            target.copy_(piece.view_as(target))


def _bounds(rows: int, ranks: int) -> list[int]:
    """Where DTensor's `Shard(0)` cuts `rows` rows: equal chunks, the last ones shorter or empty."""
    chunk = math.ceil(rows / ranks)
    return [min(rank * chunk, rows) for rank in range(1, ranks)]
