"""Moving values between FSDP2's sharded parameters and the columns of blocks that a rank works on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from ..engine.shards import Shards


class LocalParts:
    """Moves values between FSDP2's parameters, of which a rank has some rows, and a rank's columns of their blocks.

    One all-to-all for all parameters of a stack, each way: a rank sends less than 1/W of their entries.

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
        # as DTensor's `Shard(0)` cuts rows: ranks beyond the last chunk have none
        cuts = [(*p.chunk(ranks), *[p[:0]] * ranks)[:ranks] for p in positions]
        # by rank: places in (B, m, d) of what it has of the parameters, in its order
        held = [torch.cat([cut[rank].flatten() for cut in cuts]) for rank in range(ranks)]
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
