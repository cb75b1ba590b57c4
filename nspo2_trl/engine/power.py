"""PowerEstimator: the streaming covariance of samples of many rows, by the power method in place of a buffer."""

from __future__ import annotations

import torch

from .covariance import CovEstimator
from .significance import groups, unseen_rank
from .state import load_tensors

LONGEST = 20  # steps learned from that the first directions may take
AHEAD = 3  # how much faster than the covariance the evidence fades: earlier directions were worse ones


class PowerEstimator(CovEstimator):
    """Σ_t decayᵃᵍᵉ rows_tᵀ rows_t in low rank. Once there are directions k, Σ (x kᵀ) x over rows x is summed for each.

    So it learns from rows of any number at the cost of `rank` rows in the buffer, and `solve` is a step of the power
    method (Mitliagkas, Caramanis, Jain 2013): new directions are those that C k span. The first come from mixtures of
    rows, as those of [`CovEstimator`] do. Steps of one sample, whose rows overlap, are left to that one.
    """

    def __init__(self, num_blocks: int, dim: int, rank: int, *args: object, **options: object):
        super().__init__(num_blocks, dim, rank, *args, **options, most=rank)  # type: ignore[arg-type, misc]
        self.summed = False  # whether the buffer holds sums
        self.mixed = False  # whether the newest rows in it were mixtures
        self.mixtures = self.trace  # (B,) independent rows that the first directions come from
        self.fresh_step = -1  # the newest step of `fresh`
        self.groups = groups(self.rank)
        # (rank, rank + G): from energies along directions to those, and those of the groups
        each = torch.eye(self.rank).to(self.trace)
        self.grouped = torch.cat([each, *(part.sum(1, keepdim=True) for part in each.split(self.groups, 1))], 1)
        # of rows, and directions that had not seen them: see [`unseen_rank`]
        columns = self.rank + len(self.groups) + 1
        self.fresh = self.trace.new_zeros(num_blocks, 3, columns, dtype=torch.float64)

    def rows_a_sample(self, samples: int, vectors: int) -> int:
        """As many as let a step fill the buffer, where not all rows of `update_freq` steps fit."""
        fitting = super().rows_a_sample(samples, vectors)
        return fitting if samples == 1 or fitting == vectors else min(vectors, max(1, self.rank // samples))

    def room(self, samples: int, vectors: int) -> torch.Tensor | None:
        fits = samples == 1 or super().rows_a_sample(samples, vectors) == vectors
        if not fits and (self.summed or not self.row_steps):
            # a block's first rows may be zero, as `lora_A`'s are while B is; some blocks may never have others
            if self.fresh_step >= 0 or len(self.learned) >= LONGEST or bool((self.mixtures >= self.rank).all()):
                return None
        if self.summed:
            self.solve()
        return super().room(samples, vectors)

    def learn(self, rows: torch.Tensor, kept: torch.Tensor | None, energy: torch.Tensor, seed: int) -> None:
        if kept is not None:
            independent = (rows.shape[1] - 1) * kept.shape[2]
            self.mixed = independent > 0 and kept.shape[2] < rows.shape[2]
            self.mixtures = self.mixtures + independent * (energy > 0)
            return super().learn(rows, kept, energy, seed)
        flat = rows.flatten(1, 2)
        if self.stack.shape[1] < 2 * self.rank:
            self._resize(2 * self.rank)
        place = self.stack[:, self.rank : 2 * self.rank]
        coords = self.total(flat @ self.basis.to(flat.dtype).mT)
        found = coords.mT @ flat
        if self.row_steps:
            found.add_(place, alpha=self.decay ** (self.step + 1 - self.row_steps[-1]))
        place.copy_(found)
        self.summed, self.row_steps = True, []
        self._count(energy, self.rank, rows.shape[1] - 1)
        squares = self.total(torch.linalg.vector_norm(rows.flatten(2), dim=2).square())
        self._see(coords.unflatten(1, rows.shape[1:3]), squares)

    def _see(self, coords: torch.Tensor, energy: torch.Tensor) -> None:
        """Add a step to `fresh` by its rows' coordinates (B, n, m, rank) and the energy of each micro-batch (B, n)."""
        found = torch.cat([coords.square().sum(2) @ self.grouped, energy[:, :, None]], 2).double()
        squares = torch.stack([found.square(), found * energy[:, :, None]], 1).sum(2)
        fade, n = self.decay ** (AHEAD * (self.step - self.fresh_step)), len(energy[0])
        self.fresh[:, 0] = found.sum(1) + self.fresh[:, 0] * fade
        self.fresh[:, 1:] = squares * (n / (n - 1)) + self.fresh[:, 1:] * fade**2
        self.fresh_step = self.step

    def is_due(self) -> bool:
        return self.step - self.solved >= self.update_freq if self.summed else super().is_due()

    def solve(self, hold_last: int = 0) -> None:
        if not self.summed:
            before, early = self.solved, self.mixed and self.step - self.solved < self.update_freq
            super().solve(hold_last)
            self.solved = before if early else self.step
            return
        self.solved, self.trace = self.step, self.running_trace
        past, self.sketch_step = self.values * self.decay ** (self.step - self.sketch_step), self.step
        sums = self.stack[:, self.rank : 2 * self.rank].to(self.dtype) * self.decay ** (self.step - self.row_steps[-1])
        work = torch.addcmul(sums, past[:, :, None], self.basis.to(self.dtype))  # C k, for each k
        self.values = self.solver.solve_(work, torch.ones_like(past), self.rank).sqrt()
        self.stack[:, : self.rank] = work
        self.row_steps, self.summed = [], False

    def significant(self, limit: int, held: bool) -> torch.Tensor | None:
        if self.fresh_step < 0:
            # of mixtures, few and heavy-tailed, no direction counts before unseen rows confirm it
            return None if self.mixed else super().significant(limit, held)
        return unseen_rank(self.fresh, self.groups, self.dim).clamp(max=limit)

    def state_dict(self) -> dict:
        own = {"fresh": self.fresh.clone(), "mixtures": self.mixtures}
        return super().state_dict() | own | {"sums": [self.summed, self.mixed, self.fresh_step]}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        load_tensors(self, ["fresh", "mixtures"], state)
        self.summed, self.mixed, self.fresh_step = state["sums"]
