"""Time of a training step, and time that NSPO2 adds to it, without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback


class Stopwatch:
    """Adds up the time spent inside `with stopwatch:`, on a CPU wall time.

    On CUDA kernels run later than they are launched: a pair of events brackets each passage and is read when the total
    is asked for; gaps in which the device waits for the host count too.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, ...]] = []

    def __enter__(self) -> Stopwatch:
        if self.cuda:
            self.events.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
            self.events[-1][0].record()
        else:
            self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.start

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        for start, end in self.events:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000
        self.events.clear()
        total, self.seconds = self.seconds, 0.0
        return total


class StepTimer(TrainerCallback):
    """Wall time of training steps from the first micro-batch to the optimizer; evaluating and saving are not in it.

    Counts the examples in them too, since what ran may be less than the arguments say: the last batches of an epoch,
    or what `auto_find_batch_size` found.
    """

    def __init__(self) -> None:
        self.steps, self.seconds, self.start, self.examples, self.rows = 0, 0.0, 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.__init__()  # type: ignore[misc]  # an attempt that ran out of memory does not count

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.start
        self.steps += 1

    def count(self, inputs: Any, full: int) -> None:
        """A micro-batch ran; `full` is how many examples one has, over all processes, that is not cut short."""
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        rows = self.rows if ids is None else len(ids)  # trainers differ in how many rows an example has
        self.rows = max(rows, self.rows)
        self.examples += full * rows / self.rows if self.rows else full

    def take(self) -> tuple[int, float, float]:
        """Steps, seconds and examples since the last call."""
        taken = self.steps, self.seconds, self.examples
        self.steps, self.seconds, self.examples = 0, 0.0, 0.0
        return taken
