"""BiasSentinel: watches what the filter does to the run, and takes it back step by step when it does harm."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from ..config import NSPO2Config
from .state import Saved

logger = logging.getLogger(__name__)

ALPHA_LOW = 0.25  # below this the trust region holds back most of what the strategy wants to remove
LOSS_RISE = 0.10  # of a reported loss, smoothed, over its best; for `eval_loss` as it is
LOSS_DECAY = 0.9
PATIENCE = 3  # calm checks until one rung is taken back


def _ladder(strategy: str) -> list[tuple[str, float, str]]:
    """The rungs (strategy, share of the rank, words for the log) from the boldest, where a run starts, to off."""
    order = ["noise", "hybrid", "keep"]
    weaker = order[order.index(strategy) + 1 :]
    rungs = [(strategy, 1.0, "as configured"), (strategy, 1.0, "a warning"), (strategy, 0.5, "half the rank")]
    return [*rungs, *((name, 0.5, f"strategy `{name}`") for name in weaker), ("off", 0.0, "projection off")]


class BiasSentinel(Saved):
    """On a breach it warns once, then lowers the rank, then noise → hybrid → keep, then switches the projection off.

    A check is a breach where the bias is above `target_bias`, the trust region's α is below 0.25, a reported loss
    (smoothed over some ten reports) is more than 10 % and six times its own noise above its best so far, or
    `eval_loss` is more than 10 % above its best. Each check in breach climbs down one rung, each three calm checks
    climb one back up. A figure that was in breach stands so until it is reported anew; while the projection is off
    bias and α are not looked at, so that it is tried again in the end, later each time. A remedy has `every` steps to
    show.
    """

    _NUMBERS = tuple("level calm patience smoothed variance best best_eval moves reports moved_at standing".split())

    def __init__(self, strategy: str, target_bias: float, enabled: bool = True, every: int = 1):
        self.enabled, self.configured, self.target_bias = enabled, strategy, target_bias
        self.every, self.moved_at = every, -math.inf
        self.rungs, self.level = _ladder(strategy), 0
        self.calm, self.patience = 0, PATIENCE
        self.best = self.best_eval = math.inf
        self.smoothed = self.variance = 0.0  # the variance is that of one report around the smoothed loss
        self.moves = self.reports = 0
        self.standing = {"bias": False, "alpha": False, "loss": False, "eval_loss": False}

    @classmethod
    def of(cls, config: NSPO2Config) -> BiasSentinel:
        return cls(config.strategy, config.target_bias, config.sentinel, config.update_freq)

    @property
    def strategy(self) -> str:
        """`noise`, `keep`, `hybrid` or `off`."""
        return self.rungs[self.level][0]

    @property
    def rank_share(self) -> float:
        """Share of the configured rank that may be used."""
        return self.rungs[self.level][1]

    def check(self, metrics: Mapping[str, float], step: int) -> bool:
        """One look at those of `bias`, `alpha`, `loss` and `eval_loss` that are finite; whether the rung changed."""
        if not self.enabled:
            return False
        known = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self.strategy == "off":  # there is no filter that could be biased
            known = {name: value for name, value in known.items() if name not in ("bias", "alpha")}
            self.standing |= {"bias": False, "alpha": False}
        if reasons := self._breaches(known):
            self.calm = 0
            return self._move(1, step, " and ".join(reasons))
        if any(self.standing.values()):
            return False
        self.calm += 1
        if self.calm < self.patience:
            return False
        self.calm = 0
        return self._move(-1, step, f"{self.patience} calm checks")

    def _breaches(self, known: Mapping[str, float]) -> list[str]:
        """Reasons, in words, for which these figures are a breach; notes which of them are."""
        found = {}
        if "bias" in known and known["bias"] > self.target_bias:
            found["bias"] = f"bias {known['bias']:.3g} is above target_bias {self.target_bias:.3g}"
        if "alpha" in known and known["alpha"] < ALPHA_LOW:
            found["alpha"] = f"the trust region lets only {known['alpha']:.2g} of the projection through"
        if "loss" in known:
            noise = (self.variance * (1 - LOSS_DECAY) / (1 + LOSS_DECAY)) ** 0.5  # of the smoothed loss
            self.reports += 1
            off = known["loss"] - self.smoothed
            self.smoothed += max(1 - LOSS_DECAY, 1 / self.reports) * off
            self.variance += max(0.01, 1 / self.reports) * (off**2 * (self.reports > 1) - self.variance)
            if self.smoothed > self.best + max(LOSS_RISE * abs(self.best), 6 * noise):
                found["loss"] = f"the loss rose to {self.smoothed:.4g} from {self.best:.4g}"
            if self.reports * (1 - LOSS_DECAY) >= 1:  # before that it is no average yet
                self.best = min(self.best, self.smoothed)
        if "eval_loss" in known:
            if known["eval_loss"] > self.best_eval + LOSS_RISE * abs(self.best_eval):
                found["eval_loss"] = f"eval_loss rose to {known['eval_loss']:.4g} from {self.best_eval:.4g}"
            self.best_eval = min(self.best_eval, known["eval_loss"])
        self.standing |= {name: name in found for name in self.standing if name in known}
        return list(found.values())

    def _move(self, by: int, step: int, reason: str) -> bool:
        level = min(max(self.level + by, 0), len(self.rungs) - 1)
        if level == self.level or (by > 0 and step - self.moved_at < self.every):
            return False
        if by > 0:
            self.moved_at = step
            if self.rungs[level][0] == "off":  # the next try, with a filter that went too far, comes later
                self.patience *= 2
        self.level = level
        self.moves += 1
        say = logger.warning if by > 0 else logger.info
        say("NSPO2 sentinel, step %d: %s, so: %s.", step, reason, self.rungs[level][2])
        return True

    def state_dict(self) -> dict:
        """Plain numbers."""
        return super().state_dict() | {"strategy": {self.configured: 0}}

    def load_state_dict(self, state: Mapping) -> None:
        """A state saved under another strategy is left aside: its rungs are others."""
        if self.configured in state["strategy"]:
            super().load_state_dict(state)
        else:
            logger.warning("NSPO2 sentinel: the strategy was changed to `%s`, so it starts anew.", self.configured)
