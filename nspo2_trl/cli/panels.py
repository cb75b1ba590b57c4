"""What the panels of a report show; names, meanings and units of NSPO2's figures are those of [`METRICS`]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..metrics import METRICS


@dataclass
class Panel:
    """What one panel shows: `lines` are keys of log entries, those of evaluations begin with `eval_`."""

    key: str
    title: str
    label: str
    lines: tuple[str, ...]
    caption: str = ""
    by_time: bool = False  # drawn against time too; other panels' axes begin at 0
    log: bool = False
    whole: bool = False  # values are counts
    level: str = ""  # key of a second line, with its value written on it


def _learning(key: str, title: str, label: str, name: str, caption: str = "") -> Panel:
    return Panel(key, title, label, (name, f"eval_{name}"), caption, by_time=True)


def _metric(name: str, **look: Any) -> Panel:
    words, unit = METRICS[name]
    title = name.replace("_", " ").capitalize()
    return Panel(name, title, unit, (f"nspo2/{name}",), f"{words[0].upper()}{words[1:]}.", **look)


TIES = "Pairs whose chosen answer has the higher reward. Held-out pairs before step 1 are left out: all are ties."
PANELS = [
    _learning("loss", "Loss", "loss", "loss"),
    _learning("accuracy", "Accuracy", "share of pairs", "rewards/accuracies", TIES),
    _learning("margins", "Margins", "reward, chosen − rejected", "rewards/margins"),
    _learning(
        "logps",
        "Likelihood of the chosen",
        "log-probability per answer",
        "logps/chosen",
        "DPO may lower it while the loss falls.",
    ),
    *(_metric(name) for name in ("variance_reduction", "bias", "signal_removed", "rank", "alpha")),
    _metric("noise_scale", log=True, level="nspo2/batch_size"),
    _metric("skipped_steps", whole=True),
    _metric("sentinel_level", whole=True),
    _metric("overhead_ms"),
    Panel("overhead_share", "Share of the time", "share of a training step", ("overhead_share",), "Of NSPO2."),
]
