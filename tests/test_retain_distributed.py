"""Retained texts under DDP and FSDP2: the same as in one process, and resumed to the same end."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from retained import adapted, sentences
from safetensors.torch import load_file
from test_distributed import LAUNCHES, SAME, SAVES, assert_identical, difference, launch, run

assert launch  # a fixture

ON = {"retain": True, "nspo2_projection_rank": 0, "nspo2_retain_samples": 24, "nspo2_retain_rank": 6}
SLOW = [
    pytest.param(name, options, marks=pytest.mark.slow)
    for name in ("ddp", "fsdp")
    for options in (
        {"nspo2_retain_project": "during"},
        {"retain": False, "nspo2_retain_dataset": "self", "nspo2_retain_max_length": 40},
    )
]


@pytest.mark.parametrize(("name", "options"), [("ddp", {}), ("fsdp", {}), *SLOW])
def test_the_same_texts_end_with_the_same_adapters(launch, name, options):
    one, spread = launch("one", **(ON | options)), launch(name, **(ON | options))
    assert difference(spread, one) < 1e-5
    assert difference(launch("one", **(ON | options | {"nspo2_retain_kl": 0})), one) > 1e-3
    assert spread["figures"]["nspo2/retain_kl"] == pytest.approx(one["figures"]["nspo2/retain_kl"], rel=1e-3)
    during = options.get("nspo2_retain_project") == "during"
    folders = [spread["out"], spread["out"] / ("." if during else "unprojected")]
    written, before = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    for key, param in spread["params"].items():
        assert torch.equal(written[key.replace(".default", "")], param)
    changed = {key for key in written if not torch.equal(written[key], before[key])}
    assert changed == (set() if during else {key for key in written if "lora_A" in key})


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_resumes_to_the_same_end(launch, tmp_path, name):
    whole = launch(name, **ON, **SAVES)
    again = run(tmp_path, 2, resume=whole["out"] / "checkpoint-5", **(SAME | LAUNCHES[name][1] | ON | SAVES))
    assert_identical(again, whole)


@pytest.mark.slow
def test_a_trained_adapter_goes_on_under_ddp(launch):
    options = ON | {"trained_before": True}
    assert difference(launch("ddp", **options), launch("one", **options)) < 1e-5


@pytest.mark.slow
def test_a_trained_adapter_under_fsdp_is_refused(tmp_path):
    with pytest.raises(AssertionError):
        run(tmp_path, 2, **(SAME | LAUNCHES["fsdp"][1] | ON | {"trained_before": True}))
    assert "launch with DDP, or merge the adapter into the base model" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences()))
    options = ["--retain_dataset", "texts.jsonl", "--dataset_name", str(ROOT / "recipes/quickstart/data")]
    options += ["--ranks", "4", "--scales", "1"]
    two = [
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "recipes/accelerate_configs/cpu_2proc.yaml"),
        "-m",
    ]
    for out, launcher in (("one", []), ("two", two)):
        command = [sys.executable, "-m", *launcher, "nspo2_trl.cli.retain", "adapter", *options, "--output_dir", out]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.count("Figures: ") == 1
    one, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "two"))
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
    points = [json.loads((tmp_path / out / "retain.json").read_text())["points"] for out in ("one", "two")]
    assert [p["loss"] for p in points[1]] == pytest.approx([p["loss"] for p in points[0]], rel=1e-5)
