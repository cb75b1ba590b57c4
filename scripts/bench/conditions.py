"""docs/conditions.md from the raw files: where noise projection beats tuned AdamW and where it does not."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .grid import read
from .methods import WORDS
from .pictures import PLAIN, colour
from .studies import CORE, STUDIES
from .tables import JUDGED, add_kept, compare, difference, line, rate, removed, words

TITLES = {"regimes": "The map", "ideas": "Changes of the filter", "kept": "What is kept"}
REGIMES = [name for name in STUDIES if name != "ideas" and not name.startswith("kept-")]


def rows_of(raw: Path, convergence: dict[str, list[dict]]) -> dict[str, dict[tuple[str, str], list[dict]]]:
    """By topic the rows of each study and task with reported runs; of `convergence` those that all studies have."""
    found: dict[str, dict[tuple[str, str], list[dict]]] = {topic: {} for topic in TITLES}
    for study in STUDIES:
        topic = "regimes" if study in REGIMES else "kept" if study.startswith("kept-") else study
        if study == "convergence":
            compared = {task: [row for row in rows if row["method"] in CORE] for task, rows in convergence.items()}
        else:
            records = read(raw, study)
            tasks = dict.fromkeys(record["cell"]["task"] for record in records)
            compared = {task: compare(records, task) for task in tasks}
        found[topic] |= {(study, task): rows for task, rows in compared.items() if rows}
    return found


def outcome(row: dict) -> str:
    """The difference to plain as a share of its loss, and the verdict where there is one."""
    shown = difference(row)[1]
    text = words(*row["gap"], "+.1f", 100, " %")
    return text if shown == "no difference shown" else f"{text}: **{shown}**"


def overview(found: dict[tuple[str, str], list[dict]]) -> list[str]:
    """A row a condition, a column a method of ours."""
    names = [name for name in CORE if name != "plain"]
    lines = [line(["conditions", "task", *(f"`{name}`" for name in names)]), "|---" * (2 + len(names)) + "|"]
    for (study, task), rows in found.items():
        cells = {row["method"]: outcome(row) for row in rows if row["chosen"]}
        lines.append(line([f"`{study}`", task, *(cells.get(name, "") for name in names)]))
    return [*lines, ""]


def details(found: dict[tuple[str, str], list[dict]]) -> list[str]:
    head = ["conditions", "task", "method", "rate", "held-out loss", "difference to plain [95 %]", "", "noise removed"]
    lines = [line([*head, "gold score", "KL", "forgotten", "seeds"]), "|---" * 12 + "|"]
    for (study, task), rows in found.items():
        for row in rows:
            figures = [f"{row['loss']:.4f}", *difference(row), removed(row), f"{row['gold']:.2f}", f"{row['kl']:.1f}"]
            figures.append("" if np.isnan(row["forgotten"]) else f"{row['forgotten']:.1f}")
            lines.append(line([f"`{study}`", task, f"`{row['method']}`", rate(row), *figures, str(row["seeds"])]))
    return [*lines, ""]


def skills(found: dict[tuple[str, str], list[dict]]) -> list[str]:
    """What the model could before, of the rows where it was measured."""
    shown = [(study, task, row) for (study, task), rows in found.items() for row in rows if row["before"]]
    if not shown:
        return []
    able = shown[0][2]["before"]
    about = f"""A second skill that no pair is about and that every answer needs, in the samples: grammar is the share
of sentences that the grammar of the stories could have written ({able["grammar"]:.3f} in those of the reference),
memory the share of names and things that the prompt has too ({able["memory"]:.3f}). A method at the rate that was
chosen for it is compared with plain at plain's, at another rate with plain at the same."""
    head = ["conditions", "task", "method", "rate"]
    head += [part for name in ("gold score", "KL", "forgotten", *able) for part in (name, "less plain's [95 %]")]
    lines = [line(head), "|---" * len(head) + "|"]
    for study, task, row in shown:
        figures = []
        for name, (value, apart, bounds) in row["kept"].items():
            form = {"gold": ".2f", "kl": ".1f", "forgotten": ".1f"}.get(name, ".3f")
            figures += [f"{value:{form}}", "" if row["itself"] else words(apart, bounds, f"+{form}")]
        lines.append(line([f"`{study}`", task, f"`{row['method']}`", rate(row), *figures]))
    return [about, "", *lines, ""]


def draw(found: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """One panel a study and task: each method's difference to plain with its interval."""
    across = min(4, len(found))
    down = -(-len(found) // across)
    high = 0.7 + 0.19 * max(len(rows) for rows in found.values())
    figure, panels = plt.subplots(down, across, figsize=(4.2 * across, 0.5 + high * down), layout="constrained")
    panels = np.atleast_1d(panels).flatten()
    for panel in panels[len(found) :]:
        panel.remove()
    for panel, ((study, task), rows) in zip(panels, found.items()):
        shown = [row for row in rows if not row["itself"] and np.isfinite(row["gap"][0])]
        labels = [row["method"] + ("" if row["chosen"] else f" at {row['lr']:g}") for row in shown]
        for height, row in enumerate(shown):
            value, bounds = row["gap"]
            panel.plot(100 * value, height, "o", color=colour(row["method"]), markersize=4)
            if bounds:
                panel.plot([100 * end for end in bounds], [height] * 2, color=colour(row["method"]), linewidth=1.5)
        panel.axvline(0, color=PLAIN, linewidth=1)
        panel.set_yticks(range(len(shown)), labels, fontsize=7)
        panel.invert_yaxis()
        panel.set_title(f"{study}, {task}", fontsize=9)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2, axis="x")
    figure.supxlabel("held-out loss less plain AdamW's, % of it (left of 0: better), with 95 % intervals", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_kept(found: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """Gold score against what was forgotten and the second skill, a row a task: up, left and then right is better."""
    tasks = list(dict.fromkeys(task for _, task in found))
    methods = dict.fromkeys(row["method"] for rows in found.values() for row in rows)
    colours = dict(zip(methods, (PLAIN, *plt.get_cmap("tab10").colors)))
    panels_of = {"forgotten": "forgotten: mean of log p of the reference - log p over its answers, nats"}
    panels_of |= {"grammar": "share of sentences within the grammar", "memory": "share of names and things remembered"}
    figure, panels = plt.subplots(
        len(tasks), 3, figsize=(14, 4.4 * len(tasks)), layout="constrained", squeeze=False, sharey="row"
    )
    for across, task in zip(panels, tasks):
        for panel, (what, label) in zip(across, panels_of.items()):
            for (study, own), rows in found.items():
                for row in rows if own == task else []:
                    place = row["kept"].get(what, [np.nan])[0]
                    if np.isfinite([place, row["gold"]]).all():
                        panel.plot(place, row["gold"], "o", color=colours[row["method"]], markersize=5)
                        text = f"{study.removeprefix('kept-')}, {row['lr']:g}"
                        panel.annotate(text, (place, row["gold"]), (4, 3), textcoords="offset points", size=6)
            panel.set_xlabel(label, fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.2)
        across[0].set_ylabel(f"{task}: gold score", fontsize=8)
    dots = [plt.Line2D([], [], marker="o", linestyle="", color=colours[name], label=name) for name in methods]
    figure.legend(
        handles=dots,
        loc="outside upper center",
        ncols=len(dots),
        fontsize=8,
        title="beta (or again: 0.1, other seeds), learning rate",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines_of(raw: Path, docs: Path, convergence: dict[str, list[dict]]) -> tuple[list[str], list[Path]]:
    """The generated part of the page, and the plots; empty where no study but `convergence` has been run.

    Args:
        convergence: the rows of that study by task, as [`compare`] gives them.
    """
    topics = rows_of(raw, convergence)
    if not any(study != "convergence" for found in topics.values() for study, _ in found):
        return [], []
    lines, paths = [], []
    for topic, found in topics.items():
        if not found:
            continue
        if topic == "kept":
            add_kept([row for rows in found.values() for row in rows])
        paths.append(docs / f"conditions_{topic}.png")
        (draw_kept if topic == "kept" else draw)(found, paths[-1])
        studies = dict.fromkeys(study for study, _ in found)
        methods = dict.fromkeys(row["method"] for rows in found.values() for row in rows)
        lines += [f"## {TITLES[topic]}", "", *(f"- `{study}`: {STUDIES[study]['words']}" for study in studies), ""]
        if topic == "regimes":
            lines += ["Held-out loss against plain AdamW's:", "", *overview(found), JUDGED, ""]
        what = (
            "gold score against what was forgotten, grammar and memory"
            if topic == "kept"
            else "differences to plain AdamW"
        )
        lines += [f"![{TITLES[topic]}: {what}]({paths[-1].name})", "", *details(found)]
        if topic == "kept":
            lines += skills(found)
        if topic != "regimes":
            lines += ["The methods:", "", *(f"- `{name}`: {WORDS[name]}" for name in methods), ""]
    return lines, paths
