"""How many threads torch takes on a CPU."""

from __future__ import annotations

import os

import torch


def few_threads(on_cpu: bool) -> None:
    """As `accelerate launch` has it: one thread on a CPU, where `OMP_NUM_THREADS` does not say how many.

    On cores that others use too, threads that wait for each other make small models several times slower.
    """
    if on_cpu and not os.environ.get("OMP_NUM_THREADS", "").split(",")[0].isdigit() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("On the CPU with 1 thread, as under `accelerate launch`; OMP_NUM_THREADS sets another number.")
