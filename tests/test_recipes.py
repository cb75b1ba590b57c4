"""The launch configs: each parses with Accelerate's own parser, and the one for two CPU processes runs."""

import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, launch_and_log

CONFIGS = sorted((ROOT / "recipes/accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_configs_parse(path):
    config = load_config_from_file(str(path))  # raises on unknown keys
    kind = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "cpu_2proc": "MULTI_GPU"}[path.stem]
    assert config.distributed_type == kind
    assert (config.num_processes > 1) == (path.stem != "single_gpu")
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    assert f"accelerate_configs/{path.name}" in path.read_text().split("compute_environment")[0]  # says how to use it


def test_the_two_process_config_runs(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "recipes/accelerate_configs/cpu_2proc.yaml", "scripts/train.py"]
    command += ["--config", "recipes/quickstart/dpo.yaml", "--use_cpu", "true", "--max_steps", "6"]
    command += [
        "--nspo2_update_freq",
        "2",
        "--eval_strategy",
        "no",
        "--logging_steps",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    output = launch_and_log(command, tmp_path / "log", timeout=150)
    assert "NSPO2, mean of what was logged" in output and "nspo2/variance_reduction" in output, output[-3000:]
    assert (tmp_path / "adapter_model.safetensors").is_file()
