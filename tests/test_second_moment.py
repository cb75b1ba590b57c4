"""The streaming second moment against the eigenvectors of the full matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nspo2_trl.engine.second_moment import SecondMoment, energy_along, random_probe


def moment_of(rows, size, batches=1, probe=None):
    moment = SecondMoment(random_probe(rows.shape[1], size) if probe is None else probe)
    for part in rows.chunk(batches):
        moment.update(part)
    return moment


def exact(rows, k):
    values, vectors = torch.linalg.eigh(rows.double().T @ rows.double())
    return values.flip(0)[:k], vectors.flip(1)[:, :k]


def rows_of(n, width, span, seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(span, width, generator=generator) * torch.logspace(0, -2, span)[:, None]
    return torch.randn(n, span, generator=generator) @ mixing


def projector(basis):
    return basis @ basis.T


@given(st.integers(1, 6), st.integers(1, 40), st.integers(8, 30), st.integers(0, 99))
def test_exact_where_the_rows_span_less_than_the_probe(span, n, width, seed):
    rows = rows_of(n, width, span, seed)
    values, basis = moment_of(rows, size=8).directions(8)
    expected = exact(rows, len(values))
    assert len(values) == min(span, n)
    torch.testing.assert_close(values, expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-9)
    assert (rows.double() - rows.double() @ projector(basis)).abs().max() < 1e-5 * rows.abs().max()


def test_exact_where_the_probe_has_all_directions():
    rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    values, basis = moment_of(rows, size=24).directions(5)
    expected = exact(rows, 5)
    torch.testing.assert_close(values, expected[0])
    torch.testing.assert_close(projector(basis), projector(expected[1]))


@pytest.mark.parametrize("batches", [1, 3, 50])
def test_batches_and_their_order_do_not_matter(batches):
    rows = torch.randn(150, 40, generator=torch.Generator().manual_seed(1))
    one, other = moment_of(rows, 12), moment_of(rows.flip(0), 12, batches)
    torch.testing.assert_close(projector(one.directions(4)[1]), projector(other.directions(4)[1]), rtol=0, atol=1e-10)


def test_two_looks_are_near_the_optimum_where_one_is_not():
    """A spectrum with the long tail that inputs of a language model have."""
    generator = torch.Generator().manual_seed(2)
    spectrum = torch.arange(1, 257).float().rsqrt()
    rows = torch.randn(2000, 256, generator=generator) * spectrum
    best = energy_along(rows, exact(rows, 12)[1]).sum()
    first = moment_of(rows[::10], 56)
    one = energy_along(rows, first.directions(12)[1]).sum() / best
    two = energy_along(rows, moment_of(rows, 56, probe=first.better_probe()).directions(12)[1]).sum() / best
    assert one < 0.95 and 0.97 < two <= 1 + 1e-9, (one, two)


def test_a_better_probe_misses_nothing_that_the_first_rows_lacked():
    rows = rows_of(30, 64, 6, seed=3)
    probe = moment_of(rows[:2], 8).better_probe()
    _, basis = moment_of(rows, 8, probe=probe).directions(8)
    assert basis.shape[1] == 6
    assert (rows.double() - rows.double() @ projector(basis)).abs().max() < 1e-5 * rows.abs().max()


def test_nothing_seen_and_fewer_rows_than_directions():
    moment = SecondMoment(random_probe(10, 6))
    assert moment.directions(4)[1].shape == (10, 0)
    moment.update(torch.eye(10)[:2])
    assert moment.directions(4)[1].shape == (10, 2) and moment.energy == 2


def test_light_rows_come_last_and_are_still_found():
    moment = SecondMoment(random_probe(16, 8))
    moment.update(torch.eye(16)[:3].repeat(5, 1))
    moment.update(torch.eye(16)[3:4], weight=1e-6)
    values, basis = moment.directions(8)
    assert values.tolist() == pytest.approx([5, 5, 5, 1e-6], rel=1e-6) and abs(basis[3, 3]) == pytest.approx(1)
