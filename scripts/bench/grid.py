"""The grid: which cells there are, and running those that are not there yet, two at a time.

A cell is a dict of plain values: study, task, method, lr, seed, steps, held_out (pairs of an evaluation), samples,
role ("select" to choose the method's rate, "report" to be shown). When it ends, its record is a line more of
RAW/STUDY.jsonl; `pack` puts these into RAW/STUDY.jsonl.gz. A cell that is in either file is not run again, so the same
command goes on with an interrupted grid.
"""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

SELECT, REPORT = [100, 101, 102], 10  # seeds that choose the rates; number of seeds that are reported


def name_of(cell: dict) -> str:
    return f"{cell['task']}/{cell['method']}-lr{cell['lr']:g}-s{cell['seed']}"


def loose(raw: Path, study: str) -> Path:
    """The file of finished cells that are not packed."""
    return raw / f"{study}.jsonl"


def packed(raw: Path, study: str) -> Path:
    return raw / f"{study}.jsonl.gz"


def studies_in(raw: Path) -> list[str]:
    return sorted({path.name.split(".jsonl")[0] for path in raw.glob("*.jsonl*")})


def by_name(raw: Path, study: str) -> dict[str, dict]:
    """What is there of a study, packed and loose, in the order of [`name_of`]."""
    found = {}
    for path, opened in ((packed(raw, study), gzip.open), (loose(raw, study), open)):
        if path.exists():
            with opened(path, "rt") as lines:
                records = [json.loads(text) for text in lines]
            found |= {name_of(record["cell"]): record for record in records}
    return dict(sorted(found.items()))


def read(raw: Path, study: str) -> list[dict]:
    return list(by_name(raw, study).values())


def _line(record: dict) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


def write(raw: Path, record: dict) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    with loose(raw, record["cell"]["study"]).open("a") as file:
        file.write(_line(record))


def write_packed(file: Path, records: Iterable[dict]) -> None:
    """Records as compressed lines, whole or not at all; the same bytes for the same records."""
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(gzip.compress("".join(map(_line, records)).encode(), mtime=0))
    part.rename(file)


def pack(raw: Path, study: str) -> Path:
    """Put a study's loose file into its packed one, the same bytes for the same cells, and remove it."""
    file = packed(raw, study)
    write_packed(file, read(raw, study))
    loose(raw, study).unlink(missing_ok=True)
    return file


def final_loss(record: dict) -> float:
    """Held-out loss at the end; infinite where the run diverged."""
    loss = record["curve"]["loss"][-1]
    return math.inf if loss is None else loss


def losses_by_rate(records: Iterable[dict], task: str, method: str) -> dict[float, float]:
    """Mean final held-out loss over the choosing seeds, of the rates that have as many seeds as any."""
    found: dict[float, list[float]] = {}
    for record in records:
        cell = record["cell"]
        if (cell["task"], cell["method"], cell["role"]) == (task, method, "select"):
            found.setdefault(cell["lr"], []).append(final_loss(record))
    most = max(map(len, found.values()), default=0)
    return {lr: statistics.fmean(losses) for lr, losses in sorted(found.items()) if len(losses) == most}


def best_rate(losses: dict[float, float]) -> tuple[float, bool]:
    """The rate with the lowest loss, and whether it is the lowest or highest that was tried."""
    rate = min(losses, key=losses.get)
    return rate, rate in (min(losses), max(losses))


def select_cells(common: dict, methods: list[str], rates: list[float], seeds: list[int]) -> list[dict]:
    cells = ({"method": method, "lr": lr, "seed": seed} for lr, method, seed in product(rates, methods, seeds))
    return [common | cell | {"role": "select"} for cell in cells]


def beyond(losses: dict[float, float]) -> list[float]:
    """The next rate, half or double, where the best is at the edge."""
    rate, edge = best_rate(losses)
    return [float(f"{rate * (0.5 if rate == min(losses) else 2):g}")] if edge else []


def report_cells(common: dict, records: list[dict], methods: list[str], seeds: Iterable[int]) -> list[dict]:
    """Each method at its best rate, plain AdamW also at those of the others and at half and double its own."""
    losses = {method: losses_by_rate(records, common["task"], method) for method in methods}
    rates = {method: {best_rate(found)[0]} for method, found in losses.items() if found}
    if "plain" in rates:
        best = best_rate(losses["plain"])[0]
        rates["plain"] = {best / 2, best * 2}.union(*rates.values())
    pairs = [(name, float(f"{lr:g}")) for name in rates for lr in sorted(rates[name])]
    cells = [common | {"method": name, "lr": lr, "role": "report"} for name, lr in pairs]
    return [cell | {"seed": seed} for seed in seeds for cell in cells]


def wanted(cell: dict, only: dict[str, list[str]]) -> bool:
    """Whether a cell passes `--only key=value,…`; several values of one key are alternatives."""
    return all(str(cell.get(key)) in values for key, values in only.items())


def _begin() -> None:
    import signal
    import warnings

    import datasets
    import torch
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL and Transformers call their own deprecated names
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _run(cell: dict, folders: dict[str, str]) -> dict:
    from .tasks import run_cell

    return run_cell(cell, folders)


def missing(raw: Path, cells: list[dict]) -> list[dict]:
    """The cells that are not there; raises `SystemExit` where one was made with other settings, such as more steps."""
    there, left = {study: by_name(raw, study) for study in {cell["study"] for cell in cells}}, []
    for cell in cells:
        name = name_of(cell)
        if name not in there[cell["study"]]:
            left.append(cell)
        elif (old := there[cell["study"]][name]["cell"]) != cell:
            other = ", ".join(f"{key} {old.get(key)}" for key in {**old, **cell} if old.get(key) != cell.get(key))
            raise SystemExit(f"error: {name} in {raw} was made with {other}: give another folder with `--raw`.")
    return left


def run_cells(raw: Path, cells: list[dict], folders: dict[str, dict], workers: int, label: str, run=_run) -> int:
    """Run what is missing, `workers` cells at a time; returns how many failed, which the next call tries again."""
    todo, failed, start = missing(raw, cells), 0, time.perf_counter()
    if not todo:
        print(f"{label}: all {len(cells)} cells are in {raw}; to run them anew give another folder with `--raw`.")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes that are started now read it
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool:
        futures = {pool.submit(run, cell, folders[cell["task"]]): name_of(cell) for cell in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                if (error := future.exception()) is None:
                    write(raw, future.result())
                else:
                    failed += 1
                    print(f"failed: {futures[future]}: {type(error).__name__}: {error}", flush=True)
                left = (time.perf_counter() - start) / done * (len(todo) - done) / 60
                said = f"{label}: {len(cells) - len(todo) + done} of {len(cells)}, {left:.0f} min left"
                print(f"{said} ({futures[future]})", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise SystemExit("Stopped. Finished cells are kept: the same command goes on.") from None
    if failed:
        print(f"{label}: {failed} of {len(todo)} cells failed, see above; the same command tries them again.")
    return failed
