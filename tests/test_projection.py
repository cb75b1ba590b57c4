"""The filter of a block is an orthogonal projector of the rank that was asked for."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo2_trl.engine.projection import ProjectionHead, coordinates
from nspo2_trl.engine.strategies import select

shapes = {
    "seed": st.integers(0, 10_000),
    "strategy": st.sampled_from(["noise", "keep", "hybrid"]),
    "vectors": st.integers(1, 3),
    "rank": st.integers(0, 6),
    "dim": st.integers(8, 40),
}


def make(seed, strategy, vectors, rank, dim, gain=1.0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(2, dim, 7, generator=generator)).Q.mT.contiguous()
    reference = torch.randn(2, vectors, dim, generator=generator)
    grad = torch.randn(2, vectors, dim, generator=generator)
    taken, kept = select(strategy, torch.full((2,), rank), coordinates(reference, basis))
    return ProjectionHead(basis, taken, kept, torch.full((2,), gain)), reference, grad


@given(**shapes)
@settings(max_examples=40)
def test_full_projection_is_an_orthogonal_projector(seed, strategy, vectors, rank, dim):
    head, reference, grad = make(seed, strategy, vectors, rank, dim)
    once = head.apply(grad)
    assert torch.allclose(head.apply(once), once, atol=1e-5)
    assert (once.norm(dim=(1, 2)) <= grad.norm(dim=(1, 2)) * (1 + 1e-5)).all()
    assert head.restrict(coordinates(once, head.basis)).abs().max() < 1e-5  # nothing is left in K'
    other = reference + grad
    assert torch.allclose((head.apply(grad) * other).sum(), (grad * head.apply(other)).sum(), atol=1e-3)  # symmetric
    assert torch.allclose(head.apply(grad + 2 * other), head.apply(grad) + 2 * head.apply(other), atol=1e-4)  # linear


@given(**shapes)
@settings(max_examples=40)
def test_rank_is_the_number_of_directions_removed(seed, strategy, vectors, rank, dim):
    head, reference, _ = make(seed, strategy, vectors, rank, dim)
    units = torch.eye(vectors * dim).view(-1, 1, vectors, dim).expand(-1, 2, -1, -1)
    matrix = torch.stack([head.apply(unit)[0].flatten() for unit in units])
    lost = vectors * dim - torch.linalg.matrix_rank(matrix, atol=1e-4)
    whole = {"noise": rank, "keep": 0, "hybrid": (rank + 1) // 2}[strategy]
    part = (rank - whole + (vectors == 1)) * vectors - 1 if rank > whole else 0
    assert lost == whole * vectors + part


@given(**shapes)
@settings(max_examples=40)
def test_keep_leaves_the_reference_alone(seed, strategy, vectors, rank, dim):
    head, reference, _ = make(seed, "keep", vectors, rank, dim)
    assert torch.allclose(head.apply(reference), reference, atol=1e-4)


@given(gain=st.floats(0, 1), **shapes)
@settings(max_examples=40)
def test_gain_removes_its_share(gain, seed, strategy, vectors, rank, dim):
    head, _, grad = make(seed, strategy, vectors, rank, dim, gain)
    full, _, _ = make(seed, strategy, vectors, rank, dim)
    assert torch.allclose(head.apply(grad), (1 - gain) * grad + gain * full.apply(grad), atol=1e-5)
    lost = grad.square().sum((1, 2)) - head.apply(grad).square().sum((1, 2))
    inside = head.restrict(coordinates(grad, head.basis)).square().sum((1, 2))
    assert torch.allclose(lost, head.removed_share * inside, atol=1e-3)


def test_zero_directions_remove_nothing():
    head, _, grad = make(0, "noise", 1, 4, 20)
    head.basis = torch.zeros_like(head.basis)
    assert torch.equal(head.apply(grad), grad)
