"""`nspo2 retain`: what it writes, which point it keeps, what it refuses before it works."""

import json
import shutil

import pytest
from conftest import write
from retained import adapted, sentences
from safetensors.torch import load_file, save_file

from nspo2_trl.cli import command, retain
from nspo2_trl.cli.frontier import choose, scaled_kl


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(path)
    return str(path)


@pytest.fixture
def texts(tmp_path) -> str:
    return write(tmp_path / "prose.jsonl", [{"text": text} for text in sentences()])


@pytest.fixture
def few_pairs(tmp_path, pairs) -> str:
    return write(tmp_path / "pairs.jsonl", list(pairs.select(range(12))))


def run(*options) -> None:
    command.main(["retain", *map(str, options)])


def refused(*options) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*options)
    return str(stop.value)


def test_the_frontier_and_the_point_that_is_kept(adapter, texts, few_pairs, tmp_path, capsys):
    other = write(tmp_path / "other.jsonl", [{"text": text} for text in sentences(9, seed=5)])
    out = tmp_path / "out"
    grid = ["--ranks", 0, 4, 12, "--scales", 1, 1.2]
    run(
        *[adapter, "--retain_dataset", texts, "--retain_eval_dataset", other, "--dataset_name", few_pairs],
        *["--output_dir", out, "--max_loss_increase", 0.5, *grid],
    )
    result = json.loads((out / "retain.json").read_text())
    points = result["points"]
    assert [(p["rank"], p["scale"]) for p in points] == [(0, 1), (0, 1.2), (4, 1), (4, 1.2), (12, 1), (12, 1.2)]
    best = min(points, key=lambda point: point["retained"]["prose"]["kl"])
    assert result["chosen"] == choose(points, ["prose"], 0.5) == best and best["rank"]
    assert result["retain_dataset"] == ["prose"] and result["retain_eval_dataset"] == ["other"]
    for point in points:
        assert set(point) == {"rank", "scale", "form", "retained", "loss", "accuracy", "margin"}
        assert set(point["retained"]) == {"prose", "other"} and point["retained"]["other"]["kl"] > 0
    assert result["leakage"]["0"] == 1 > result["leakage"]["4"] > result["leakage"]["12"] > 0
    assert (out / "retain.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "only scaled" in printed and f"{best['retained']['other']['kl']:.5f}" in printed
    assert f"{out} ({best['rank']} directions taken out, scale {best['scale']:g})" in printed
    # the page
    command.main(["report", str(out)])
    page = (out / "report.html").read_text()
    kept = f"<th>{best['retained']['other']['kl']:.5f}</th>"
    assert kept in page and "What the model kept: out" in page and "data:image/png;base64," in page
    assert "KL, other" in page and "<h2>Learning</h2>" not in page
    # what was written is what was measured
    again = tmp_path / "again"
    run(out, "--retain_dataset", texts, "--dataset_name", few_pairs, "--output_dir", again, "--point", 0, 1)
    measured = json.loads((again / "retain.json").read_text())["points"][0]
    assert measured["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert measured["retained"]["prose"] == pytest.approx(best["retained"]["prose"], rel=1e-3)


def test_without_pairs_one_point_is_made_and_a_point_may_be_chosen(adapter, texts, tmp_path):
    run(adapter, "--retain_dataset", texts, "--output_dir", tmp_path / "default")
    run(adapter, "--retain_dataset", texts, "--output_dir", tmp_path / "own", "--point", 4, 0.9, "--form", "ridge")
    found = [json.loads((tmp_path / name / "retain.json").read_text()) for name in ("default", "own")]
    assert [[(p["rank"], p["scale"], p["form"]) for p in result["points"]] for result in found] == [
        [(0, 1, "hard"), (12, 1.2, "hard")],
        [(0, 1, "hard"), (4, 0.9, "ridge")],
    ]
    assert all(result["chosen"] == result["points"][1] for result in found)
    assert not (tmp_path / "default/retain.png").exists()


def test_nothing_is_overwritten_and_nothing_is_read_before(adapter, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(retain, "load_model", lambda args: pytest.fail("the model was loaded"))
    message = refused(adapter, "--retain_dataset", texts, "--output_dir", adapter)
    assert message == f"error: `--output_dir` {adapter!r} holds an adapter already: choose another folder."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--point", "4", "x"], "`--point` takes a rank and a scale"),
        (["--scales", "-1", "--dataset_name", "pairs"], "`scale` must be a number above 0"),
        (["--ranks", "96", "--dataset_name", "pairs"], "`rank` 96 would take all 96 directions"),
        (["--dataset_name", "prose"], "no column `chosen` and `rejected`"),
        (["--retain_eval_dataset", "none.jsonl"], "`retain_eval_dataset`: there is no file or folder"),
        (["--retain_dataset", "pairs"], "holds preference pairs"),
        (["--retain_dataset", "answers", "--dataset_name", "pairs"], "are texts of the preference pairs"),
        (["--retain_dataset", "chosen", "--dataset_name", "pairs"], "are texts of the preference pairs"),
        (["--model_name_or_path", "nowhere"], "The base model 'nowhere' could not be loaded"),
        (
            ["--max_loss_increase", "-1", "--dataset_name", "pairs"],
            "`--max_loss_increase` must be a number of at least 0",
        ),
        (["--max_loss_increase", "nan", "--dataset_name", "pairs"], "`--max_loss_increase` must be a number"),
        (["--ranks", "4", "--scales", "1"], "`--ranks` and `--scales`: without pairs there is nothing to choose by"),
        (["--retain_samples", "0"], "`--retain_samples` must be a whole number of at least 2"),
        (["--output_dir", ""], "`output_dir` is empty"),
        (["--output_dir", "prose"], "is a file: choose a folder"),
        (["--rank", "3"], "There is no option `--rank`. Did you mean `--ranks`?"),
    ],
)
def test_what_cannot_work_is_refused(adapter, texts, few_pairs, pairs, tmp_path, options, message):
    answers = write(tmp_path / "answers.jsonl", [{"text": p["prompt"] + p["chosen"]} for p in pairs.select(range(12))])
    chosen = write(tmp_path / "chosen.jsonl", [{"text": p["chosen"].strip()} for p in pairs.select(range(12))])
    files = {
        "pairs": few_pairs,
        "prose": texts,
        "answers": answers,
        "chosen": chosen,
        "none.jsonl": str(tmp_path / "none.jsonl"),
    }
    out = tmp_path / "out"
    options = ["--retain_dataset", texts, "--output_dir", out, *(files.get(option, option) for option in options)]
    assert message in refused(adapter, *options)
    assert not list(out.glob("adapter*"))


def test_an_adapter_of_a_diverged_run_is_refused(adapter, texts, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, broken / "adapter_model.safetensors")
    message = refused(broken, "--retain_dataset", texts, "--output_dir", tmp_path / "out")
    assert message == "error: The adapter 'default' has NaN or Inf in its weights: its training diverged."


def test_no_adapter_is_refused(texts, tmp_path):
    message = refused(tmp_path / "nothing", "--retain_dataset", texts, "--output_dir", tmp_path / "out")
    assert message.startswith(f"error: There is no adapter {str(tmp_path / 'nothing')!r}: give a folder")


def entry(rank, scale, loss, kl):
    return {"rank": rank, "scale": scale, "loss": loss, "retained": {"a": {"kl": kl}, "b": {"kl": 2 * kl}}}


def test_the_point_of_lowest_kl_within_the_allowed_loss():
    points = [entry(0, 1, 0.4, 0.1), entry(4, 1, 0.405, 0.03), entry(4, 0.5, 0.45, 0.01), entry(4, 1.2, 0.402, 0.04)]
    assert choose(points, ["a"], 0.02) is points[1]
    assert choose(points, ["a", "b"], 0.2) is points[2]
    assert choose(points, ["a"], 0.0) is points[0]


def test_the_scaled_adapter_at_the_same_loss():
    points = [entry(0, 1, 0.4, 0.1), entry(0, 0.5, 0.5, 0.001), entry(4, 1, 0.45, 0.001)]
    assert scaled_kl(points, "a", 0.45) == pytest.approx(0.01)
    assert scaled_kl(points, "b", 0.45) == pytest.approx(0.02)
    assert scaled_kl(points, "a", 0.51) is None and scaled_kl(points[:1], "a", 0.4) is None
