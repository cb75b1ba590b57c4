"""Retained texts under DDP and FSDP2: the same as in one process, and resumed to the same end."""

import pytest
import torch
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


def test_a_trained_adapter_goes_on_under_ddp(launch):
    options = ON | {"trained_before": True}
    assert difference(launch("ddp", **options), launch("one", **options)) < 1e-5


@pytest.mark.slow
def test_a_trained_adapter_under_fsdp_is_refused(tmp_path):
    with pytest.raises(AssertionError):
        run(tmp_path, 2, **(SAME | LAUNCHES["fsdp"][1] | ON | {"trained_before": True}))
    assert "launch with DDP, or merge the adapter into the base model" in (tmp_path / "log").read_text()
