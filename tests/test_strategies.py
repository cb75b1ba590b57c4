"""Strategies, the bias bound, the trust region, and which eigenvalues stand out of white noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo2_trl.engine.significance import _edge, noise_edge, significant_rank
from nspo2_trl.engine.strategies import limit_bias, select, split_rank, trust_alpha


def steady(steps, rows):
    """Every step was learned from: (age, rows) of each."""
    return [(age, rows) for age in range(steps)]


def count_significant(seed, rows, steps, dim, decay, single, spikes=()):
    """Rank found in a decayed covariance of noise that is white but for `spikes` (variances of the first axes)."""
    torch.manual_seed(seed)
    scale = torch.ones(dim)
    scale[: len(spikes)] = torch.tensor(spikes).sqrt()
    samples = torch.randn(steps + 1, rows, dim) * scale
    noise = (samples[1:] - samples[:-1]) / 2**0.5 if single else samples[1:]
    weighted = (noise * (decay ** torch.arange(steps - 1, -1, -1.0)).sqrt()[:, None, None]).flatten(0, 1)
    small = weighted @ weighted.T if len(weighted) < dim else weighted.T @ weighted
    values = torch.linalg.eigvalsh(small.double()).flip(0)[None, :16]
    edge = noise_edge(dim, min(16, dim // 2), steady(steps, rows), decay, single)
    return significant_rank(values, weighted.square().sum()[None], edge).item()


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("rows, steps, dim, decay", [(3, 10, 200, 0.97), (3, 150, 1000, 0.97), (5, 80, 60, 0.9)])
def test_white_noise_is_not_significant(rows, steps, dim, decay, single):
    found = [count_significant(seed, rows, steps, dim, decay, single) for seed in range(20)]
    assert sum(found) <= 3  # the bound lets a white block through now and then


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("rows, steps, dim", [(3, 60, 200), (3, 150, 60)])
def test_planted_spikes_are_counted(rows, steps, dim, single):
    spike = 6 * (1 + math.sqrt(dim / (rows * min(steps, 33))))  # well above the detection edge 1 + sqrt(d / n)
    for seed in range(10):
        assert count_significant(seed, rows, steps, dim, 0.97, single, [3 * spike, 2 * spike, 2 * spike]) in (3, 4)


def test_a_spike_below_the_detection_edge_is_left_alone():
    assert sum(count_significant(seed, 3, 10, 1000, 0.97, False, [2.0]) for seed in range(20)) <= 3


@pytest.mark.parametrize("overlapping", [False, True])
def test_the_edge_of_a_long_memory_is_found_fast_and_right(overlapping):
    """Beyond 256 steps several are taken as one; that hardly moves the edge, and decay 0.9999 is no trouble."""
    ages, rows = zip(*steady(600, 3))
    coarse, fine = noise_edge(500, 4, steady(600, 3), 0.99, overlapping), _edge(500, 4, ages, rows, 0.99, overlapping)
    assert torch.allclose(coarse, fine, rtol=0.02)
    slow, slower = (noise_edge(500, 1, steady(10**5, 3), decay, overlapping).item() for decay in (0.999, 0.9999))
    assert 1 / 500 < slower < slow


def test_the_edge_without_decay_is_marchenko_and_pastur():
    dim, rows = 400, 100
    edge = noise_edge(dim, 1, steady(1, rows), 0.0, False).item()
    plain = (math.sqrt(rows) + math.sqrt(dim)) ** 2 / (rows * dim)
    assert plain < edge < 1.1 * plain  # the Tracy-Widom margin comes on top


@given(rank=st.integers(0, 32))
def test_hybrid_is_half_and_half(rank):
    plain, orthogonal = split_rank("hybrid", torch.tensor([rank]))
    assert plain + orthogonal == rank and 0 <= plain - orthogonal <= 1


@given(seed=st.integers(0, 1000), target=st.floats(0.01, 0.9), strategy=st.sampled_from(["noise", "hybrid"]))
@settings(max_examples=60)
def test_bias_limit_is_the_largest_rank_that_holds(seed, target, strategy):
    torch.manual_seed(seed)
    reference = torch.randn(1, 1, 8, dtype=torch.float64)
    norm = (reference.square().sum() + torch.rand(1, dtype=torch.float64) * 8).reshape(1)

    def bias(rank):
        plain = split_rank(strategy, torch.tensor([rank]))[0].item()
        return 1 - math.sqrt(max(0.0, 1 - float(reference[0, 0, :plain].square().sum() / norm)))

    rank = limit_bias(strategy, torch.tensor([8]), reference, norm, target).item()
    assert bias(rank) <= target + 1e-12
    assert rank == 8 or bias(rank + 1) > target


def test_keep_has_no_bias_to_limit():
    assert limit_bias("keep", torch.tensor([5]), torch.ones(1, 1, 8), torch.ones(1), 0.01).item() == 5


@pytest.mark.parametrize("rank, reference, taken", [(3, 0.0, 4), (0, 1.0, 0)])
def test_without_a_reference_or_a_rank_nothing_is_kept(rank, reference, taken):
    found, kept = select("keep", torch.tensor([rank]), torch.full((1, 1, 8), reference))
    assert kept.abs().max() == 0 and found.sum() == taken


@given(
    removed=st.floats(0, 100, allow_subnormal=False),
    norm=st.floats(0, 100, allow_subnormal=False),
    radius=st.floats(1e-3, 2),
    scale=st.sampled_from([1.0, 1e9]),
)
@settings(max_examples=200)
def test_alpha_is_the_largest_that_holds_the_bound(removed, norm, radius, scale):
    both = torch.tensor([[removed, 0.0], [norm, norm]], dtype=torch.float64)
    alpha, idle = trust_alpha(*(both * scale), radius).tolist()
    assert 0 <= alpha <= 1 and idle == 1  # where nothing is removed there is nothing to bound
    assert alpha * removed <= radius * norm * (1 + 1e-9)
    if alpha < 1:
        assert (alpha + 1e-3) * removed > radius * norm
