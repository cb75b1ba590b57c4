import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo2_trl.engine.covariance import CovEstimator, noise_rows
from nspo2_trl.engine.eigensolvers import EigSolver


def append(cov, rows):
    room = cov.room(rows.shape[1], vectors=1)
    room.copy_(rows[:, :, None])
    cov.learn(room, room, rows.square().sum((1, 2)), seed=0)


def rows_of(samples, mean, previous=None):
    out = torch.empty_like(samples.transpose(0, 1))
    noise_rows(samples, mean, previous, out)
    return out


def estimator(blocks=1, dim=20, rank=20, update_freq=3, decay=0.9):
    return CovEstimator(blocks, dim, rank, update_freq, decay, solver=EigSolver(), dtype=torch.float64)


def feed(cov, batches):
    """Append each of `batches` of rows, and solve when it is due."""
    for rows in batches:
        append(cov, rows)
        if cov.is_due():
            cov.solve()
        yield rows


@given(seed=st.integers(0, 10_000), n=st.integers(2, 6), vectors=st.integers(1, 3))
@settings(max_examples=30)
def test_rows_sum_to_the_covariance_of_the_mean(seed, n, vectors):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(n, 2, vectors, 5, generator=generator, dtype=torch.float64)
    rows = rows_of(samples, samples.mean(0)).flatten(1, 2)
    for block in range(2):
        expected = sum(torch.cov(samples[:, block, v].T) / n for v in range(vectors))
        assert torch.allclose(rows[block].T @ rows[block], expected)


def test_successive_differences_do_not_mistake_drift_for_noise():
    torch.manual_seed(0)
    drift, previous, total = torch.zeros(1, 1, 3), None, torch.zeros(3, 3)
    for _ in range(4000):
        drift = drift + 0.01  # the mean wanders far further than the noise is wide
        mean = drift + torch.randn(1, 1, 3) * torch.tensor([1.0, 2.0, 0.5])
        if previous is not None:
            rows = rows_of(mean[None], mean, previous)
            total += rows[0, 0].T @ rows[0, 0]
        previous = mean
    assert torch.allclose(total / 3999, torch.diag(torch.tensor([1.0, 4.0, 0.25])), atol=0.25)


@given(seed=st.integers(0, 10_000), decay=st.floats(0.5, 0.99), update_freq=st.integers(1, 7))
@settings(max_examples=20)
def test_full_rank_sketch_is_the_decayed_covariance(seed, decay, update_freq):
    torch.manual_seed(seed)
    cov = estimator(blocks=2, dim=6, rank=6, update_freq=update_freq, decay=decay)
    expected = torch.zeros(2, 6, 6, dtype=torch.float64)
    for rows in feed(cov, torch.randn(20, 2, 2, 6, dtype=torch.float64)):
        expected = decay * expected + rows.mT @ rows
    cov.solve()
    rebuilt = cov.basis.mT @ torch.diag_embed(cov.values) @ cov.basis
    assert torch.allclose(rebuilt, expected, atol=1e-9)
    assert torch.allclose(cov.trace, torch.diagonal(expected, dim1=1, dim2=2).sum(1))


def test_held_rows_are_merged_with_the_next_solve():
    torch.manual_seed(0)
    rows = torch.randn(1, 3, 5, dtype=torch.float64)
    held, whole = estimator(dim=5, rank=5, decay=0.8), estimator(dim=5, rank=5, decay=0.8)
    for i in range(3):
        append(held, rows[:, i : i + 1])
        append(whole, rows[:, i : i + 1])
    held.solve(hold_last=1)
    two = rows[0, 1:2].T @ rows[0, 1:2] + 0.8 * rows[0, :1].T @ rows[0, :1]
    assert torch.allclose(held.values[0, :2].sum(), torch.trace(two))
    held.solve()
    whole.solve()
    assert torch.allclose(held.values, whole.values)


def test_memory_is_rank_plus_buffered_rows():
    cov = estimator(dim=1000, rank=10, update_freq=50)
    for _ in feed(cov, torch.randn(100, 1, 4, 1000, dtype=torch.float64)):
        assert cov.stack.shape[1] <= 10 + 2 * 10 + 1


def test_a_state_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="saved covariance"):
        estimator(rank=4).load_state_dict(estimator(rank=5).state_dict())
