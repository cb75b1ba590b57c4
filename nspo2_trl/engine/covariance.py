"""CovEstimator: streaming low-rank covariance of gradient noise, for many equal blocks at once."""

from __future__ import annotations

import math

import torch

from .eigensolvers import EigSolver
from .significance import noise_edge, significant_rank

LEARNED = 4096  # steps whose ages are kept


def noise_rows(samples: torch.Tensor, mean: torch.Tensor, previous: torch.Tensor | None, out: torch.Tensor) -> None:
    """Rows whose outer products add up to an estimate of Cov(mean) that does not mistake drift for noise.

    Args:
        samples: (n, B, m, d) gradients of n micro-batches. mean: (B, m, d) their mean, the step's gradient.
        previous: (B, m, d) the mean of the step before; used where n = 1.
        out: (B, n, m, d), filled with (g_i - mean) / sqrt(n (n - 1)) where n >= 2, and with the successive difference
            (mean - previous) / sqrt(2) (von Neumann 1941) where n = 1.
    """
    n = samples.shape[0]
    if n > 1:
        torch.sub(samples.transpose(0, 1), mean[:, None], out=out)
        out.div_(math.sqrt(n * (n - 1)))
    else:
        assert previous is not None
        torch.sub(mean[:, None], previous[:, None], out=out)
        out.div_(math.sqrt(2.0))


def mixture(each: int, vectors: int, seed: int) -> torch.Tensor:
    """(each, m): random rows Ω with E[ΩᵀΩ] = I, so that (Ωg)ᵀ(Ωg) is an unbiased estimate of gᵀg for any g (m, d)."""
    probe = torch.randn(vectors, each, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(probe).Q.T * math.sqrt(vectors / each)


class CovEstimator:
    """Σ_t decayᵃᵍᵉ rows_tᵀ rows_t in low rank: new rows wait in a buffer, `solve` merges them into the sketch.

    Memory: (rank + buffered rows) x dim entries a block; no dim x dim matrix exists. The buffer holds the rows of at
    most `update_freq` steps and at most about `most` rows: with many rows a step it is merged earlier.

    Args:
        num_blocks: B, blocks that share a shape. dim: d, entries of a row, over all ranks.
        rank: directions tracked. update_freq: steps between two merges. decay: weight of the past per step.
        most: rows that wait for one, twice `rank` if left out.
        samples: micro-batches of a step, of `vectors` rows each. share: share of the steps that are learned from.
        width: columns that this rank has of the `dim`; all of them if left out.
        dtype: of what comes out; `stored` of the directions and rows that are kept, the same if left out.
    """

    def __init__(
        self,
        num_blocks: int,
        dim: int,
        rank: int,
        update_freq: int,
        decay: float,
        solver: EigSolver,
        samples: int = 1,
        vectors: int = 1,
        share: float = 1.0,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        most: int | None = None,
    ):
        self.dim, self.rank = dim, min(rank, dim)
        self.most = 2 * self.rank if most is None else min(most, 2 * self.rank)
        self.update_freq, self.decay, self.solver = update_freq, decay, solver
        self.total, self.dtype = solver.total, dtype
        self.share = share
        room = self._room(samples * self.rows_a_sample(samples, vectors))
        self.stack = torch.zeros(num_blocks, room, width or dim, dtype=stored or dtype, device=device)
        # (B, rank) eigenvalues: variances along `basis`, 0 for zero rows
        self.values = torch.zeros(num_blocks, self.rank, dtype=dtype, device=device)
        self.trace = torch.zeros(num_blocks, dtype=dtype, device=device)  # of all rows but those held back
        self.running_trace = self.trace  # of all rows
        self.trace_before = self.trace  # the same before the newest step
        self.row_steps: list[int] = []  # the step at which each buffered row came
        self.step = self.solved = 0  # steps seen, and how many of them when `solve` last ran
        self.sketch_step = 0  # the step that the sketch's eigenvalues are of
        self.learned: list[tuple[int, int]] = []  # step and number of independent rows, of the newest LEARNED

    @property
    def basis(self) -> torch.Tensor:
        """(B, rank, d): orthonormal rows, the tracked directions, strongest first; zero rows where there are none."""
        return self.stack[:, : self.rank]

    def rows_a_sample(self, samples: int, vectors: int) -> int:
        """How many rows to keep of a sample's m vectors, so that `update_freq` steps' samples fit the buffer."""
        steps = math.ceil(self.update_freq * self.share)
        return min(vectors, max(1, self.most // (steps * samples)))

    def _room(self, count: int) -> int:
        """Rows of the stack up to the next merge; taken at once, since growing needs both for a moment."""
        wanted = math.ceil(self.update_freq * self.share) * count + 1
        return self.rank + max(count + 1, min(wanted, self.most))

    def _resize(self, rows: int) -> None:
        grown = self.stack.new_zeros(self.stack.shape[0], rows, self.stack.shape[2])
        grown[:, : self.stack.shape[1]] = self.stack
        self.stack = grown

    def room(self, samples: int, vectors: int) -> torch.Tensor | None:
        """(B, n, each, width): where a step's rows are written before `learn`, `each` of a sample; None to keep none.

        They stand in the buffer itself, or beside it where that is of lower precision.
        """
        each, start = self.rows_a_sample(samples, vectors), self.rank + len(self.row_steps)
        count = samples * each
        if start + count > self.stack.shape[1]:
            self._resize(max(start + count, self._room(count)))
        place = self.stack[:, start : start + count].unflatten(1, (samples, each))
        return place if place.dtype == self.dtype else torch.empty_like(place, dtype=self.dtype)

    def learn(self, rows: torch.Tensor, kept: torch.Tensor | None, energy: torch.Tensor, seed: int) -> None:
        """Count a step by its noise rows (B, n, m, width), with the `room` for what is kept of them: mixtures, where
        that is less, random by `seed`. energy: (B,) Σ of the rows' squares over all ranks.
        """
        assert kept is not None
        if kept.shape[2] < rows.shape[2]:
            torch.matmul(mixture(kept.shape[2], rows.shape[2], seed).to(rows), rows, out=kept)
        start, buffered = self.rank + len(self.row_steps), kept.flatten(1, 2)
        if kept.dtype != self.stack.dtype:
            self.stack[:, start : start + buffered.shape[1]] = buffered
        self._count(energy, buffered.shape[1], independent=max(1, rows.shape[1] - 1))

    def _count(self, energy: torch.Tensor, rows: int, independent: int) -> None:
        self.advance()
        self.running_trace = self.running_trace + energy
        self.row_steps += [self.step] * rows
        self.learned = [*self.learned[-LEARNED + 1 :], (self.step, independent)]

    def ages(self, held: bool = False) -> list[tuple[int, int]]:
        """Age and number of independent rows of the steps learned from, newest first; without the newest if `held`."""
        steps = self.learned[: len(self.learned) - held]
        return [(self.step - step, count) for step, count in reversed(steps)]

    def advance(self) -> None:
        """Count a step; by itself, one that brings no rows."""
        self.step += 1
        self.trace_before, self.running_trace = self.running_trace, self.running_trace * self.decay

    def is_due(self) -> bool:
        """Whether to merge now: `update_freq` steps have passed, or as many rows as came last would be too many."""
        newest = self.row_steps.count(self.row_steps[-1]) if self.row_steps else 0
        full = len(self.row_steps) + newest > self.most
        return self.step - self.solved >= self.update_freq or full

    def solve(self, hold_last: int = 0) -> None:
        """Merge the buffered rows into the sketch and re-solve: eigenvectors of decayᵃᵍᵉ K Λ Kᵀ + Σ decayᵃᵍᵉ rows.

        Args:
            hold_last: newest rows that stay in the buffer, because the next rows to be scored share a gradient
                with them (successive differences).
        """
        self.solved = self.step
        self.trace = self.trace_before if hold_last else self.running_trace
        now = self.step - (hold_last > 0)  # what the trace is of
        past, self.sketch_step = self.values * self.decay ** (now - self.sketch_step), now
        used = len(self.row_steps) - hold_last
        if used <= 0:
            self.values = past
            return
        end = self.rank + used
        held = self.stack[:, end : end + hold_last].clone()
        ages = torch.tensor([now - step for step in self.row_steps[:used]], dtype=past.dtype, device=past.device)
        weights = torch.cat([past.sqrt(), (self.decay ** (ages / 2)).expand(len(past), -1)], dim=1)
        stack = self.stack[:, :end]
        if stack.dtype == self.dtype:
            self.values = self.solver.solve_(stack, weights, self.rank, orthonormal=self.rank)
        else:  # rounded directions are not quite orthonormal any more
            work = stack.to(self.dtype)
            self.values = self.solver.solve_(work, weights, self.rank)
            stack[:, : self.rank] = work[:, : self.rank]
        self.stack[:, self.rank : self.rank + hold_last] = held
        self.row_steps = self.row_steps[used:]

    def significant(self, limit: int, held: bool) -> torch.Tensor | None:
        """(B,) how many of the first `limit` directions stand out of white noise; None where nothing was learned.

        `held`: whether rows are successive differences, of which the newest was held back.
        """
        # the rows of one matrix share their tokens: a micro-batch counts once, however many rows it has
        if not (learned := self.ages(held)):
            return None
        edge = noise_edge(self.dim, limit, learned, self.decay, overlapping=held)
        return significant_rank(self.values, self.trace, edge)

    def state_dict(self) -> dict:
        """Tensors and plain numbers only; the buffer without its free room."""
        return {
            "stack": self.stack[:, : self.rank + len(self.row_steps)].clone(),
            "values": self.values,
            "traces": torch.stack([self.trace, self.running_trace, self.trace_before]),
            "row_steps": list(self.row_steps),
            "learned": [list(step) for step in self.learned],
            "numbers": [self.step, self.solved, self.sketch_step],
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises `ValueError` where the state is of other blocks, LoRA rank or `max_rank`."""
        filled = self.rank + len(state["row_steps"])
        expected = (len(self.stack), filled, self.stack.shape[2])
        if tuple(state["stack"].shape) != expected:
            raise ValueError(
                f"the saved covariance has shape {tuple(state['stack'].shape)}, this run needs {expected}"
            )
        if filled > self.stack.shape[1]:
            self._resize(filled)
        self.stack[:, :filled] = state["stack"]
        self.values = state["values"].to(self.values, copy=True)
        self.trace, self.running_trace, self.trace_before = state["traces"].to(self.trace, copy=True)
        self.row_steps = list(state["row_steps"])
        self.learned = [tuple(step) for step in state["learned"]]
        self.step, self.solved, self.sketch_step = state["numbers"]
