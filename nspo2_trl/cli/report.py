"""One self-contained HTML page with the plots of one or more training runs. Needs matplotlib to draw.

    nspo2 report OUT [OUT2 ...] [-o PAGE.html] [--names NAME ...]

OUT is a run's output_dir, a trainer_state.json, or the output_dir of `nspo2 retain` or `nspo2 measure`. Plots of a run
are drawn from the log in trainer_state.json, the spectrum of the noise from the nspo2_state.pt of its checkpoints.
Several runs are drawn over each other.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from . import frontier, noise
from .panels import PANELS
from .runs import Run, has_run, labels, read, unit_of

TEMPLATE = Path(__file__).with_suffix(".html")
OWN = '<meta name="generator" content="nspo2 report">'  # in the template
OTHERS = {"retain.json": frontier.section, noise.NOISE: noise.section}  # what other commands write
RUNS = Template("""$table
<p>Loss, accuracy and margins are those of the held-out pairs in the last evaluation; noise removed and NSPO2's share
of a step's time are means over the log. Times of runs on a machine that did other things too do not compare.</p>
<p class="legend">$legend</p>
<h2>Learning</h2>
<p>Thin lines are the training pairs, as logged; lines with points are held-out pairs. Nothing is smoothed.
Bands are one standard error to each side.</p>
<div class="panels">$learning</div>
$filtering""")


def write_page(runs: Sequence[Run], path: Path, title: str = "", sections: Sequence[tuple[str, str]] = ()) -> None:
    """Draw `runs` into one page, and `sections` of other commands, each a name and its HTML.

    The `title` names them if left out.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the page cannot be written.
    """
    from . import plots

    learning, filtering, missing = [], [], []  # type: list[str], list[str], list[str]

    def add(place: list[str], key: str, name: str, svg: str | None, caption: str) -> None:
        if svg is None:
            return missing.append(name)
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        place.append(f'<figure id="{key}"><h3>{html.escape(name)}</h3>{svg}{below}</figure>')

    for panel in PANELS:
        place = learning if panel.by_time else filtering
        add(place, panel.key, panel.title, plots.draw(panel, runs), panel.caption)
        if panel.by_time:
            add(place, f"{panel.key}-time", f"{panel.title}, against time", plots.draw(panel, runs, True), "")
    steps = "; ".join(f"{run.name}: {', '.join(str(s) for s, _ in run.spectra)}" for run in runs if run.spectra)
    caption = f"Mean over adapters, the later the stronger. {steps}."
    add(filtering, "spectrum", "Eigenvalues of the noise", plots.draw_spectrum(runs), caption)
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    if any(run.clock for run in runs):
        how = "Time is that of the training steps, without evaluation and saving"
        notes.insert(0, f"{how}; after a run’s last log entry it goes on at that entry’s pace.")
    if missing and runs:
        notes.append(f"Not logged in {'these runs' if len(runs) > 1 else 'this run'}: {', '.join(missing)}.")
    named = (f'<span class="swatch">{plots.swatch(run.index)}{html.escape(run.name)}</span>' for run in runs)
    drawn = RUNS.substitute(
        table=_table(runs),
        legend="".join(named),
        learning="\n".join(learning),
        filtering=f'<h2>What NSPO2 did</h2>\n<div class="panels">{"".join(filtering)}</div>' if filtering else "",
    )
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(
            title or "NSPO2 report: " + ", ".join([run.name for run in runs] or [name for name, _ in sections])
        ),
        light=" ".join(f"--run-{i}: {light};" for i, (light, _) in enumerate(plots.COLORS)),
        dark=" ".join(f"--run-{i}: {dark};" for i, (_, dark) in enumerate(plots.COLORS)),
        runs=drawn if runs else "",
        retained="\n".join(part for _, part in sections),
        notes=f"<h2>Notes</h2>\n<ul>{listed}</ul>" if notes else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what was measured, a row per run; – where it was not."""
    header = ["run", "steps", "training time", "loss", "accuracy", "margins", "at step"]
    header += ["noise removed", "NSPO2's share of time", "skipped steps"]
    rows = []
    for run in runs:
        seconds = run.seconds_at(run.steps) if run.clock else float("nan")
        unit, word = unit_of(seconds)
        figures = [
            f"{run.steps:g}",
            f"{seconds / unit:.1f} {word}",
            *(f"{run.last(f'eval_{key}'):#.4g}" for key in ("loss", "rewards/accuracies", "rewards/margins")),
            f"{run.evals[-1]['step']:g}" if run.evals else "–",
            f"{run.mean('nspo2/variance_reduction'):.1%}",
            f"{run.mean('overhead_share'):.1%}",
            f"{run.last('nspo2/skipped_steps'):g}",
        ]
        rows.append([run.name, *("–" if figure.startswith("nan") else figure for figure in figures)])
    return header, rows


def _table(runs: Sequence[Run]) -> str:
    header, rows = summary(runs)
    head = "".join(f"<th>{name}</th>" for name in header)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{cells}</tr>' for cells in lines)}</table>"
    return f'<div class="wide" role="region" aria-label="Runs" tabindex="0">{table}</div>'


# ---- the command ----


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="nspo2 report", description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="an output_dir, or a trainer_state.json")
    parser.add_argument("-o", "--output", type=Path, help="the page; default: report.html in the first OUT")
    parser.add_argument("--names", nargs="+", help="what to call the runs; default: their folders' names")
    args = parser.parse_args(argv)
    first = args.runs[0]
    page = args.output or (first.parent if first.is_file() else first) / "report.html"
    try:
        if args.names and (len(args.names) != len(args.runs) or len(set(args.names)) < len(args.names)):
            raise ValueError(f"`--names` must be {len(args.runs)} different names, one for each run.")
        refuse_to_overwrite(page)
        names = args.names or labels(args.runs)
        sections = [
            (name, section(name, path))
            for name, path in zip(names, args.runs)
            for file, section in OTHERS.items()
            if (path / file).is_file()
        ]
        others = [name for name, _ in sections]
        runs = [(path, name) for path, name in zip(args.runs, names) if has_run(path) or name not in others]
        write_page([read(path, name, i) for i, (path, name) in enumerate(runs)], page, sections=sections)
    except ImportError:
        sys.exit('error: the plots need matplotlib: pip install -e ".[plot]"')
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(page)


def refuse_to_overwrite(page: Path) -> None:
    """Raises `ValueError` where `page` is anything but a page that this command wrote."""
    if page.is_dir():
        raise ValueError(f"`--output` {str(page)!r} is a folder: give the name of a file.")
    if page.exists():
        with open(page, encoding="utf-8", errors="replace") as file:
            if OWN not in file.read(1000):
                raise ValueError(f"{str(page)!r} is not a page of this command: choose another file with `--output`.")


if __name__ == "__main__":
    main()
