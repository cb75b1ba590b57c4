"""Rows of `retain` judged: KL at equal held-out preference loss, as a share of what plain's scaled adapter has there.

A row is one point of one adapter: method, seed, rank, scale, control (whose K), loss, accuracy, margin, and per kind
of text `retained` with kl and loss_rise; `right`, the share of right sums, where there are any.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nspo2_trl.cli.frontier import scaled_kl
from nspo2_trl.cli.plots import COLORS

from .grid import write_packed
from .retain_about import words
from .retain_methods import METHODS, PROJECTED
from .stats import interval, p_value

Row = dict
READING = """- One line per adapter, at the scale of lowest mean held-out loss; the raw file has all scales.
- KL(model without the adapter ‖ with it) is in nats per token, the median over seeds.
- After it, its share of what plain's adapter of the same seed has, merely scaled to the same held-out loss: geometric
  mean, 95 % bootstrap interval and p (sign-flip test that the share is 1, exact up to 13 seeds). Of fewer than 6
  seeds: median and range.
- Between the scales measured, up to that of lowest loss, plain's log KL is taken to be linear in its loss. A loss
  below counts as the lowest: what learns more than plain looks worse here than it is, see the tables at one loss. A
  loss above all of them has no share; a line has none where less than three quarters of its seeds do.
- Seeds differ in the order of the pairs and the start of LoRA, not in what is measured on.
- Controls: as many random orthonormal directions; K of the pairs' own texts; K of the next layer's input."""
ENOUGH = 0.75  # of the seeds
CONTROLS = {"": "directions", "random": "random", "pairs": "of the pairs", "layer": "of another layer"}
K_TIME = "seconds_of_k.json"
LOTS = ("scaled", "rank", "texts", *filter(None, CONTROLS))  # names of lots begin so


def falling(rows: Sequence[Row]) -> list[Row]:
    """Rows of one adapter up to the scale of lowest loss; beyond it a larger scale learns less and forgets more."""
    best = min(rows, key=lambda row: row["loss"])
    return [row | {"rank": 0} for row in rows if row["scale"] <= best["scale"]]


def kl_at(rows: Sequence[Row], kind: str, loss: float) -> float | None:
    """KL on texts of a `kind` that an adapter, merely scaled as in `rows` of rank 0, has at a held-out loss.

    Log KL is taken to be linear in the loss between two scales up to that of lowest loss. A loss below that counts as
    the lowest, which favours the scaled adapter. None where the loss is above that of all these scales.
    """
    lowest = min(row["loss"] for row in rows)
    return scaled_kl(falling(rows), kind, max(loss, lowest))


def judge(rows: Sequence[Row]) -> list[Row]:
    """`rows` with `share`, per kind of text: KL over that of plain's scaled adapter of the same seed at equal loss."""
    found = []
    for row in rows:
        rival = [other for other in rows if is_rival(other) and other["seed"] == row["seed"]]
        share = {}
        for kind, figures in row["retained"].items() if len(rival) > 1 else ():
            kl = kl_at(rival, kind, row["loss"])
            share[kind] = figures["kl"] / kl if kl else None
        found.append(row | {"share": share})
    return found


def is_rival(row: Row) -> bool:
    return row["method"] == "plain" and row["rank"] == 0


def settings(rows: Sequence[Row]) -> list[list[Row]]:
    """Judged rows that differ by seed alone, side by side, in the order of method, control, rank and scale."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = row["method"] != "plain", row["method"], row["control"], row["rank"], row["scale"]
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]


def lowest_loss(groups: Sequence[list[Row]]) -> list[list[Row]]:
    """Of the scales of each adapter and rank the one of lowest mean held-out loss: nothing is chosen by KL."""
    best: dict[tuple, list[Row]] = {}
    for group in groups:
        key = group[0]["method"], group[0]["control"], group[0]["rank"]
        if key not in best or mean(group, "loss") < mean(best[key], "loss"):
            best[key] = group
    return list(best.values())


def mean(group: Sequence[Row], figure: str) -> float:
    return statistics.fmean(row[figure] for row in group)


def taken_out(rank: int, control: str) -> str:
    of = CONTROLS.get(control) or f"of {int(control.removeprefix('texts'))} texts"
    return f"{rank} {of}" if rank else "only scaled"


def named(row: Row) -> list[str]:
    """How it was trained, and what was taken out."""
    return [METHODS[row["method"]].words, taken_out(row["rank"], row["control"])]


def cells(group: Sequence[Row]) -> list[str]:
    """The line of a setting: what it is, seeds, loss, and per kind of text KL with its share."""
    first = group[0]
    found = [
        *named(first),
        f"{first['scale']:g}",
        str(len(group)),
        f"{mean(group, 'loss'):.3f}",
    ]
    if "right" in first:
        found.append(f"{mean(group, 'right'):.3f}")
    for kind in first["retained"]:
        kl = statistics.median(row["retained"][kind]["kl"] for row in group)
        shares = logs(group, kind)
        text = "1" if is_rival(first) else ratio(shares) if shares else "-"
        fewer = f" ({len(shares)} seeds)" if shares and len(shares) < len(group) and not is_rival(first) else ""
        found.append(f"{kl:.2g}, {text}{fewer}")
    return found


def logs(group: Sequence[Row], kind: str) -> list[float] | None:
    """Logarithms of the shares, one per seed that has one; None where less than `ENOUGH` of the seeds do."""
    shares = [share for row in group if (share := row["share"].get(kind)) is not None]
    return [math.log(max(share, 1e-9)) for share in shares] if len(shares) >= ENOUGH * len(group) else None


def ratio(values: Sequence[float]) -> str:
    """Geometric mean, interval and p of ratios given as logarithms; of fewer than 6 median and range."""
    p = p_value(values)
    middle = statistics.median(values) if p is None else statistics.fmean(values)
    low, high = (None if p is None else interval(values)) or (min(values), max(values))
    text = short(middle) + (f" [{short(low)}, {short(high)}]" if len(values) > 1 else "")
    return text if p is None else f"{text}, p {p:.3f}"


def short(log: float) -> str:
    found = math.exp(log)
    return f"{found:.2f}" if found >= 0.01 else f"{found:.1g}"


def compare(groups: Sequence[list[Row]]) -> list[str]:
    """Per kind of text: the lowest share of an adapter off our directions, against the lowest of one that is not."""
    lines = []
    for kind in groups[0][0]["retained"]:
        known = [(found, group) for group in groups if len(found := logs(group, kind) or []) == len(groups[0])]
        ranked = sorted(known, key=lambda pair: statistics.fmean(pair[0]))
        ours = next((pair for pair in ranked if pair[1][0]["rank"] and not pair[1][0]["control"]), None)
        rival = next((pair for pair in ranked if not pair[1][0]["rank"]), None)
        if ours and rival:
            names = [", ".join(named(group[0])) for _, group in (ours, rival)]
            differences = [a - b for a, b in zip(ours[0], rival[0], strict=True)]
            lines.append(f"- {kind}: {names[0]}, has {ratio(differences)} of the share of {names[1]}.")
    return lines


def line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def head(rows: Sequence[Row]) -> list[str]:
    right = ["sums right"] if "right" in rows[0] else []
    return ["training", "taken out", "scale", "seeds", "held-out loss", *right, *rows[0]["retained"]]


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=f"{title}: KL in nats per token, and its share of plain's, scaled to equal held-out loss")
    for name in head(rows):
        table.add_column(name, no_wrap=True)
    best = lowest_loss(settings(judge(rows)))
    for group in best:
        table.add_row(*cells(group))
    console = Console()
    console.width = max(console.width, 210)
    console.print(table, *compare(best), sep="\n", markup=False)


def draw(rows: Sequence[Row], path: Path, rank: int) -> None:
    """One panel a kind of text, a line an adapter: held-out loss against KL; seeds faint, controls as crosses."""
    from matplotlib.figure import Figure

    kinds = list(rows[0]["retained"])
    figure = Figure(figsize=(4.2 * len(kinds), 4), layout="constrained")
    shown = [group for group in settings(rows) if group[0]["rank"] in (0, rank) and group[0]["method"] in PROJECTED]
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        lines: dict[str, list[tuple[float, float, dict[int, tuple[float, float]]]]] = {}
        for group in shown:
            seeds = {row["seed"]: (row["retained"][kind]["kl"], row["loss"]) for row in group}
            label = ", ".join(named(group[0]))
            middle = statistics.geometric_mean(max(kl, 1e-12) for kl, _ in seeds.values())
            lines.setdefault(label, []).append((middle, mean(group, "loss"), seeds))
        curves = {label: points for label, points in lines.items() if len(points) > 1}
        for i, (label, points) in enumerate(curves.items()):
            color, style = COLORS[i % len(COLORS)][0], ("o-", "s--", "^:")[i // len(COLORS) % 3]
            for seed in {seed for _, _, seeds in points for seed in seeds}:
                own = [seeds[seed] for _, _, seeds in points if seed in seeds]
                axis.plot(*zip(*own), "-", color=color, linewidth=0.6, alpha=0.3)
            middles = zip(*(point[:2] for point in points))
            axis.plot(*middles, style, color=color, markersize=3, linewidth=1.8, label=label)
        controls = [(label, points[0]) for label, points in lines.items() if len(points) == 1 and "texts" not in label]
        for (label, point), marker in zip(controls, "x+1234"):
            axis.plot(*point[:2], marker, color="black", label=label)
        axis.set(xscale="log", xlabel=f"KL, nats per token: {kind}", title=kind)
    figure.axes[0].set_ylabel("held-out preference loss")
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def read(path: Path) -> tuple[dict, list[Row]]:
    """Settings and runs of a study, and its rows."""
    with gzip.open(path, "rt") as lines:
        about, *rows = map(json.loads, lines)
    return about, rows


def finish(output_dir: Path, raw: Path, name: str) -> list[Row]:
    """All runs and lots in `output_dir` into RAW/retain-NAME.jsonl.gz, shown as a table and drawn."""
    about = json.loads((output_dir / "settings.json").read_text())
    kept = {option: about[option] for option in ("trainer", "judge")}
    about = kept | {key: value for key, value in about.items() if not isinstance(value, (str, list))}  # without paths
    if (output_dir / K_TIME).exists():
        about["seconds_of_k"] = json.loads((output_dir / K_TIME).read_text())
    about["runs"] = [
        {"adapter": path.parent.name} | json.loads(path.read_text())
        for path in sorted(output_dir.glob("*-s*/run.json"))
    ]
    lots = [path for path in sorted(output_dir.glob("*-s*/*.json")) if path.name.startswith(LOTS)]
    rows = [row for path in lots for row in json.loads(path.read_text())]
    if not rows:
        return []
    raw.mkdir(parents=True, exist_ok=True)
    path = raw / f"retain-{name}.jsonl.gz"
    write_packed(path, [about, *rows])
    show(rows, name)
    draw(rows, output_dir / "retain.png", shown_rank(rows))
    print(f"{words(about)}\nRows: {path}; picture: {output_dir / 'retain.png'}")
    return rows


def shown_rank(rows: Sequence[Row]) -> int:
    """12, the default, or else the largest."""
    ranks = {row["rank"] for row in rows}
    return 12 if 12 in ranks else max(ranks)
