"""Run: what a training run left behind, read from its trainer_state.json and its checkpoints' NSPO2 state."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from statistics import stdev
from typing import Any

from ..metrics import VANISHED
from ..training.checkpoints import NSPO2_STATE_NAME, PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME, checkpoints

SPECTRA = 5  # checkpoints whose spectrum is read, at most
PLAIN = ("nspo2/step_time", "nspo2/batch_size")  # logged without NSPO2 too


@dataclass
class Run:
    """The log of one run.

    Parameters:
        name: for people. index: its place among the runs of a page.
        steps: of training done.
        train: log entries of training. evals: of evaluations.
        clock: (step, seconds of training up to it), from (0, 0) on; empty where that was not logged.
        spectra: (step, eigenvalues as shares of the noise) at some of its steps, as in its checkpoints.
        notes: sentences on what is missing.
    """

    name: str
    index: int
    steps: float
    train: list[dict]
    evals: list[dict]
    clock: list[tuple[float, float]] = field(default_factory=list)
    spectra: list[tuple[int, list[float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values, NaN where an entry has none or one that is not finite."""
        entries = self.evals if key.startswith("eval_") else self.train
        return [entry["step"] for entry in entries], [number(entry.get(key)) for entry in entries]

    def has(self, key: str) -> bool:
        return any(math.isfinite(value) for value in self.series(key)[1])

    def mean(self, key: str) -> float:
        """Of what was logged; NaN where nothing was."""
        values = [value for value in self.series(key)[1] if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    def last(self, key: str) -> float:
        return (self.series(key)[1] or [math.nan])[-1]

    def seconds_at(self, step: float) -> float:
        """Seconds of training up to a step: at an even pace between log entries, after the last one at its pace."""
        after = min(max(1, bisect_left(self.clock, (step,))), len(self.clock) - 1)
        (start, seconds), (end, total) = self.clock[after - 1 : after + 1]
        return seconds + (step - start) * (total - seconds) / (end - start)


def number(value: Any) -> float:
    """`value` of a log entry; NaN for what is no finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else math.nan


def unit_of(seconds: float) -> tuple[int, str]:
    """The unit, in seconds, that a time of this length is best read in, and its symbol."""
    return (1, "s") if seconds < 180 else (60, "min") if seconds < 180 * 60 else (3600, "h")


# ---- reading ----


def read(path: Path, name: str, index: int = 0) -> Run:
    """The run of an output_dir or a trainer_state.json.

    Raises:
        ValueError, OSError: there is none to be read; the message says what to do.
    """
    file = _state_file(path)
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        entries = [dict(entry) for entry in state["log_history"] if math.isfinite(number(entry.get("step")))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(file)!r} is no whole trainer_state.json ({type(error).__name__}: {error}): give the one in a "
            "checkpoint-* folder of the run."
        ) from None
    run = of(entries, name, index, number(state.get("global_step")))
    if not run.train and not run.evals:
        raise ValueError(f"{str(file)!r} has no loss in its log: log more often (`logging_steps`), or train longer.")
    inside = file.parent.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    found = checkpoints(file.parent.parent if inside else file.parent)
    _add_spectra(run, [(step, folder / NSPO2_STATE_NAME) for step, folder in found if step <= run.steps])
    if found and found[-1][0] > run.steps and not inside:
        run.notes.append(
            f"{found[-1][1].name} goes further than the log drawn here: give its {TRAINER_STATE_NAME} to see it."
        )
    return run


def of(entries: Sequence[dict], name: str, index: int = 0, steps: float = 0) -> Run:
    """The run of a log: what is in it, of at least `steps` steps."""
    run = Run(name, index, steps, [e for e in entries if "loss" in e], [e for e in entries if "eval_loss" in e])
    run.steps = max([*(entry["step"] for entry in [*run.train, *run.evals]), steps])
    bad = [(e["step"], k) for e in entries for k, v in e.items() if isinstance(v, float) and not math.isfinite(v)]
    if bad:
        step, key = bad[0]
        run.notes.append(f"NaN or infinite and left out: {len(bad)} logged values, the first {key} at step {step:g}.")
    at, norms = run.series("nspo2/grad_norm_raw")
    largest = accumulate(norms, lambda so_far, norm: norm if norm > so_far else so_far, initial=0.0)
    gone = [step for step, norm, most in zip(at, norms, largest) if norm < VANISHED * most]
    if gone:
        run.notes.append(f"the gradient had vanished at step {gone[0]:g}: from then on no share of noise removed.")
    _add_times(run)
    return run


def average(runs: Sequence[Run], name: str, index: int = 0) -> Run:
    """Means over runs that logged at the same steps, such as seeds, and as KEY_se their standard errors."""

    def means(logs: Iterable[list[dict]]) -> Iterator[dict]:
        for entries in zip(*logs):
            found = {"step": entries[0]["step"]}
            for key in set.intersection(*map(set, entries)) - {"step"}:
                values = [number(entry[key]) for entry in entries]
                found[key] = sum(values) / len(values)
                if len(values) > 1 and math.isfinite(found[key]):
                    found[f"{key}_se"] = stdev(values) / math.sqrt(len(values))
            yield found

    entries = [*means(run.train for run in runs), *means(run.evals for run in runs)]
    run = of(entries, name, index, max(run.steps for run in runs))
    run.spectra = runs[0].spectra
    return run


def _state_file(path: Path) -> Path:
    """The trainer_state.json of a run: its own, else the one of its last checkpoint."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}: give the output_dir of a run.")
    if path.is_file():
        return path
    for folder in (path, *(folder for _, folder in reversed(checkpoints(path)))):
        file = folder / TRAINER_STATE_NAME
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{str(path)!r} has no {TRAINER_STATE_NAME}: either the run has not saved a checkpoint yet (`save_steps`), "
        "or this is not its output_dir."
    )


def has_run(path: Path) -> bool:
    """Whether a trainer_state.json is there to be read."""
    try:
        return bool(_state_file(path))
    except FileNotFoundError:
        return False


def _add_times(run: Run) -> None:
    """`clock`, and to every log entry NSPO2's share of a step's time, which is in no log."""
    steps, times = run.series("nspo2/step_time")
    if not times or not all(time > 0 for time in times):
        run.notes.append("the times of its steps were not (all) logged, so it is not in the plots against time.")
        return
    run.clock = [(0, 0.0)]
    for entry, step, time in zip(run.train, steps, times):
        entry["overhead_share"] = number(entry.get("nspo2/overhead_ms")) / 1000 / time
        last, seconds = run.clock[-1]
        if step > last:
            run.clock.append((step, seconds + time * (step - last)))
    if len(run.clock) == 1:
        run.clock = []


def _add_spectra(run: Run, states: list[tuple[int, Path]]) -> None:
    if not any(key.startswith("nspo2/") and key not in PLAIN for entry in run.train for key in entry):
        run.notes.append("nothing of NSPO2 is in its log: it was plain DPO.")
        return
    found = [(step, file) for step, file in states if file.is_file()]
    if not found:
        run.notes.append(f"it has no checkpoint with an {NSPO2_STATE_NAME}, so it is not in the plot of eigenvalues.")
    for i in sorted({round(i * (len(found) - 1) / (SPECTRA - 1)) for i in range(SPECTRA if found else 0)}):
        step, file = found[i]
        try:
            shares = spectrum(file)
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError):
            run.notes.append(f"{file.parent.name}/{file.name} could not be read, so its eigenvalues are not drawn.")
            continue
        if any(math.isfinite(share) for share in shares):
            run.spectra.append((step, shares))


def spectrum(file: Path) -> list[float]:
    """Tracked eigenvalues in a saved state as shares of the noise, mean over blocks, largest first; NaN for 0."""
    import torch

    from ..engine import sums

    groups = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["groups"]  # may be gigabytes
    states = [group["cov"] for group in groups.values() if "cov" in group]
    shares = sums.spectrum([state["values"] for state in states], [state["traces"][0] for state in states])
    return [share if share > 0 else math.nan for share in shares]


def labels(paths: Sequence[Path]) -> list[str]:
    """Names of the runs' folders; where two have the same, their paths as given."""
    names = [(path.parent if path.is_file() else path).resolve().name for path in paths]
    return [name if name and names.count(name) == 1 else str(path) for name, path in zip(names, paths)]
