"""Top eigenpairs: three ways, against the explicit covariance, and where numbers are large, small or bad."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo2_trl.engine.eigensolvers import EXACT_MAX_DIM, EigSolver, eigh

METHODS = ["gram", "exact", "randomized"]


def solve(method, rows, k, weights=None):
    stack = rows.clone()
    values = EigSolver(method).solve_(stack, torch.ones_like(rows[..., 0]) if weights is None else weights, k)
    return values, stack[:, :k]


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10_000), blocks=st.integers(1, 3), n=st.integers(6, 20), dim=st.integers(6, 40))
@settings(max_examples=30)
def test_equals_eigh_of_the_explicit_covariance(method, seed, blocks, n, dim):
    k = 4
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -1, dim, dtype=torch.float64)
    rows = torch.randn(blocks, n, dim, generator=generator, dtype=torch.float64) * scales
    weights = torch.rand(blocks, n, generator=generator, dtype=torch.float64) + 0.5
    values, basis = solve(method, rows, k, weights)
    weighted = rows * weights[:, :, None]
    expected, vectors = torch.linalg.eigh(weighted.mT @ weighted)
    expected = expected.flip(-1)[:, :k]
    assert torch.allclose(values, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert torch.allclose(basis @ basis.mT, torch.eye(k, dtype=torch.float64).expand(blocks, k, k), atol=1e-9)
    captured = (weighted @ basis.mT).square().sum((1, 2))
    assert torch.allclose(captured, expected.sum(1), rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_directions_than_asked_gives_zero_rows(method):
    torch.manual_seed(0)
    rows = torch.zeros(2, 8, 20)
    rows[0, :3] = torch.randn(3, 20)  # rank 3; block 1 has no direction at all
    values, basis = solve(method, rows, 6)
    assert torch.equal((values > 0).sum(1), torch.tensor([3, 0]))
    assert torch.allclose(basis[0, :3] @ basis[0, :3].T, torch.eye(3), atol=1e-5)
    assert basis[0, 3:].abs().max() == 0 and basis[1].abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_orthonormal_when_eigenvalues_span_many_orders(method):
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(1, 200, 16)).Q.mT * torch.logspace(0, -2.9, 16)[:, None]
    _, basis = solve(method, rows.contiguous(), 16)
    assert (basis @ basis.mT - torch.eye(16)).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-18, 1e17])
def test_scale_does_not_matter(scale):
    torch.manual_seed(0)
    rows = torch.randn(2, 10, 30)
    values, basis = solve("gram", rows, 4)
    scaled_values, scaled = solve("gram", rows * scale, 4)
    assert torch.allclose(scaled_values / scale**2, values, rtol=1e-3)
    assert torch.allclose(scaled.mT @ scaled, basis.mT @ basis, atol=1e-4)


def test_one_bad_block_does_not_touch_the_others():
    torch.manual_seed(0)
    rows = torch.randn(3, 10, 30)
    expected_values, expected = solve("gram", rows, 4)
    rows[1] = 3e30  # its Gram matrix overflows
    values, basis = solve("gram", rows, 4)
    assert values[1].abs().max() == 0 and basis[1].abs().max() == 0
    assert torch.allclose(values[::2], expected_values[::2]) and torch.allclose(basis[::2], expected[::2])


def test_randomized_leaves_the_global_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    solve("randomized", torch.ones(1, 5, 7), 2)
    assert torch.equal(torch.rand(1), expected)


def test_exact_refuses_large_blocks():
    with pytest.raises(ValueError, match="eigensolver='gram'"):
        solve("exact", torch.zeros(1, 3, EXACT_MAX_DIM + 1), 2)


def test_singular_matrix_that_makes_float32_lapack_underflow():
    """Five directions of rank in 26 rows: float32 `eigh` of a Gram matrix like this one gave NaN."""
    gram = torch.zeros(26, 26)
    small = [
        [2.673e-01, -4.100e-09, 7.551e-10, 4.537e-03, -2.652e-02],
        [-4.100e-09, 1.070e-01, -6.401e-10, 1.602e-01, -1.011e-01],
        [7.551e-10, -6.401e-10, 2.528e-02, 3.980e-02, -3.443e-02],
        [4.537e-03, 1.602e-01, 3.980e-02, 3.624e-01, -2.583e-01],
        [-2.652e-02, -1.011e-01, -3.443e-02, -2.583e-01, 2.380e-01],
    ]
    place = torch.tensor([0, 1, 2, 24, 25])
    gram[place[:, None], place] = torch.tensor(small)
    values, vectors = eigh(gram[None])
    assert torch.isfinite(values).all() and torch.isfinite(vectors).all()
    assert torch.allclose(values[0, :5].sum(), gram.trace(), rtol=1e-3)
