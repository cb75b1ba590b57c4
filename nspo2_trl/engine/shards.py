"""Shards: how the entries of equal blocks are spread over processes, and what travels between them.

Every rank keeps the same columns of all blocks of a stack, (B, m, d / W): inner products are summed over ranks, and
everything else is local. State and work shrink with the number of ranks W; samples and gradient are whole on each.
Eigenvectors, whose signs are arbitrary, are found on one rank for each block, so that no two ranks can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
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
        blocks = [whole.cpu() for whole in map(self.gather, part) if keep]
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
