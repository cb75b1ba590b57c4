"""NSPO2 by hand: `hook` and `step_end` in a loop, against the filter that they stand for."""

import pytest
import torch
from test_filter import config, stream

from nspo2_trl import NSPO2


@pytest.mark.parametrize("n", [1, 3])
def test_as_a_tensor_hook_it_equals_the_filter(n):
    """Any shape. Autograd adds the next micro-batch to the tensor that the hook saw, so that it has to be copied."""
    by_hand, engine = NSPO2(config()), NSPO2(config())
    weight = torch.zeros(2, 3, 4, requires_grad=True)
    weight.register_hook(by_hand.hook)
    for samples in stream(9, n, 1, 24):
        weight.grad = None
        for sample in samples:
            (weight * sample.view(2, 3, 4)).sum().backward()
        by_hand.step_end()
        expected = engine.step(samples, samples.mean(0)).view(2, 3, 4)
        assert torch.allclose(weight.grad / n, expected, atol=1e-5)
    assert by_hand.get_metrics()["step_count"] == 9 and by_hand.get_metrics()["is_active"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("when", [0, 6])
def test_bad_numbers_teach_nothing_and_are_counted(bad, when):
    engine, clean = NSPO2(config()), NSPO2(config())
    for step, samples in enumerate(stream(10, 1, 1, 24)):
        if step == when:
            ill = samples[0].clone()
            ill[0, 0, 3] = bad
            assert engine.hook(ill) is ill
            engine.step_end()
        assert torch.equal(engine.hook(samples[0]), clean.hook(samples[0]))
        engine.step_end()
        clean.step_end()
    assert engine.get_metrics()["skipped_steps"] == 1 and clean.get_metrics()["skipped_steps"] == 0


def test_half_precision_gradients_are_filtered_in_float32():
    engine, reference = NSPO2(config()), NSPO2(config())
    for samples in stream(9, 1, 1, 24):
        half = samples[0].bfloat16()
        got, expected = engine.hook(half), reference.hook(half.float())
        engine.step_end()
        reference.step_end()
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected.bfloat16())


def test_switched_off_it_learns_on():
    engine, reference = NSPO2(config()), NSPO2(config())
    for step, samples in enumerate(stream(9, 1, 1, 24)):
        engine.set_active(step == 8)
        got, expected = engine.hook(samples[0]), reference.hook(samples[0])
        assert torch.equal(got, expected if step == 8 else samples[0])
        for each in (engine, reference):
            each.step_end()
    assert not torch.equal(expected, samples[0]), "the reference filtered nothing"


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="`dim` is 10, but the gradient has 12 entries"):
        NSPO2(config(dim=10)).hook(torch.ones(3, 4))
    engine = NSPO2(config())
    engine.hook(torch.ones(12))
    with pytest.raises(ValueError, match="`dim` is 12, but the gradient has 7 entries"):
        engine.hook(torch.ones(7))


def test_options_are_copied():
    options = config()
    engine = NSPO2(options)
    options["projection_rank"] = 8
    assert engine.config.projection_rank == 4


def test_reset_forgets():
    engine, fresh = NSPO2(config()), NSPO2(config())
    for samples in stream(5, 1, 1, 24):
        engine.hook(samples[0])
        engine.step_end()
    engine.reset()
    for samples in stream(5, 1, 1, 24, seed=1):
        assert torch.equal(engine.hook(samples[0]), fresh.hook(samples[0]))
        engine.step_end()
        fresh.step_end()
