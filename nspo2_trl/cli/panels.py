"""What the panels of a report show."""

from __future__ import annotations

from dataclasses import dataclass


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
    band: str = ""  # key of a standard error
    level: str = ""  # key of a second line, with its value written on it


PANELS = [
    Panel("loss", "Loss", "loss", ("loss", "eval_loss"), by_time=True),
    Panel(
        "accuracy",
        "Accuracy",
        "share of pairs",
        ("rewards/accuracies", "eval_rewards/accuracies"),
        "Pairs whose chosen answer has the higher reward. Held-out pairs before step 1 are left out: all are ties.",
        by_time=True,
    ),
    Panel(
        "margins", "Margins", "reward, chosen − rejected", ("rewards/margins", "eval_rewards/margins"), by_time=True
    ),
    Panel(
        "logps",
        "Likelihood of the chosen",
        "log-probability an answer",
        ("logps/chosen", "eval_logps/chosen"),
        "DPO may lower it while the loss falls.",
        by_time=True,
    ),
    Panel(
        "variance_reduction",
        "Gradient noise removed",
        "share of the noise",
        ("nspo2/variance_reduction",),
        "On samples that the filter had not seen.",
    ),
    Panel("bias", "Bias", "1 − cos(m, m′)", ("nspo2/bias",), "Of the running mean gradient. 0 for keep."),
    Panel(
        "signal_removed",
        "Signal removed",
        "share of ‖E g‖²",
        ("nspo2/signal_removed",),
        "Band: one standard error to each side. Logged only where that is below 0.2.",
        band="nspo2/signal_removed_se",
    ),
    Panel("rank", "Rank", "directions an adapter", ("nspo2/rank",), "Directions removed, mean over adapters."),
    Panel("alpha", "Trust region’s α", "α", ("nspo2/alpha",), "1: the whole projection is let through."),
    Panel(
        "noise_scale",
        "Noise scale",
        "pairs",
        ("nspo2/noise_scale",),
        "More pairs a step still pay while the batch size (thin line) is below the curve. "
        "Logged only where the signal is at least twice its standard error.",
        log=True,
        level="nspo2/batch_size",
    ),
    Panel(
        "skipped_steps",
        "Skipped steps",
        "steps so far",
        ("nspo2/skipped_steps",),
        "NaN or Inf in a gradient: nothing was learned.",
        whole=True,
    ),
    Panel(
        "sentinel_level",
        "Sentinel",
        "rung",
        ("nspo2/sentinel_level",),
        "0 is the boldest; a breach climbs down, to higher rungs.",
        whole=True,
    ),
    Panel("overhead_ms", "Time that NSPO2 takes", "ms a step", ("nspo2/overhead_ms",)),
    Panel("overhead_share", "NSPO2’s share of the time", "share of a training step", ("overhead_share",)),
]
