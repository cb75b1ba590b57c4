"""Write the tables of options and of metrics into docs/options.md and docs/metrics.md, from the tables in the code.

python scripts/docs.py [--check]
"""

import re
import sys
from pathlib import Path

from nspo2_trl.config import OPTIONS
from nspo2_trl.metrics import METRICS
from nspo2_trl.retain_config import RETAIN_OPTIONS
from nspo2_trl.rows import SAME
from nspo2_trl.training.options import TRAINER_OPTIONS, NSPO2Arguments

DOCS = Path(__file__).parent.parent / "docs"


def prefixed(words: str) -> str:
    """`words` with the options as recipes name them."""
    return re.sub(rf"`({'|'.join(TRAINER_OPTIONS)})`", r"`nspo2_\1`", words)


def options() -> list[str]:
    fields = NSPO2Arguments.__dataclass_fields__
    enabled = fields["nspo2_enabled"]
    rows = ["| option | default | range | what it does, and when to change it |", "|---|---|---|---|"]
    rows.append(f"| `nspo2_enabled` | `{enabled.default}` | true or false | {enabled.metadata['help']} |")
    for name, row in OPTIONS.items():
        meta, default = row.metadata, f"`{row.default}`"
        if name == "max_rank":
            default = f"2 × `nspo2_projection_rank` ({default})"
        elif meta["trainer"] not in (SAME, None):
            default = f"`{meta['trainer']}` ({default})"
        shown, words = f"`nspo2_{name}`", prefixed(meta["help"])
        if name not in TRAINER_OPTIONS:
            shown, words = f"`{name}`", f"(`NSPO2Config` only) {words}"
        rows.append(f"| {shown} | {default} | {meta['must_be']} | {words} |")
    for name, row in RETAIN_OPTIONS.items():
        meta = row.metadata
        rows.append(f"| `nspo2_retain_{name}` | `{row.default}` | {meta['must_be']} | {meta['help']} |")
    return rows


def metrics() -> list[str]:
    rows = ["| key | what it is | unit |", "|---|---|---|"]
    return rows + [f"| `nspo2/{name}` | {words} | {unit} |" for name, (words, unit) in METRICS.items()]


def page(name: str, rows: list[str]) -> str:
    """The page with `rows` between its two marks."""
    text = (DOCS / name).read_text()
    begin, end = "<!-- from here: python scripts/docs.py -->\n", "<!-- to here -->"
    before, rest = text.split(begin)
    return before + begin + "\n".join(rows) + "\n" + end + rest.split(end, 1)[1]


def main(check: bool) -> None:
    for name, rows in {"options.md": options(), "metrics.md": metrics()}.items():
        wanted = page(name, rows)
        if check and wanted != (DOCS / name).read_text():
            sys.exit(f"docs/{name} is not up to date: run `python scripts/docs.py`.")
        (DOCS / name).write_text(wanted)


if __name__ == "__main__":
    main("--check" in sys.argv)
