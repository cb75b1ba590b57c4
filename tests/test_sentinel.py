import logging
import math

import pytest
import torch

from nspo2_trl import NSPO2, NSPO2Config
from nspo2_trl.engine.sentinel import PATIENCE, BiasSentinel

CALM = {"bias": 0.0, "alpha": 1.0}
BIASED = {"bias": 0.2, "alpha": 1.0}


def climb(sentinel, metrics, times):
    """(strategy, share of the rank) after each check."""
    found = []
    for step in range(times):
        sentinel.check(metrics, step)
        found.append((sentinel.strategy, sentinel.rank_share))
    return found


def test_warns_then_lowers_the_rank_then_the_strategy_then_ends(caplog):
    with caplog.at_level(logging.WARNING, logger="nspo2_trl"):
        found = climb(BiasSentinel("noise", 0.05), BIASED, 6)
    assert found == [("noise", 1), ("noise", 0.5), ("hybrid", 0.5), ("keep", 0.5), ("off", 0), ("off", 0)]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 5  # each move once, with its reason
    assert all("bias 0.2 is above target_bias 0.05" in line for line in said)
    assert [line.rsplit("so: ")[1] for line in said] == [
        "a warning.",
        "half the rank.",
        "strategy `hybrid`.",
        "strategy `keep`.",
        "projection off.",
    ]


@pytest.mark.parametrize("strategy, rungs", [("noise", 6), ("hybrid", 5), ("keep", 4)])
def test_recovers_when_the_breach_ends(strategy, rungs):
    sentinel = BiasSentinel(strategy, 0.05)
    climb(sentinel, BIASED, rungs - 1)
    assert sentinel.strategy == "off" and len(sentinel.rungs) == rungs
    climb(sentinel, CALM, 2 * PATIENCE - 1)
    assert sentinel.strategy == "off"
    climb(sentinel, CALM, 1 + 2 * PATIENCE * rungs)
    assert (sentinel.strategy, sentinel.rank_share, sentinel.level) == (strategy, 1, 0)


def test_every_kind_of_breach():
    for first, then, reason in (
        ({}, {"bias": 0.06}, "bias"),
        ({}, {"alpha": 0.1}, "trust region"),
        ({"eval_loss": 0.5}, {"eval_loss": 0.56}, "eval_loss rose"),
        ({"eval_loss": -2.0}, {"eval_loss": -1.7}, "eval_loss rose"),
    ):
        sentinel = BiasSentinel("keep", 0.05)
        assert not sentinel.check(first, 0)
        assert sentinel.check(then, 1), reason
    assert not BiasSentinel("keep", 0.05).check({"eval_loss": math.nan, "bias": math.inf}, 0)


def test_a_noisy_loss_is_smoothed_but_a_rising_one_is_seen():
    torch.manual_seed(0)
    sentinel = BiasSentinel("keep", 0.05)
    for step in range(200):
        sentinel.check({"loss": 1 + 0.2 * torch.randn(()).item()}, step)
    assert sentinel.moves == 0
    for step in range(40):
        sentinel.check({"loss": 1 + 0.05 * step}, step)
    assert sentinel.strategy == "off"


def test_a_bad_evaluation_stands_until_the_next_one():
    sentinel = BiasSentinel("keep", 0.05)
    sentinel.check({"eval_loss": 0.5}, 0)
    sentinel.check({"eval_loss": 0.7}, 1)
    climb(sentinel, CALM, 5 * PATIENCE)
    assert sentinel.level == 1  # logging in between does not make it better
    sentinel.check({"eval_loss": 0.5}, 2)
    climb(sentinel, CALM, PATIENCE)
    assert sentinel.level == 0


def test_off_is_left_again_although_no_filter_reports_a_bias_then():
    """In a run bias and α are absent while the projection is off; that must not keep it off for ever."""
    sentinel = BiasSentinel("keep", 0.05)
    climb(sentinel, BIASED, 3)
    assert sentinel.strategy == "off"
    found = climb(sentinel, {}, 2 * PATIENCE)
    assert found[-1][0] == "keep"


def test_moves_down_wait_until_the_last_remedy_could_show():
    sentinel = BiasSentinel("keep", 0.05, every=10)
    climb(sentinel, BIASED, 25)
    assert sentinel.level == 3  # steps 0, 10 and 20


def test_a_state_of_another_strategy_is_left_aside(caplog):
    noise, keep = BiasSentinel("noise", 0.05), BiasSentinel("keep", 0.05)
    climb(noise, BIASED, 6)
    keep.load_state_dict(noise.state_dict())
    assert keep.level == 0 and "starts anew" in caplog.text


def test_an_engine_that_was_switched_off_comes_back():
    """What was measured of the filter that was taken back must not be reported again and again."""
    torch.manual_seed(0)
    engine = NSPO2(NSPO2Config(strategy="keep", projection_rank=4, min_rank=4, update_freq=2))
    active = []
    for step in range(120):
        engine.hook(torch.randn(40) * torch.tensor([3.0] * 4 + [0.3] * 36))
        engine.step_end({"bias": 1.0} if 20 <= step < 30 else None)
        active.append(engine.is_active)
        if not engine.is_active:
            assert math.isnan(engine.get_metrics()["bias"])
    assert active[19] and not active[29] and active[-1]
    assert engine.sentinel.level == 0


def test_state_survives():
    sentinel, other = BiasSentinel("noise", 0.05), BiasSentinel("noise", 0.05)
    climb(sentinel, BIASED | {"loss": 1.0, "eval_loss": 2.0}, 2)
    other.load_state_dict(sentinel.state_dict())
    assert climb(sentinel, BIASED, 2) == climb(other, BIASED, 2)
    assert sentinel.state_dict() == other.state_dict()


def test_switched_off_it_does_nothing():
    assert climb(BiasSentinel("noise", 0.05, enabled=False), BIASED, 5) == [("noise", 1)] * 5


def test_the_engine_obeys():
    """By hand: a rising loss reported through step_end takes the projection back, a calm one brings it back."""
    torch.manual_seed(0)
    engine = NSPO2(NSPO2Config(strategy="keep", projection_rank=4, min_rank=4, update_freq=2, cov_momentum=0.9))
    ranks, losses = [], [1.0, 1.1] * 10 + [5.0] * 20 + [1.0] * 100
    for loss in losses:
        grad = torch.randn(40) * torch.logspace(1, -1, 40)
        engine.hook(grad)
        engine.step_end({"loss": loss})
        ranks.append((engine.get_metrics()["is_active"], engine.rank_limit))
    assert ranks[19] == (True, 4) and (True, 2) in ranks[20:39] and ranks[39] == (False, 0)
    assert ranks[-1] == (True, 4)
