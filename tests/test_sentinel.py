"""The ladder that the sentinel climbs down on a breach, and up again when it is over."""

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
    assert climb(BiasSentinel("noise", 0.05, enabled=False), BIASED, 5) == [("noise", 1)] * 5


@pytest.mark.parametrize("calm", [CALM, {}], ids=["calm", "nothing measured"])  # while off there is no bias to see
@pytest.mark.parametrize("strategy, rungs", [("noise", 6), ("hybrid", 5), ("keep", 4)])
def test_recovers_when_the_breach_ends(strategy, rungs, calm):
    sentinel = BiasSentinel(strategy, 0.05)
    climb(sentinel, BIASED, rungs - 1)
    assert sentinel.strategy == "off"
    climb(sentinel, calm, 2 * PATIENCE - 1)
    assert sentinel.strategy == "off"
    climb(sentinel, calm, 1 + 2 * PATIENCE * rungs)
    assert (sentinel.strategy, sentinel.rank_share, sentinel.level) == (strategy, 1, 0)


@pytest.mark.parametrize(
    "first, then, breach",
    [
        ({}, {"bias": 0.06}, True),
        ({}, {"alpha": 0.1}, True),
        ({"eval_loss": 0.5}, {"eval_loss": 0.56}, True),
        ({"eval_loss": -2.0}, {"eval_loss": -1.7}, True),
        ({}, {"eval_loss": math.nan, "bias": math.inf}, False),
    ],
)
def test_what_is_a_breach(first, then, breach):
    sentinel = BiasSentinel("keep", 0.05)
    assert not sentinel.check(first, 0)
    assert bool(sentinel.check(then, 1)) == breach


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
    for loss, level in ((0.5, 0), (0.7, 1), (0.5, 0)):
        sentinel.check({"eval_loss": loss}, 0)
        climb(sentinel, CALM, 5 * PATIENCE)  # logging in between does not make it better
        assert sentinel.level == level


def test_moves_down_wait_until_the_last_remedy_could_show():
    sentinel = BiasSentinel("keep", 0.05, every=10)
    climb(sentinel, BIASED, 25)
    assert sentinel.level == 3  # steps 0, 10 and 20


def test_state(caplog):
    sentinel, other, keep = BiasSentinel("noise", 0.05), BiasSentinel("noise", 0.05), BiasSentinel("keep", 0.05)
    climb(sentinel, BIASED | {"loss": 1.0, "eval_loss": 2.0}, 2)
    other.load_state_dict(sentinel.state_dict())
    assert climb(sentinel, BIASED, 2) == climb(other, BIASED, 2)
    assert sentinel.state_dict() == other.state_dict()
    keep.load_state_dict(sentinel.state_dict())
    assert keep.level == 0 and "starts anew" in caplog.text


@pytest.mark.parametrize("breach", [{"bias": 1.0}, {"loss": 5.0}])
def test_an_engine_obeys_and_comes_back(breach):
    """What was measured of the filter that was taken back must not be reported again and again."""
    torch.manual_seed(0)
    engine = NSPO2(NSPO2Config(strategy="keep", projection_rank=4, min_rank=4, update_freq=2, cov_momentum=0.9))
    ranks = []
    for step in range(140):
        engine.hook(torch.randn(40) * torch.logspace(1, -1, 40))
        engine.step_end(breach if 20 <= step < 40 else {"loss": 1.0 + step % 2 / 10})
        metrics = engine.get_metrics()
        ranks.append((metrics["is_active"], engine.rank_limit))
        assert metrics["is_active"] or math.isnan(metrics["bias"])
    assert ranks[19] == (True, 4) and (True, 2) in ranks[20:39] and ranks[39] == (False, 0)
    assert ranks[-1] == (True, 4) and engine.sentinel.level == 0
