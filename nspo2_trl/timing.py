"""Stopwatch: time that NSPO2 adds to a step, without making the device wait."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Adds up the time spent inside `with stopwatch:`.

    On a CPU it is wall time. On a CUDA device kernels run later than they are launched, so a pair of events brackets
    each passage and is read when the total is asked for; gaps in which the device waits for the host count too.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Stopwatch:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
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
