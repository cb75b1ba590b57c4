"""The launch configs: each parses with Accelerate's own parser, and the one for two CPU processes runs."""

import os
import signal
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT

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
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=150)
        except subprocess.TimeoutExpired:  # such runs were seen to hang at exit, when all is done
            os.killpg(process.pid, signal.SIGKILL)
    output = (tmp_path / "log").read_text()
    assert "NSPO2, mean of what was logged" in output and "nspo2/variance_reduction" in output, output[-3000:]
    assert (tmp_path / "adapter_model.safetensors").is_file()
