"""The grid: which cells there are, and running those that are not there yet, two at a time.

A cell is a dict of plain values: study, task, method, lr, seed, steps, held_out (pairs of an evaluation), samples,
role ("select" to choose the method's rate, "report" to be shown). When it ends, RAW/STUDY/TASK/METHOD-lrLR-sSEED.json
is written in one go; `pack` puts a study's files into the lines of RAW/STUDY.jsonl.gz. A cell that is in either place
is not run again, so the same command goes on with an interrupted grid.
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
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

SELECT, REPORT = [100, 101, 102], 10  # seeds that choose the rates; number of seeds that are reported


def path_of(raw: Path, cell: dict) -> Path:
    name = f"{cell['method']}-lr{cell['lr']:g}-s{cell['seed']}.json"
    return raw / cell["study"] / cell["task"] / name


def loose(raw: Path, study: str) -> list[Path]:
    """The files of finished cells that are not packed."""
    return list((raw / study).glob("*/*.json"))


def packed(raw: Path, study: str) -> Path:
    return raw / f"{study}.jsonl.gz"


def studies_in(raw: Path) -> list[str]:
    folders = {path.parent.parent.name for path in raw.glob("*/*/*.json")}
    return sorted(folders.union(path.name.removesuffix(".jsonl.gz") for path in raw.glob("*.jsonl.gz")))


def by_path(raw: Path, study: str) -> dict[Path, dict]:
    """What is there of a study, packed and loose, in the order of [`path_of`]."""
    # loose files first: should another process pack them in the meantime, they are in the packed file
    found = {path: json.loads(path.read_text()) for path in loose(raw, study) if path.exists()}
    if packed(raw, study).exists():
        with gzip.open(packed(raw, study), "rt") as lines:
            records = [json.loads(text) for text in lines]
        found = {path_of(raw, record["cell"]): record for record in records} | found
    return dict(sorted(found.items()))


def read(raw: Path, study: str) -> list[dict]:
    return list(by_path(raw, study).values())


def pack(raw: Path, study: str) -> Path:
    """Put a study's loose files into its packed one, the same bytes for the same cells, and remove them."""
    gone, file = loose(raw, study), packed(raw, study)
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in read(raw, study))
    part = file.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as out, gzip.GzipFile("", "wb", fileobj=out, mtime=0) as packing:
        packing.write(lines.encode())
    part.rename(file)
    for path in gone:
        path.unlink()
    for folder in [*{path.parent for path in gone}, raw / study]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
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
    return [
        common | {"method": method, "lr": lr, "seed": seed, "role": "select"}
        for lr in rates
        for method in methods
        for seed in seeds
    ]


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


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    part.rename(path)


def missing(raw: Path, cells: list[dict]) -> list[dict]:
    """The cells that are not there.

    Raises:
        SystemExit: one was made with other settings, such as another number of steps.
    """
    there, left = {}, []
    for study in {cell["study"] for cell in cells}:
        there |= by_path(raw, study)
    for cell in cells:
        path = path_of(raw, cell)
        if path not in there:
            left.append(cell)
        elif (old := there[path]["cell"]) != cell:
            other = ", ".join(f"{key} {old.get(key)}" for key in {**old, **cell} if old.get(key) != cell.get(key))
            raise SystemExit(f"error: {path} was made with {other}: give another folder with `--raw`.")
    return left


def run_cells(raw: Path, cells: list[dict], folders: dict[str, dict], workers: int, label: str, run=_run) -> int:
    """Run the cells that are not there, `workers` at a time with one thread each; returns how many failed.

    What fails is named at once and leaves no file, so that the next call tries it again.
    """
    todo, failed, start = missing(raw, cells), 0, time.perf_counter()
    if not todo:
        print(f"{label}: all {len(cells)} cells are in {raw}; to run them anew give another folder with `--raw`.")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes that are started now read it
    console = Console()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    with pool, Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=len(cells), completed=len(cells) - len(todo))
        futures = {pool.submit(run, cell, folders[cell["task"]]): cell for cell in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                path, error = path_of(raw, futures[future]), future.exception()
                if error is None:
                    write(path, future.result())
                else:
                    failed += 1
                    print(f"failed: {path}: {type(error).__name__}: {error}", flush=True)
                left = (time.perf_counter() - start) / done * (len(todo) - done)
                text = f"{label}: {len(cells) - len(todo) + done} of {len(cells)}, {left / 60:.0f} min left"
                progress.update(task, advance=1, description=text)
                if not console.is_terminal:
                    print(f"{text} ({path.name})", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise SystemExit("Stopped. Finished cells are kept: the same command goes on.") from None
    if failed:
        print(f"{label}: {failed} of {len(todo)} cells failed, see above; the same command tries them again.")
    return failed
