"""The pages are true to the code: their tables, messages, commands, links and Python blocks are checked against it."""

import ast
import re
import shlex
import sys
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from retained import sentences
from trl import DatasetMixtureConfig

from nspo2_trl import NSPO2, NSPO2Config, NSPO2DPOConfig
from nspo2_trl.cli import arguments, train
from nspo2_trl.cli.data import NSPO2ScriptArguments
from nspo2_trl.config import REMOVED
from nspo2_trl.engine.filter import figures
from nspo2_trl.metrics import METRICS

sys.path.insert(0, str(ROOT / "scripts"))
import docs as generated

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / "recipes").rglob("README.md"))]
MODULES = sorted((ROOT / "nspo2_trl").rglob("*.py"))
QUICK_START = "recipes/quickstart/dpo.yaml"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(page.read_text()) if kind == language]


def table(page: str, *header: str) -> list[list[str]]:
    """Rows of all tables of docs/`page` whose header begins with `header`."""
    found, inside = [], False
    for line in FENCED.sub("", (ROOT / "docs" / page).read_text()).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|-"):
            found.append(cells)
        elif cells[: len(header)] == list(header):
            inside = True
    assert found, f"{page} has no table with the header {header}"
    return found


def names(rows: list[list[str]]) -> list[str]:
    """What stands in the code spans of each row's first cell."""
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]


# ---- links ----


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text()), re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {slug if i == 0 else f"{slug}-{i}" for slug, n in Counter(slugs).items() for i in range(n)}


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if ":" in target.split("/")[0]:
            assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[^\s]*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), f"{target}: {sorted(anchors(file))}"


@each_page
def test_paths_are_there(page):
    folders = "recipes|scripts|examples|benchmarks|tests|nspo2_trl"
    for path in set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", page.read_text())):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


def test_the_index_has_every_page():
    assert sorted(name for row in table("README.md", "page") for name in re.findall(r"\((.+?)\)", row[0])) == sorted(
        page.name for page in DOCS if page.name != "README.md"
    )


# ---- options ----


def defaults(config_class) -> dict:
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config_class)}


def test_the_tables_of_options_and_metrics_are_up_to_date():
    for name, rows in {"options.md": generated.options(), "metrics.md": generated.metrics()}.items():
        assert generated.page(name, rows) == (ROOT / "docs" / name).read_text(), "run python scripts/docs.py"


def test_every_option_of_the_data_has_its_default():
    expected = defaults(NSPO2ScriptArguments) | defaults(DatasetMixtureConfig)
    rows = table("options.md", "option", "default", "what it does")
    assert {row[0].strip("`"): row[1] for row in rows} == {name: f"`{value}`" for name, value in expected.items()}
    for flag in names(table("options.md", "option", "what it does")):
        assert flag in (ROOT / "nspo2_trl/cli/command.py").read_text() + arguments.LAUNCH + arguments.HELP, flag


@each_page
def test_options_that_are_named_exist(page):
    known = {name for name in defaults(NSPO2DPOConfig) if name.startswith("nspo2_")}
    known |= {"nspo2_trl", "nspo2_state", "nspo2_run"}
    if page.name == "CHANGELOG.md":
        known |= {f"nspo2_{name}" for name in REMOVED}
    assert set(re.findall(r"(?<!\w)nspo2_\w+", page.read_text())) <= known


# ---- metrics ----


def logged(trainer) -> set[str]:
    trainer.train()
    return {key for entry in trainer.state.log_history for key in entry if key.startswith("nspo2/")}


def planted() -> NSPO2:
    """An engine that has seen enough of a planted problem to tell all that it can."""
    torch.manual_seed(0)
    scale = torch.ones(50)
    scale[:4] = 6
    config = NSPO2Config(
        strategy="noise", update_freq=5, projection_rank=4, min_rank=2, trust_radius=1.0, target_bias=1.0
    )
    engine = NSPO2(config, recent=False)
    for _ in range(80):
        engine.step(1 + scale * torch.randn(4, 1, 1, 50), None)
    return engine


def test_every_figure_is_explained_and_every_explained_one_is_logged(make_trainer):
    engine = planted()
    can_be = logged(make_trainer(max_steps=4, trainer={"retain_dataset": sentences()})) | {
        f"nspo2/{name}" for name in figures([engine])
    }
    assert sorted(can_be) == sorted(f"nspo2/{name}" for name in METRICS)
    without = logged(make_trainer(max_steps=1, nspo2_enabled=False))
    assert without == {f"nspo2/{name}" for name in ("step_time", "batch_size")}
    for page in PAGES:
        assert {f"nspo2/{key}" for key in re.findall(r"`nspo2/(\w+)`", page.read_text())} <= can_be, page
    by_hand = [row for row in table("metrics.md", "key", "what it is") if len(row) == 2]
    assert names(by_hand) == list(engine.get_metrics())


# ---- messages ----


def messages() -> list[re.Pattern]:
    """Every text in the package, with what is filled in left open."""
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = re.split(r"%[.\d]*[sdfg]()", node.value)
                parts = [part or None for part in parts]
            else:
                continue
            if sum(len(part or "") for part in parts) < 12:
                continue
            text = "".join(".*" if part is None else re.escape(" ".join(part.split(" "))) for part in parts)
            found.append(re.compile(text))
    return found


def test_messages_are_the_codes_own():
    known = messages()
    shown = [" ".join(text.split()) for page in DOCS for text in blocks(page, "text")]
    assert len(shown) > 10
    for text in shown:
        assert any(pattern.fullmatch(text) for pattern in known), text


# ---- commands ----


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


@each_page
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = {option for action in arguments.make_parser()._actions for option in action.option_strings}
    for words in commands(page):
        words = words[sum("=" in word for word in words[:2] if not word.startswith("-")) :]  # variables come first
        assert words[0] in ("accelerate", "mypy", "nspo2", "pip", "python", "ruff"), words
        for word in words:
            if re.match(r"(recipes|scripts|examples|tests|benchmarks|docs)/", word):
                assert Path(word).exists(), word
        words = [QUICK_START if word == "RECIPE" else word for word in words]
        if "scripts/train.py" in words:
            argv = words[words.index("scripts/train.py") + 1 :]
        elif words[:2] in (["nspo2", "train"], ["nspo2", "measure"]):
            argv = words[2:]
            for option in ("--num_processes", "--accelerate_config", "--steps"):
                if option in argv:
                    del argv[argv.index(option) : argv.index(option) + 2]
        else:
            script = words[1]
            if words[0] == "nspo2":
                script = f"nspo2_trl/cli/{'retain_arguments' if words[1] == 'retain' else 'report'}.py"
            if words[0] == "nspo2" or words[0] == "python" and script.endswith(".py"):
                text = Path(script).read_text()
                for part in ("convergence", "retain"):
                    text += Path(f"scripts/bench/{part}.py").read_text() * (script == "scripts/benchmark.py")
                for flag in [word for word in words if word.startswith("--") and word not in known]:
                    assert f'"{flag}"' in text, f"{script} has no {flag}"
            continue
        train.parse([*argv, *([] if "--use_cpu" in argv else ["--use_cpu", "true"])])


# ---- Python ----


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    """Those of the README each by itself."""
    for name in ("recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    shared = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(block, {"__name__": "readme"} if page.parent == ROOT else shared)


def test_the_claims_are_the_same_in_the_readme():
    claims = table("results.md", "claim", "published")
    assert len(claims) == 4 and claims == table("../README.md", "claim", "published")


# ---- the house ----


def test_the_map_has_every_module_once():
    assert sorted(names(table("development.md", "module"))) == sorted(
        path.name for path in MODULES if path.name != "__init__.py"
    )


def test_tests_that_are_named_exist():
    defined = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
        for path in (ROOT / "tests").glob("*.py")
    }
    for page in PAGES:
        for file, name in re.findall(r"tests/(test_\w+\.py)::(\w+)", page.read_text()):
            assert name in defined[file], f"{page.name}: {file}::{name}"
    for name in re.findall(r"`(test_\w+)`", (ROOT / "docs/development.md").read_text()):
        assert any(name in there for there in defined.values()), name
