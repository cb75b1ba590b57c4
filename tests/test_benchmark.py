"""scripts/benchmark.py: its tables and files; what it measures is no business of a test."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import benchmark


def figures_of(monkeypatch, tmp_path, *options: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options, "--use_cpu", "--out", str(tmp_path / "found.json")])
    benchmark.main()
    return json.loads((tmp_path / "found.json").read_text())["cells"]


def test_sizes_of_adapters_alone(monkeypatch, tmp_path, capsys):
    options = ["--sizes", "10m", "--update_freq", "6", "--projection_rank", "4", "--micro_batches", "2"]
    options += ["--covariance", "adapter", "factored", "--basis_dtype", "float32"]
    adapter, factored = figures_of(monkeypatch, tmp_path, "sizes", *options)
    assert "NSPO2 on adapters alone" in capsys.readouterr().out
    assert adapter["blocks"] == 56 and adapter["adamw_mib"] == 8 * adapter["entries"] / 2**20
    assert adapter["basis_mib"] == pytest.approx(8 * adapter["entries"] * 4 / 2**20)  # 8 directions are tracked
    # by the LoRA rank, 5 directions of a matrix of mean width, rounded for each width, one more than are removed
    assert factored["basis_mib"] == pytest.approx(adapter["basis_mib"] / 16 * 5 / 8, rel=0.15)
    assert factored["state_of_adamw"] < 1 < adapter["state_of_adamw"] and factored["retained_mib"] < 2048
    assert all(cell["ms"]["solve"] > 0 and 0 < cell["solve_every"] <= 6 for cell in (adapter, factored))


@pytest.mark.slow
def test_overhead_of_a_recipe(monkeypatch, tmp_path, capsys):
    options = [
        "--config",
        str(ROOT / "recipes/quickstart/dpo.yaml"),
        "--steps",
        "4",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    (cell,) = figures_of(monkeypatch, tmp_path, "overhead", *options)
    assert "A training step with and without NSPO2" in capsys.readouterr().out
    assert cell["rank"] > 0 and cell["parts_ms"]["sampling"] > 0 and cell["parts_ms"]["projection"] > 0
