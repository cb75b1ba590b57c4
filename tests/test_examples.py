"""The demos run, and what they write is whole."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.mark.slow
def test_policy_gradient_example_prints_the_variance_with_and_without():
    command = [sys.executable, "examples/reinforce.py", "--steps", "40", "--batches", "40"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    raw, filtered = (float(value) for value in re.search(r"raw ([\d.]+) +filtered ([\d.]+)", printed).groups())
    removed = float(re.search(r"variance removed +(-?[\d.]+)%", printed)[1]) / 100
    assert 0 < filtered < raw and removed == pytest.approx(1 - filtered / raw, abs=0.01)


def test_comparison_on_the_quadratic(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import compare

    compare.main(["--steps", "60", "--seeds", "0", "1", "--output_dir", str(tmp_path)])
    assert "hybrid" in capsys.readouterr().out
    raw = json.loads((tmp_path / "comparison.json").read_text())
    assert raw["settings"]["seeds"] == [0, 1]
    assert {(run["name"], run["seed"]) for run in raw["runs"]} == {
        (method, seed) for method in ("plain", "noise", "keep", "hybrid") for seed in (0, 1)
    }
    assert all(run["spectra"] for run in raw["runs"] if run["name"] != "plain")
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<figure") > 8 and not re.search(r"(src|href)=.?https?:", page)  # self-contained
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_comparison_on_a_recipe(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import compare

    monkeypatch.chdir(ROOT)
    rows = ROOT / "recipes/quickstart/data/test.jsonl.gz"
    options = ["--max_steps", "6", "--eval_steps", "3", "--logging_steps", "3", "--nspo2_update_freq", "2"]
    options += ["--per_device_train_batch_size", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
    options += ["--dataset_name", str(rows), "--methods", "plain", "keep", "--output_dir", str(tmp_path)]
    compare.main(["--recipe", "recipes/quickstart/dpo.yaml", *options])
    runs = {run["name"]: run for run in json.loads((tmp_path / "comparison.json").read_text())["runs"]}
    assert [entry["step"] for entry in runs["plain"]["evals"]] == [0, 3, 6]
    assert "nspo2/variance_reduction" in runs["keep"]["train"][-1] and "nspo2/rank" not in runs["plain"]["train"][-1]


def test_comparison_refuses_options_without_a_recipe(tmp_path, capsys):
    import compare

    with pytest.raises(SystemExit):
        compare.main(["--learning_rate", "1", "--output_dir", str(tmp_path)])
    assert "is no option without --recipe" in capsys.readouterr().err
