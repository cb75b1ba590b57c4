"""PowerEstimator: the streaming covariance of samples of many rows, by the power method in place of a buffer."""

from __future__ import annotations

import torch

from .covariance import CovEstimator
from .significance import fresh_edge, significant_rank


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
        self.before_sums = -1  # the step before the first sums
        # (B, rank + 1) of rows since then: variances along the i-th direction, which had not seen them, and trace
        self.fresh = self.trace.new_zeros(num_blocks, self.rank + 1)

    def room(self, samples: int, vectors: int) -> torch.Tensor | None:
        fits = samples == 1 or self.rows_a_sample(samples, vectors) == vectors
        full = sum(count for _, count in self.learned[: self.rank]) >= self.rank  # else some directions are still zero
        adds = not fits and full and (self.summed or not self.row_steps)
        return None if adds else super().room(samples, vectors)

    def learn(self, rows: torch.Tensor, kept: torch.Tensor | None, energy: torch.Tensor, seed: int) -> None:
        if kept is not None:
            self.mixed = rows.shape[1] > 1 and kept.shape[2] < rows.shape[2]
            return super().learn(rows, kept, energy, seed)
        if self.before_sums < 0:
            self.before_sums = self.step
        flat = rows.flatten(1, 2)
        if self.stack.shape[1] < 2 * self.rank:
            self._resize(2 * self.rank)
        place = self.stack[:, self.rank : 2 * self.rank]
        coords = self.total(flat @ self.basis.to(flat.dtype).mT)
        found, fresh = coords.mT @ flat, torch.cat([coords.square().sum(1), energy[:, None]], 1)
        if self.row_steps:
            found.add_(place, alpha=self.decay ** (self.step + 1 - self.row_steps[-1]))
        place.copy_(found)
        self.fresh = fresh.add_(self.fresh, alpha=self.decay ** (self.step + 1 - self.learned[-1][0]))
        self.summed, self.row_steps = True, []
        self._count(energy, self.rank, rows.shape[1] - 1)

    def slot(self, count: int) -> torch.Tensor:
        if self.summed:
            self.solve()
        return super().slot(count)

    def is_due(self) -> bool:
        return self.step - self.solved >= self.update_freq if self.summed else super().is_due()

    def solve(self, hold_last: int = 0) -> None:
        if not self.summed:
            return super().solve(hold_last)
        self.solved, self.trace = self.step, self.running_trace
        past, self.sketch_step = self.values * self.decay ** (self.step - self.sketch_step), self.step
        sums = self.stack[:, self.rank : 2 * self.rank].to(self.dtype) * self.decay ** (self.step - self.row_steps[-1])
        work = torch.addcmul(sums, past[:, :, None], self.basis.to(self.dtype))  # C k, for each k
        self.values = self.solver.solve_(work, torch.ones_like(past), self.rank).sqrt()
        self.stack[:, : self.rank] = work
        self.row_steps, self.summed = [], False

    def significant(self, limit: int, held: bool) -> torch.Tensor | None:
        if self.before_sums < 0:
            # of mixtures, few and heavy-tailed, no direction counts before unseen rows confirm it
            return None if self.mixed else super().significant(limit, held)
        learned = [(age, count) for age, count in self.ages() if self.step - age > self.before_sums]
        edge = fresh_edge(self.dim, limit, learned, self.decay)
        return significant_rank(self.fresh[:, :-1], self.fresh[:, -1], edge)

    def state_dict(self) -> dict:
        return super().state_dict() | {"fresh": self.fresh, "sums": [self.summed, self.mixed, self.before_sums]}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.fresh = state["fresh"].to(self.fresh, copy=True)
        self.summed, self.mixed, self.before_sums = state["sums"]
