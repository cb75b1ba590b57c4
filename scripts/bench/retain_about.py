"""What a study of `retain` ran, in words: steps, what is measured, and what the methods cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .retain_methods import METHODS

STEPS = {
    "dpo": "steps of 12 pairs",
    "kto": "steps of KTO on the answers of 12 pairs",
    "sft": "steps of SFT on 12 chosen answers, whose loss per token on held-out pairs is the loss here,",
}


def words(about: dict) -> str:
    """What a study ran, and what the KL term takes of a step."""
    runs = [run for run in about["runs"] if run["retain_ms"]]
    steps = f"{about['steps']} {STEPS[about.get('trainer', 'dpo')]}"
    text = f"{steps} at rate {about['learning_rate']:g}, LoRA rank 16 on all linear layers. "
    text += (
        f"Measured on {about['held_out']} held-out pairs and at most {about['chunks']} pieces of text of each kind."
    )
    if about.get("judge") == "gold":
        text += " The loss here is minus the mean gold score of fresh answers to the prompts of these pairs."
    if runs:
        share = statistics.median(run["retain_ms"] / run["step_time"] / 1000 for run in runs)
        text += f" The KL term takes {share:.0%} of a step (median of {len(runs)} runs)."
    return f"{text} {times(about['runs'])}".strip()


def cost(runs: Sequence[dict], k: float = 0.0) -> dict[str, float]:
    """The processor time of each method's training as a share of plain's of the same seed, median over seeds.

    Args:
        k: seconds that are added to each.
    """
    seconds = {tuple(run["adapter"].rsplit("-s", 1)): run["seconds"] for run in runs if run["seconds"]}
    shares: dict[str, list[float]] = {}
    for (method, seed), own in seconds.items():
        if ("plain", seed) in seconds:
            shares.setdefault(method, []).append((own + k) / seconds["plain", seed])
    return {name: statistics.median(own) for name, own in sorted(shares.items())}


def times(runs: Sequence[dict]) -> str:
    found = [f"{METHODS[name].words} {share:.2f}" for name, share in cost(runs).items() if name != "plain"]
    if not found:
        return ""
    return f"Processor time of training as a share of plain's (median over seeds): {'; '.join(found)}."
