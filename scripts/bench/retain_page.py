"""The page's part on what training forgets: a table of each study, and all its adapters at one held-out loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nspo2_trl.cli.frontier import scaled_kl

from .retain_judge import (
    METHODS,
    READING,
    Row,
    cells,
    compare,
    draw,
    head,
    is_rival,
    judge,
    line,
    lowest_loss,
    ratio,
    read,
    settings,
    shown_rank,
    taken_out,
    words,
)

TARGET = 0.75  # scale of plain's adapter
ENOUGH = 0.75  # of the seeds
AT_ONE_LOSS = f"""At one loss: KL as a share of that of plain's adapter at scale {TARGET}, where each adapter, moved
along its own scales, has the same held-out loss. Left out are those that reach it for less than {ENOUGH:.0%} of
their seeds."""


def shares(rows: Sequence[Row]) -> dict[tuple, dict[str, list[float]]]:
    """By method, rank and control: per kind of text the logarithm of the share, one per seed; lowest first.

    Each adapter is moved along its own scales to one loss, plain's at scale `TARGET`, so that a method which learns
    faster is not judged at a loss that plain does not reach.
    """
    groups: dict[tuple, dict[int, list[Row]]] = {}
    for row in rows:
        key = row["method"], row["rank"], row["control"]
        groups.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    target = {row["seed"]: row for row in rows if is_rival(row) and row["scale"] == TARGET}
    found = {}
    for key, seeds in groups.items():
        logs: dict[str, list[float]] = {}
        for seed, own in seeds.items():
            if len(own) < 2 or seed not in target:
                continue
            for kind, figures in target[seed]["retained"].items():
                kl = scaled_kl([row | {"rank": 0} for row in own], kind, target[seed]["loss"])
                if kl:
                    logs.setdefault(kind, []).append(math.log(kl / figures["kl"]))
        kinds = target[next(iter(target))]["retained"] if target else {}
        if logs and all(len(logs.get(kind, [])) >= ENOUGH * len(seeds) for kind in kinds):
            found[key] = logs
    return dict(sorted(found.items(), key=lambda item: sum(map(sum, item[1].values())) / len(item[1])))


def at_one_loss(rows: Sequence[Row]) -> list[str]:
    """The lines of that; none where there is nothing to compare."""
    found = shares(rows)
    if len(found) < 2:
        return []
    kinds = list(rows[0]["retained"])
    lines = [AT_ONE_LOSS, "", line(["training", "taken out", "seeds", *kinds]), "|---" * (3 + len(kinds)) + "|"]
    for (method, rank, control), logs in found.items():
        if (method, rank) != ("plain", 0):
            cells = [ratio(logs[kind]) for kind in kinds]
            lines.append(line([METHODS[method].words, taken_out(rank, control), str(len(logs[kinds[0]])), *cells]))
    return ["", *lines]


def section(raw: Path, docs: Path) -> tuple[list[str], list[Path]]:
    """The part of the page that the files RAW/retain-*.jsonl.gz make, and the pictures that are drawn for it."""
    lines, paths = [], []
    for path in sorted(raw.glob("retain-*.jsonl.gz")):
        (about, rows), name = read(path), path.name.removeprefix("retain-").removesuffix(".jsonl.gz")
        paths.append(docs / f"retain_{name}.png")
        draw(rows, paths[-1], shown_rank(rows))
        lines += [
            "",
            f"### Forgotten by {name}",
            "",
            words(about),
            "",
            f"![{name}: held-out preference loss against KL, by kind of text]({paths[-1].name})",
            "",
            line(head(rows)),
            "|---" * len(head(rows)) + "|",
        ]
        best = lowest_loss(settings(judge(rows)))
        lines += [line(cells(group)) for group in best]
        lines += ["", *compare(best), *at_one_loss(rows)]
    return ["## What it forgets", "", READING, *lines, ""] if lines else [], paths
