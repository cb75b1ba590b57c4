"""docs/results.md from the raw files alone: the four claims, variance, convergence."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from . import gauge, pictures, retain_gain, retain_page, variance_tables
from .grid import read
from .methods import WORDS
from .stats import interval
from .tables import READING, add_speed_and_frontier, compare, line, section, words

MARKS = "<!-- made by scripts/benchmark.py tables -->", "<!-- end of what it made -->"
OVERHEAD = "overhead_quickstart_cpu.json"
TODAY = "default"  # study of the trainers' defaults; the others were run with those of before


def judged(bounds: list[tuple[float, float] | None], low: float, high: float) -> str:
    """One word for a claim that a figure lies between `low` and `high`, from its intervals on all tasks."""
    if not bounds or None in bounds:
        return "unknown"
    inside = [low <= a and b <= high for a, b in bounds]
    outside = [b < low or a > high for a, b in bounds]
    return "holds" if all(inside) else "fails" if all(outside) else "mixed" if any(inside + outside) else "unclear"


def claims(rows_of: dict[str, list[dict]], overhead: Path, method: str) -> list[str]:
    """The published claims against `method`, at each method's own best rate."""
    found: dict[str, dict[str, tuple]] = {"removed": {}, "early": {}, "final": {}, "time": {}}
    for task, rows in rows_of.items():
        for keep in (row for row in rows if row["method"] == method):
            if keep["removed"]:
                found["removed"][task] = statistics.fmean(keep["removed"]), interval(keep["removed"])
            ratio, bounds, _ = keep[0.25]
            found["early"][task] = ratio - 1, bounds and (bounds[0] - 1, bounds[1] - 1)
            found["final"][task] = keep["gap"]
    cell = json.loads(overhead.read_text())["cells"][0] if overhead.exists() else {}
    if "ratio_of_sums" in cell:
        low, high = cell["ratio_of_sums_interval"]
        found["time"]["quickstart"] = cell["ratio_of_sums"] - 1, (low - 1, high - 1)
    more = f" --name {TODAY} --methods plain {method}" if method == TODAY else ""
    grid = f"`python scripts/benchmark.py convergence{more}`"
    timing = (
        "`OMP_NUM_THREADS=1 python scripts/benchmark.py overhead --config recipes/quickstart/dpo.yaml --steps 450`"
    )
    published = [  # what, as published, the range that it means, the sign to show, command
        ("removed", "variance of the gradient removed, on unseen micro-batches", "25 to 40 %", (0.25, 1), "", grid),
        ("early", "steps to the loss that plain has at 25 % of its run", "-30 %", (-1, -0.3), "+", grid),
        ("final", "held-out loss at the end, against plain's", "within 1.5 %", (-1, 0.015), "+", grid),
        ("time", "time of a step", "under +5 %", (-1, 0.05), "+", timing),
    ]
    lines = [
        line(["claim", "published", f"measured: `{method}` against plain", "verdict", "command"]),
        "|---" * 5 + "|",
    ]
    for name, what, claim, range_, sign, command in published:
        texts = (f"{task} {words(*figure, sign + '.1f', 100, ' %')}" for task, figure in found[name].items())
        verdict = judged([bounds for _, bounds in found[name].values()], *range_)
        lines.append(line([what, claim, "; ".join(texts), verdict, command]))
    return [*lines, ""]


def fill(page: Path, title: str, lines: list[str]) -> Path:
    """Write `lines` between the marks of a page; a page that is not there has only them."""
    text = page.read_text() if page.exists() else f"# {title}\n\n{MARKS[0]}\n{MARKS[1]}\n"
    if not all(mark in text for mark in MARKS):
        raise SystemExit(f"error: {page} has no lines `{MARKS[0]}` and `{MARKS[1]}` to write between: add them.")
    made = "\n".join([MARKS[0], "", *lines, MARKS[1]])
    page.write_text(text[: text.index(MARKS[0])] + made + text[text.index(MARKS[1]) + len(MARKS[1]) :])
    return page


def training(raw: Path, study: str, docs: Path) -> tuple[dict[str, list[dict]], list[str], list[Path]]:
    """Of a study of runs: rows by task, lines for the page, plots that were drawn."""
    records, rows_of, lines, paths = read(raw, study), {}, [], []
    for task in dict.fromkeys(record["cell"]["task"] for record in records):
        rows = compare(records, task)
        if not rows:
            print(f"{task}: plain AdamW has no reported runs yet, so there is nothing to compare with.")
            continue
        add_speed_and_frontier(rows, records, task)
        rows_of[task] = rows
        paths.append(docs / f"{study}_{task}.png")
        pictures.draw(records, rows, task, paths[-1])
        lines += ["", f"### {task}" + (", today's default" if study == TODAY else ""), ""]
        lines += section(records, rows, task, paths[-1].name)
    return rows_of, lines, paths


def write(raw: Path, overhead: Path, docs: Path) -> list[Path]:
    """Write `results.md` of the folder `docs`, and the plots; returns the paths."""
    docs.mkdir(parents=True, exist_ok=True)
    rows_of, trained, paths = training(raw, "convergence", docs)
    rows_today, today, more = training(raw, TODAY, docs)
    paths, parts = paths + more, []
    records = read(raw, "variance")
    for task in dict.fromkeys(record["cell"]["task"] for record in records):
        own = [record for record in records if record["cell"]["task"] == task]
        paths.append(docs / f"variance_{task}.png")
        scores = variance_tables.scores_of(own)
        variance_tables.draw(scores, len(own), task, paths[-1])
        parts += ["", f"### {task}", "", *variance_tables.section(own, scores, task, paths[-1].name)]
    if not rows_of:
        return []
    about = (
        "Published: what the description of NSPO2 says, for no model in particular. The commands run the quick start; "
        "for `stories` see [reproducing.md](reproducing.md)."
    )
    forgotten, drawn = retain_page.section(raw, docs)
    gained, more = retain_gain.section(raw, docs)
    paths += [*drawn, *more]
    lines = [*forgotten, *gained, "## The four claims", "", about, ""]
    lines += claims(rows_today or rows_of, overhead, TODAY if rows_today else "keep")
    if parts:
        lines += ["## What a filter does to the gradient", "", variance_tables.READING, *parts]
    if records := read(raw, "gauge"):
        lines += gauge.section(records)
    lines += ["## What it does to training", "", READING, *today, *trained]
    lines += ["", "The methods:", "", *(f"- `{name}`: {text}" for name, text in WORDS.items()), ""]
    return [fill(docs / "results.md", "Results", lines), *paths]
