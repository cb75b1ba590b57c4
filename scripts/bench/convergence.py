"""Command lines around [`grid`] and [`results`]: `convergence`, `variance`, `gauge`, `tables`, `pack`, `--smoke`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import ROOT, grid
from .methods import METHODS

QUICKSTART = {"model": str(ROOT / "recipes/quickstart/model"), "data": str(ROOT / "recipes/quickstart/data")}
RAW, STEPS = ROOT / "benchmarks/raw", 100
RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]

HELP = """Methods x learning rates x paired seeds on tiny models, each run by the trainer itself.

    python scripts/benchmark.py convergence [--phase select|report|all] [--only method=keep,task=quickstart]
    python scripts/benchmark.py convergence --stories_model DIR --stories_data DIR     the second task too

`select` finds each method's rate, `report` runs it with other seeds. Stop it when you like: the same command goes on.
"""


def _parser(name: str, words: str, raw_only: bool = False) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        f"benchmark.py {name}", description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--raw", type=Path, default=RAW, help=f"folder of the raw files, {RAW} if left out")
    if not raw_only:
        found.add_argument("--stories_model", help="folder of a model for the task `stories`")
        found.add_argument("--stories_data", help="folder with train and test split of pairs for the task `stories`")
        found.add_argument("--workers", type=int, default=2)
        found.add_argument("--steps", type=int, default=STEPS, help="of a run")
    return found


def _folders(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    folders, stories = {"quickstart": QUICKSTART}, (options.stories_model, options.stories_data)
    if any(stories):
        for name, folder in zip(("--stories_model", "--stories_data"), stories):
            if not folder or not Path(folder).is_dir():
                raise SystemExit(f"error: `{name}` {folder or 'is missing'}: the task `stories` needs both folders.")
        folders["stories"] = dict(zip(("model", "data"), stories))
    return folders


def _only(text: str, tasks: Iterable[str]) -> dict[str, list[str]]:
    """The values of each key of `--only`."""
    only: dict[str, list[str]] = {}
    known = {"task": list(tasks), "method": list(METHODS), "role": ["select", "report"], "lr": None, "seed": None}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known or not value or value not in (known[key] or [value]):
            choices = f"one of {', '.join(known[key])}" if known.get(key) else f"one of {', '.join(known)}, then ="
            raise SystemExit(f"error: `--only {part}`: expected {choices}.")
        only.setdefault(key, []).append(value)
    return only


def _say_next(raw: Path) -> None:
    print(f"Tables and plots: `python scripts/benchmark.py tables{'' if raw == RAW else f' --raw {raw}'}`.")


def run(argv: list[str]) -> int:
    """Run what is missing; returns how many cells failed."""
    found = _parser("convergence", HELP)
    found.add_argument("--phase", choices=["select", "report", "all"], default="all")
    found.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="METHOD",
        default=[name for name in METHODS if name != "default"],
    )
    found.add_argument("--rates", nargs="+", type=float, default=RATES, help="rates that are tried")
    found.add_argument("--extend", type=int, default=3, help="how often to go on where the best rate is at the edge")
    found.add_argument("--select_seeds", nargs="+", type=int, default=grid.SELECT)
    found.add_argument("--report_seeds", type=int, default=grid.REPORT, help="how many")
    found.add_argument("--held_out", type=int, default=300, help="pairs of every evaluation")
    found.add_argument("--samples", type=int, default=200, help="continuations at the end of a reported run")
    found.add_argument("--only", default="", help="key=value,…: only these cells (task, method, lr, seed, role)")
    found.add_argument("--name", default="convergence", help="of the study: its raw file is NAME.jsonl.gz")
    options = found.parse_args(argv)
    if options.steps % 20:
        raise SystemExit(f"error: `--steps` {options.steps}: give a multiple of 20, the number of logs of a run.")
    methods, raw, failed, folders = options.methods, options.raw, 0, _folders(options)
    only = _only(options.only, folders)

    def go(cells: list[dict], label: str) -> None:
        nonlocal failed
        if cells := [cell for cell in cells if grid.wanted(cell, only)]:
            failed += grid.run_cells(raw, cells, folders, options.workers, label)

    for task in folders:
        common = {"study": options.name, "task": task, "steps": options.steps}
        common |= {"held_out": options.held_out, "samples": options.samples}
        tried = grid.select_cells(common, methods, options.rates, options.select_seeds)
        if options.phase != "report":
            go(tried, f"{task}, rates")
            for _ in range(options.extend):
                records, more = grid.read(raw, options.name), []
                for method in methods:
                    losses = grid.losses_by_rate(records, task, method)
                    rates = grid.beyond(losses) if losses else []
                    more += grid.select_cells(common, [method], rates, options.select_seeds)
                go(more, f"{task}, rates beyond the edge")
        if options.phase != "select":
            chosen = {key: values for key, values in only.items() if key in ("task", "method")}
            if left := grid.missing(raw, [cell for cell in tried if grid.wanted(cell, chosen)]):
                raise SystemExit(f"error: {len(left)} cells that choose the rates are missing: run `--phase select`.")
            cells = grid.report_cells(common, grid.read(raw, options.name), methods, range(options.report_seeds))
            go(cells, f"{task}, reported runs")
    _say_next(raw)
    return failed


def variance(argv: list[str]) -> int:
    """Run what is missing of the study `variance`; returns how many cells failed."""
    from .variance import run_cell

    found = _parser("variance", "What filters do at frozen parameters.")
    found.add_argument("--runs", type=int, default=10, help="plain runs, with the seeds 0, 1, …")
    found.add_argument("--rate", type=float, default=2e-3, help="learning rate of these runs")
    found.add_argument("--fit", type=int, default=128, help="micro-batches of 4 pairs that a filter is made from")
    found.add_argument("--fresh", type=int, default=512, help="others, that it is scored on")
    options = found.parse_args(argv)
    same = {"study": "variance", "method": "plain", "lr": options.rate, "steps": options.steps, "role": "report"}
    same |= {"fit": options.fit, "fresh": options.fresh}
    failed, folders = 0, _folders(options)
    for task in folders:
        cells = [same | {"task": task, "seed": seed} for seed in range(options.runs)]
        failed += grid.run_cells(options.raw, cells, folders, options.workers, f"{task}, variance", run_cell)
    _say_next(options.raw)
    return failed


def gauge(argv: list[str]) -> int:
    """Run what is missing of the study `gauge`; returns how many cells failed."""
    from .gauge import run_cell

    found = _parser("gauge", "What `nspo2 measure` says, against the estimator of `variance`.")
    found.add_argument("--runs", type=int, default=10, help="runs, with the seeds 0, 1, …")
    found.add_argument("--rate", type=float, default=2e-3, help="learning rate of these runs")
    found.add_argument("--fresh", type=int, default=512, help="micro-batches of 4 pairs that the estimator reads")
    options = found.parse_args(argv)
    same = {"study": "gauge", "task": "quickstart", "method": "plain", "lr": options.rate, "steps": options.steps}
    cells = [same | {"role": "report", "fresh": options.fresh, "seed": seed} for seed in range(options.runs)]
    failed = grid.run_cells(options.raw, cells, _folders(options), options.workers, "gauge", run_cell)
    _say_next(options.raw)
    return failed


def tables(argv: list[str]) -> None:
    from . import results  # SciPy and Matplotlib are the extra `bench`

    found = _parser("tables", "Tables and plots from the raw files alone.", raw_only=True)
    found.add_argument("--overhead", type=Path, default=ROOT / f"benchmarks/{results.OVERHEAD}")
    found.add_argument("--docs", type=Path, help="where pages and plots go: docs/, or beside another `--raw`")
    options = found.parse_args(argv)
    if not grid.studies_in(options.raw):
        raise SystemExit(f"error: no raw files in {options.raw}: run `python scripts/benchmark.py convergence` first.")
    docs = options.docs or (ROOT / "docs" if options.raw == RAW else options.raw.parent / "docs")
    for path in results.write(options.raw, options.overhead, docs):
        print(path)


def pack(argv: list[str]) -> None:
    raw = _parser("pack", "One file a study, of the cells that have ended.", raw_only=True).parse_args(argv).raw
    for study in grid.studies_in(raw):
        if grid.loose(raw, study).exists():
            print(grid.pack(raw, study))


COMMANDS = {"convergence": run, "variance": variance, "gauge": gauge, "tables": tables, "pack": pack}


def smoke() -> Path:
    """2 methods, 2 rates, 2 seeds, 20 steps: everything once, into a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="nspo2_bench_"))
    small = "--methods plain keep --rates 1e-3 2e-3 --select_seeds 100 101 --report_seeds 2 --extend 0"
    small += " --steps 20 --held_out 50 --samples 20"
    raw = ["--raw", str(folder / "raw")]
    if run([*small.split(), *raw]) or variance([*"--runs 2 --steps 20 --fit 16 --fresh 32".split(), *raw]):
        raise SystemExit("error: cells failed, see above.")
    tables([*raw, "--docs", str(folder / "docs")])
    return folder
