"""Directions of a factored covariance by width: equal state, and what is saved loads again."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nspo2_trl import create_nspo2_optimizer
from nspo2_trl.config import NSPO2Config
from nspo2_trl.engine.filter import NoiseFilter
from nspo2_trl.layout.blocks import Block, units
from nspo2_trl.projections.noise import NoiseProjection
from nspo2_trl.projections.protocol import Step
from nspo2_trl.projections.ranks import config_for, mean_width
from nspo2_trl.training.options import trainer_config

OPTIONS = {"covariance": "factored", "projection_rank": 8, "max_rank": 10, "update_freq": 2}


@given(st.lists(st.integers(2, 5000), min_size=1, max_size=20), st.integers(0, 64), st.integers(0, 64))
def test_all_widths_have_equal_state(widths, rank, more):
    config = NSPO2Config(covariance="factored", projection_rank=rank, max_rank=max(1, rank + more))
    mean = sum(widths) / len(widths)
    for width in widths:
        found = config_for(config, width, mean)
        assert found.max_rank >= found.projection_rank and (found.projection_rank > 0) == (rank > 0)
        assert found.max_rank > found.projection_rank or more == 0  # `keep` takes one more of whole blocks
        floats = found.max_rank * width
        few = found.max_rank in (1, found.projection_rank + 1)
        assert abs(floats - config.max_rank * mean) <= width / 2 + 1e-6 or few
    assert config_for(config, 7, 7.0) == config


@pytest.mark.parametrize("config, mean", [(NSPO2Config(covariance="adapter"), 50.0), (trainer_config(), math.inf)])
def test_ranks_stay_as_asked_for(config, mean):
    assert dict(config_for(config, 10, mean)) == dict(config)


def test_the_sentinel_halves_what_a_small_block_may_lose():
    engine = NoiseFilter(NSPO2Config(projection_rank=40, max_rank=50, update_freq=1))
    for _ in range(3):
        samples = torch.randn(4, 1, 4, 16)
        engine.step(samples, samples.mean(0))
    assert engine.rank_limit == 8
    engine.sentinel.level = 2
    assert engine.sentinel.rank_share == 0.5 and engine.rank_limit == 4


def projection(blocks, width=None):
    """A filter of `blocks`; `width` as one of before this version had it."""
    found = NoiseProjection(blocks, NSPO2Config(**OPTIONS))
    if width is not None:
        found.width = width
        found.filters = [found._filter(stack) for stack in found.stacks]
    return found


def blocks():
    torch.manual_seed(0)
    shapes = [((4, 60), (20, 4)), ((4, 60), (120, 4))]
    return [Block(f"m{i}", [nn.Parameter(torch.randn(shape)) for shape in pair]) for i, pair in enumerate(shapes)]


def steps(noise, number):
    generator = torch.Generator().manual_seed(number)
    params = [p for stack in noise.stacks for p in (place.param for place in stack.places)]
    for _ in range(number):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        samples = [stack.buffer(3).normal_(generator=generator) for stack in noise.stacks]
        noise.read_grads()
        noise.before_step(Step(samples))
        noise.after_step()
    return [p.grad.clone() for p in params]


def test_narrow_matrices_get_more_directions_and_a_saved_state_goes_on():
    ours = blocks()
    assert mean_width(units(ours, "factored")) == 65
    for width, ranks in ((None, {60: 9, 20: 26, 120: 4}), (math.inf, {60: 8, 20: 8, 120: 8})):
        first = projection(ours, width)
        assert {s.shape[1]: part.config.projection_rank for s, part in zip(first.stacks, first.filters)} == ranks
        steps(first, 12)
        saved = first.state_dict()
        if width is not None:
            del saved["width"]  # as it was saved before
        second = projection(ours)
        second.load_state_dict(saved)
        for a, b in zip(steps(first, 7), steps(second, 7)):
            assert torch.equal(a, b)


def test_what_is_unfrozen_later_is_saved_with_the_ranks_it_got():
    """The ranks of all stacks are in proportion to the widths at the start, also after a group was added."""

    def make():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 60)), nn.Parameter(torch.randn(20, 4))]
        late = nn.Parameter(torch.randn(4, 300))
        return params, late, create_nspo2_optimizer(params, torch.optim.AdamW, {"lr": 1e-3}, NSPO2Config(**OPTIONS))

    def train(params, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for _ in range(number):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    params, late, optimizer = make()
    train(params, optimizer, 6)
    optimizer.add_param_group({"params": [late]})
    train([*params, late], optimizer, 6)
    others, later, fresh = make()
    fresh.add_param_group({"params": [later]})
    with torch.no_grad():
        for mine, theirs in zip([*others, later], [*params, late]):
            mine.copy_(theirs)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, opt in (([*params, late], optimizer), ([*others, later], fresh)):
        train(own, opt, 5)
    for mine, theirs in zip([*others, later], [*params, late]):
        assert torch.equal(mine, theirs)
