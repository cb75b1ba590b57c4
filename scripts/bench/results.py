"""docs/results.md from the raw files alone: the four claims, variance, convergence, other conditions."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np

from . import pictures, variance_tables
from .grid import read
from .methods import IDEAS, WORDS
from .stats import interval, ratio_of_sums, verdict
from .studies import STUDIES
from .tables import compare, line, section

MARKS = "<!-- made by scripts/benchmark.py tables -->", "<!-- end of what it made -->"
GRID = "`python scripts/benchmark.py convergence`"
OVERHEAD = "overhead_quickstart_cpu.json"


def judged(bounds: list[tuple[float, float] | None], low: float, high: float) -> str:
    """One word for a claim that a figure lies between `low` and `high`, from its intervals on all tasks."""
    if not bounds or None in bounds:
        return "unknown"
    inside = [low <= a and b <= high for a, b in bounds]
    outside = [b < low or a > high for a, b in bounds]
    return "holds" if all(inside) else "fails" if all(outside) else "mixed" if any(inside + outside) else "unclear"


def percent(value: float, bounds: tuple[float, float] | None, sign: str = "") -> str:
    text = f"{100 * value:{sign}.1f} %"
    return text if bounds is None else f"{text} [{100 * bounds[0]:{sign}.1f}, {100 * bounds[1]:{sign}.1f}]"


def claims(rows_of: dict[str, list[dict]], overhead: Path) -> list[str]:
    """The published claims against `keep`, the trainer's default, at each method's own best rate."""
    kinds: dict[str, list] = {"removed": [], "early": [], "final": []}
    for task, rows in rows_of.items():
        found = {row["method"]: row for row in rows}
        if "keep" not in found:
            continue
        keep, plain = found["keep"], found["plain"]
        values = keep["removed"]
        kinds["removed"].append((task, percent(statistics.fmean(values), interval(values)), interval(values)))
        shares = keep["steps_0.25"]
        bounds = interval([share - 1 for share in shares]) if len(shares) == keep["seeds"] else None
        kinds["early"].append((task, percent(statistics.fmean(shares) - 1, bounds, "+"), bounds))
        gap = ratio_of_sums(np.array(keep["losses"]) - plain["losses"], plain["losses"])
        kinds["final"].append((task, percent(*gap, "+"), gap[1]))
    texts = {name: "; ".join(f"{task} {text}" for task, text, _ in found) for name, found in kinds.items()}
    bounds = {name: [part[2] for part in found] for name, found in kinds.items()}
    lines = [
        line(
            ["claim", "published", "measured, `keep` at its best rate against plain at its own", "verdict", "command"]
        ),
        "|---|---|---|---|---|",
        line(
            [
                "gradient variance removed, on micro-batches that the basis has not seen",
                "25 to 40 %",
                texts["removed"],
                judged(bounds["removed"], 0.25, 1),
                GRID,
            ]
        ),
        line(
            [
                "steps to the loss that plain has at 25 % of its run",
                "-30 %",
                texts["early"],
                judged(bounds["early"], -1, -0.3),
                GRID,
            ]
        ),
        line(
            [
                "held-out loss at the end, against plain's",
                "within 1.5 %",
                texts["final"],
                judged(bounds["final"], -9, 0.015),
                GRID,
            ]
        ),
    ]
    cell = json.loads(overhead.read_text())["cells"][0] if overhead.exists() else {}
    if "ratio_of_sums" in cell:
        own = cell["ratio_of_sums"] - 1, tuple(end - 1 for end in cell["ratio_of_sums_interval"])
        command = "`OMP_NUM_THREADS=1 python scripts/benchmark.py overhead --config recipes/quickstart/dpo.yaml`"
        word = judged([own[1]], -1, 0.05)
        lines.append(line(["time of a step", "under +5 %", f"quickstart {percent(*own, '+')}", word, command]))
    return [*lines, ""]


def other_conditions(raw: Path) -> list[str]:
    """One row a study, task and method: the difference to plain, each at its own best rate."""
    head = ["conditions", "task", "method", "rate", "held-out loss", "difference to plain [95 %]", "", "noise removed"]
    lines, words = [line([*head, "gold score", "KL", "forgotten", "seeds"]), "|---" * 12 + "|"], []
    for study in STUDIES:
        records, before = read(raw, study) if study != "convergence" else [], len(lines)
        for task in dict.fromkeys(record["cell"]["task"] for record in records):
            lines += [condition_row(f"`{study}`", task, row) for row in compare(records, task)]
        if len(lines) > before:
            words.append(f"- `{study}`: {STUDIES[study]['words']}")
    if not words:
        return []
    if any(f"`{name}`" in text for name in IDEAS for text in lines):
        words += ["", "Methods that are only here:", "", *(f"- `{name}`: {WORDS[name]}" for name in IDEAS)]
    words += [
        "",
        "KL as above; forgotten is KL the other way round: the mean, over answers that the reference wrote, of ",
    ]
    words[-1] += "log p of the reference - log p, in nats."
    return [*words, "", *lines, ""]


def condition_row(study: str, task: str, row: dict) -> str:
    bounds, plain = row["bounds"], row["method"] == "plain"
    apart = f"{row['apart']:+.4f}" + (f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "")
    figures = [f"{row['loss']:.4f}", "" if plain else apart, "" if plain else verdict(bounds)]
    figures.append(f"{100 * statistics.fmean(row['removed']):.0f} %" if row["removed"] else "")
    figures += [f"{row['gold']:.2f}", f"{row['kl']:.1f}"]
    figures.append("" if np.isnan(row["forgotten"]) else f"{row['forgotten']:.1f}")
    rate = f"{row['lr']:g}" + " (edge)" * row["edge"]
    return line([study, task, f"`{row['method']}`", rate, *figures, str(row["seeds"])])


def write(raw: Path, overhead: Path, docs: Path) -> list[Path]:
    """Write `docs/results.md`, between its marks where it has them, and the plots; returns the paths."""
    docs.mkdir(parents=True, exist_ok=True)
    records, paths, rows_of = read(raw, "convergence"), [], {}
    parts: dict[str, list[str]] = {"variance": [], "convergence": []}
    for task in dict.fromkeys(record["cell"]["task"] for record in records):
        rows = compare(records, task)
        if not rows:
            print(f"{task}: plain AdamW has no reported runs yet, so there is nothing to compare with.")
            continue
        rows_of[task] = rows
        paths.append(docs / f"convergence_{task}.png")
        pictures.draw(records, rows, task, paths[-1])
        parts["convergence"] += ["", f"### {task}", "", *section(records, rows, task, paths[-1].name)]
    records = read(raw, "variance")
    for task in dict.fromkeys(record["cell"]["task"] for record in records):
        own = [record for record in records if record["cell"]["task"] == task]
        paths.append(docs / f"variance_{task}.png")
        variance_tables.draw(own, task, paths[-1])
        parts["variance"] += ["", f"### {task}", "", *variance_tables.section(own, task, paths[-1].name)]
    if not rows_of:
        return []
    lines = ["## The four claims", "", *claims(rows_of, overhead)]
    if parts["variance"]:
        lines += ["## What a filter does to the gradient", *parts["variance"]]
    lines += ["## What it does to training", *parts["convergence"]]
    lines += [
        "",
        "The methods:",
        "",
        *(f"- `{name}`: {text}" for name, text in WORDS.items() if name not in IDEAS),
        "",
    ]
    conditions = other_conditions(raw)
    if conditions:
        lines += ["## Under other conditions", "", *conditions]
    page, made = docs / "results.md", "\n".join([MARKS[0], "", *lines, MARKS[1]])
    text = page.read_text() if page.exists() else f"# Results\n\n{MARKS[0]}\n{MARKS[1]}\n"
    if not all(mark in text for mark in MARKS):
        raise SystemExit(f"error: {page} has no lines `{MARKS[0]}` and `{MARKS[1]}` to write between: add them.")
    page.write_text(text[: text.index(MARKS[0])] + made + text[text.index(MARKS[1]) + len(MARKS[1]) :])
    return [page, *paths]
