"""The page's part on what training forgets: a table of each study, and all its adapters at one held-out loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nspo2_trl.cli.frontier import scaled_kl

from .retain_about import words
from .retain_judge import (
    ENOUGH,
    METHODS,
    READING,
    Row,
    cells,
    compare,
    draw,
    falling,
    head,
    is_rival,
    judge,
    line,
    lowest_loss,
    mean,
    ratio,
    read,
    settings,
    shown_rank,
    taken_out,
)

STUDIES = ["smollm2", "harmless", "french", "sums-tuned", "sums-slow", "sums-gold"]  # shown first, in this order
TARGETS = [1.0, 0.75, 0.6, 0.45]  # scales of plain's adapter
UNTRAINED = math.log(2)  # preference loss before training
AT_ONE_LOSS = (
    "KL as a share of that of plain's adapter at scale {target:g}, each adapter moved along its own scales, up to "
    "that of lowest loss, to its loss ({loss:.3f}).{unreached} Left out are those whose scales do not enclose it for "
    "{enough:.0%} of their seeds."
)
UNREACHED = " With {rank} directions the loss at larger scales is not reached."
NOWHERE = "There is no table at one loss: no loss of plain's scales is enclosed with {rank} directions."
WORSE = "Plain's loss there is above that before training: the table says nothing about equal preference."


def shares(rows: Sequence[Row], scale: float) -> dict[tuple, dict[str, list[float]]]:
    """By method, rank and control: per kind of text the logarithm of the share, one per seed; lowest first.

    Each adapter is moved along its own scales, up to that of lowest loss, to one loss: plain's at a `scale`. So a
    method which learns faster is not judged at a loss that plain does not reach.
    """
    groups: dict[tuple, dict[int, list[Row]]] = {}
    for row in rows:
        key = row["method"], row["rank"], row["control"]
        groups.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    target = {row["seed"]: row["loss"] for row in rows if is_rival(row) and row["scale"] == scale}
    kinds, found = list(rows[0]["retained"]), {}
    for key, seeds in groups.items():
        logs: dict[str, list[float]] = {kind: [] for kind in kinds}
        for seed, own in seeds.items():
            if seed not in target:
                continue
            ours, plains = falling(own), falling(groups["plain", 0, ""][seed])
            for kind in kinds:
                kl, plain = (scaled_kl(one, kind, target[seed]) for one in (ours, plains))
                if kl and plain:
                    logs[kind].append(math.log(kl / plain))
        if all(len(values) >= max(1, ENOUGH * len(seeds)) for values in logs.values()):
            found[key] = logs
    return dict(sorted(found.items(), key=lambda item: sum(map(sum, item[1].values())) / len(item[1])))


def judged_by_loss(about: dict) -> bool:
    """Whether the study's "loss" is the preference loss, which is log 2 before training."""
    return about.get("trainer") != "sft" and about.get("judge") != "gold"


def at_one_loss(rows: Sequence[Row], untrained: float | None = UNTRAINED) -> list[str]:
    """The lines of that, at the largest of `TARGETS` that plain's projected adapters reach; none where they do not.

    Args:
        untrained: the loss before training, where it is known.
    """
    kinds, rank = list(rows[0]["retained"]), shown_rank(rows)
    for target in TARGETS:
        found = shares(rows, target)
        if ("plain", rank, "") in found:
            break
    else:
        return ["", NOWHERE.format(rank=rank)]
    loss = mean([row for row in rows if is_rival(row) and row["scale"] == target], "loss")
    unreached = "" if target == TARGETS[0] else UNREACHED.format(rank=rank)
    lines = ["", AT_ONE_LOSS.format(target=target, loss=loss, unreached=unreached, enough=ENOUGH)]
    if untrained and loss > untrained:
        lines[-1] += f" {WORSE}"
    lines += ["", line(["training", "taken out", "seeds", *kinds]), "|---" * (3 + len(kinds)) + "|"]
    for (method, rank, control), logs in found.items():
        if (method, rank) != ("plain", 0):
            first = [METHODS[method].words, taken_out(rank, control), str(len(logs[kinds[0]]))]
            lines.append(line([*first, *(ratio(logs[kind]) for kind in kinds)]))
    return lines


def studies(raw: Path) -> list[tuple[str, Path]]:
    """Names and raw files of the studies in a folder, in the order of the page."""
    found = {
        path.name.removeprefix("retain-").removesuffix(".jsonl.gz"): path for path in raw.glob("retain-*.jsonl.gz")
    }
    names = [name for name in STUDIES if name in found] + sorted(found.keys() - set(STUDIES))
    return [(name, found[name]) for name in names]


def section(raw: Path, docs: Path) -> tuple[list[str], list[Path]]:
    """The part of the page that the files RAW/retain-*.jsonl.gz make, and the pictures that are drawn for it."""
    lines, paths = [], []
    for name, path in studies(raw):
        about, rows = read(path)
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
        lines += ["", *compare(best), *at_one_loss(rows, UNTRAINED if judged_by_loss(about) else None)]
    return ["## What it forgets", "", READING, *lines, ""] if lines else [], paths
