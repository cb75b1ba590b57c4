"""What a run showed about its noise, in figures and in sentences that a person can act on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, RewardTrainer

from ..engine.gauge import Reading, read, sums_of
from ..projections.noise import NoiseProjection

SHOWN = 3  # names of modules in a sentence
MOST = 0.8  # share of the signal that counts as "most"


def noise_summary(trainer: Trainer) -> dict[str, Any]:
    """What NSPO2 measured in a trainer's run: noise scale, the batch up to which more pays, shares of the modules.

    Any trainer with NSPO2, also one of [`attach_nspo2`]; with `nspo2_projection_rank=0` nothing but measuring is done.
    It waits for the device; with several processes each has the same figures.

    Returns:
        numbers, strings, lists and None only, see [`summarize_run`]; `print("\\n".join(found["sentences"]))`.

    Raises:
        ValueError: the trainer has no NSPO2.
    """
    noise = getattr(trainer, "nspo2", None)
    if noise is None:
        raise ValueError("This trainer has no NSPO2: set `nspo2_enabled=True`, or call `attach_nspo2(trainer)` first.")
    args, unit = trainer.args, "examples"
    if isinstance(trainer, (DPOTrainer, RewardTrainer)):
        unit = "pairs"
    elif isinstance(trainer, GRPOTrainer):
        unit = "completions"
    logs = [entry for entry in trainer.state.log_history if "nspo2/step_time" in entry]
    batch, seconds = args.train_batch_size * args.gradient_accumulation_steps * args.world_size, None
    if logs:  # of what ran, which may be another batch than the arguments say
        batch = statistics.median(entry["nspo2/batch_size"] for entry in logs)
        seconds = statistics.median(entry["nspo2/step_time"] for entry in logs)
    return summarize_run(noise, round(batch), unit, trainer.state.global_step, seconds)


def summarize_run(noise: NoiseProjection, batch: int, unit: str, steps: int, step_time: float | None) -> dict:
    """The same from its parts.

    Args:
        noise: what measured. batch: examples per step. unit: what they are called. steps: of training.
        step_time: seconds per step, None where they are not known.

    Returns:
        `noise_scale`, `first_third`, `last_third`: each with `value`, `error`, `at_least`, the first two None without
        evidence. `parts`: the noise scale of parts of the run. `modules`: of each, by name, its shares of `signal`
        (`signal_error`) and `noise`. `steps_wanted`: that would do, None where there are enough. `batch`, `unit`,
        `steps`, `step_time`, `critical_step_time`, and the three `sentences`.
    """
    found: dict[str, Any] = {"batch": batch, "unit": unit, "steps": steps, "step_time": step_time}
    gauges = [part.gauge for part in noise.filters if part.gauge is not None]
    whole, parts, modules = None, [], []
    if gauges:
        sums, counts = sums_of(gauges)
        total, third = sums.sum(2), max(1, round(len(sums) / 3))
        whole = read(total, counts)
        ends = [read(total[cut], counts[cut]) for cut in (slice(third), slice(-third, None))]
        sixth = max(1, math.ceil(len(sums) / 6))
        parts = [read(total[i : i + sixth], counts[i : i + sixth]) for i in range(0, len(sums), sixth)]
        modules = _modules(noise, sums, counts, whole) if whole else []
    first, last = (_figure(part, batch) for part in (ends if gauges else (None, None)))
    found |= {"noise_scale": _figure(whole, batch), "first_third": first, "last_third": last}
    found |= {"parts": [_figure(part, batch) for part in parts], "modules": modules}
    known = whole is not None and whole.known
    found["steps_wanted"] = None if known else _rounded_up(whole.wanted * steps / whole.steps if whole else 4 * 16)
    found["critical_step_time"] = step_time and known and step_time * found["noise_scale"]["value"] / batch or None
    found["sentences"] = [_batch_now(found), _what_pays(found), _who_learns(found)]
    return found


def _figure(reading: Reading | None, batch: int) -> dict | None:
    """A noise scale in examples."""
    if reading is None:
        return None
    value = batch * reading.scale if reading.known else None
    error = value and value * reading.error
    return {"value": value, "error": error, "at_least": max(0.0, batch * reading.at_least)}


def _modules(noise: NoiseProjection, sums: torch.Tensor, counts: torch.Tensor, whole: Reading) -> list[dict]:
    """Each module's shares of signal and noise, the largest signal first; what was added on the way is left out."""
    filters = [(stack, part.gauge) for stack, part in zip(noise.stacks, noise.filters) if part.gauge]
    most = max(gauge.steps for _, gauge in filters)
    names = [name for stack, gauge in filters if gauge.steps == most for name in stack.names]
    columns: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        columns.setdefault(name.split(":")[0].removeprefix("base_model.model."), []).append(i)
    found = []
    for name, own in columns.items():
        reading = read(sums[:, :, own].sum(2), counts)
        assert reading is not None  # as the whole has one
        entry = {"name": name, "signal": reading.signal / whole.signal}
        entry |= {"signal_error": reading.signal_error / abs(whole.signal), "noise": reading.noise / whole.noise}
        found.append(entry)
    return sorted(found, key=lambda entry: -entry["signal"])


# ---- the sentences ----


def told(figure: dict | None) -> str:
    """A noise scale in words: with its standard error, or what it is above."""
    if figure is None:
        return "not known"
    if figure["value"] is None:
        return f"above {figure['at_least']:,.0f}"
    return f"{figure['value']:,.0f} ± {figure['error']:,.0f}"


def _rounded_up(steps: float) -> int:
    """To two digits."""
    size = 10 ** max(0, math.floor(math.log10(max(steps, 1))) - 1)
    return math.ceil(steps / size) * size


def _not_enough(found: dict) -> str:
    return f"not enough steps to tell: of {found['steps']} now, about {found['steps_wanted']:,} would do"


def _batch_now(found: dict) -> str:
    batch, unit, scale = found["batch"], found["unit"], found["noise_scale"]
    words = f"The batch now is {batch} {unit} per step; "
    if found["steps_wanted"]:
        return f"{words}{_not_enough(found)}" + (f" (the noise scale is {told(scale)})." if scale else ".")
    first, last = found["first_third"], found["last_third"]
    moved = f"{told(first)} in the first third of the run, {told(last)} in the last"
    return f"{words}the noise scale is {told(scale)} {unit} ({moved})."


def _what_pays(found: dict) -> str:
    batch, unit, seconds = found["batch"], found["unit"], found["step_time"]
    now = f"{seconds:.3g} s" if seconds else "an unknown time"
    if found["steps_wanted"]:
        least = found["noise_scale"] and found["noise_scale"]["at_least"] or 0
        pays = f"more {unit} per step pay, up to at least {least:,.0f}; " if least > batch else ""
        return f"Up to which batch more {unit} per step pay: {pays}{_not_enough(found)}; a step takes {now} now."
    scale = found["noise_scale"]["value"]
    then = f"{found['critical_step_time']:.3g} s on the same machine" if seconds else "longer in proportion"
    if scale <= batch:
        return (
            f"More {unit} per step than the {batch} of now do not pay: {scale:,.0f} would do, and a step would take "
            f"{then} instead of {now}."
        )
    steps, examples = 2 / (1 + scale / batch), 2 / (1 + batch / scale)  # McCandlish et al. 2018, eq. 2.11
    return (
        f"More {unit} per step pay up to about {scale:,.0f} (the critical batch): a step would take {then} instead of "
        f"{now}, and a run {steps:.2g} times the steps and {examples:.2g} times the {unit} to get as far."
    )


def _who_learns(found: dict) -> str:
    modules = found["modules"]
    if found["steps_wanted"]:
        return f"Which modules learn: {_not_enough(found)}."
    shown = [entry for entry in modules if entry["signal"] >= 2 * entry["signal_error"]]
    silent = [entry for entry in modules if entry["signal"] < 2 * entry["signal_error"]]
    most, share = 0, 0.0
    while most < len(shown) and share < MOST:
        share += shown[most]["signal"]
        most += 1
    words = f"{most} of {len(modules)} modules have {share:.0%} of the signal ({_some(shown[:most])})"
    if not shown:
        words = "No single module's signal stands out of the noise"
    if not silent:
        return f"{words}; each module's signal is shown."
    silent.sort(key=lambda entry: -entry["noise"])
    noise = sum(entry["noise"] for entry in silent)
    return f"{words}; {len(silent)} only add noise as far as is shown, {noise:.0%} of it ({_some(silent)})."


def _some(entries: Sequence[dict]) -> str:
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return ", ".join(_short(entry["name"]) for entry in entries[:SHOWN]) + more


def _short(name: str) -> str:
    """`layers.3.q_proj` of `model.layers.3.self_attn.q_proj`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join([*parts[numbers[-1] - 1 : numbers[-1] + 1], parts[-1]]) if numbers else name
