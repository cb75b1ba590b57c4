"""DDP: two processes on this machine's CPU. Every launch has a time limit: such runs were seen to hang at exit."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = str(Path(__file__).parent / "two_processes.py")


def run(out: Path, processes: int, resume: Path | None = None, **options) -> dict:
    """Train in a fresh launch and return what it saved."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, SCRIPT]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [*launcher, "--master_port", str(port), SCRIPT]
    command += [str(out), json.dumps(options | {"processes": processes}), *([str(resume)] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(out / "log", "w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    output = (out / "log").read_text()
    assert (out / "result.pt").is_file(), output[-4000:]
    return torch.load(out / "result.pt", weights_only=True)


def difference(first: dict, second: dict) -> float:
    """Of the adapters, relative to their norm."""
    a, b = (torch.cat([p.flatten() for p in result["params"].values()]) for result in (first, second))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("optim", [pytest.param("sgd", marks=pytest.mark.slow), "adamw_torch"])
def test_two_ranks_equal_one_process_with_twice_the_accumulation(tmp_path, optim):
    rate = 0.05 if optim == "sgd" else 2e-3
    common = {"optim": optim, "learning_rate": rate, "max_steps": 10}
    one = run(tmp_path / "one", 1, gradient_accumulation_steps=4, **common)
    two = run(tmp_path / "two", 2, gradient_accumulation_steps=2, **common)
    plain = run(tmp_path / "plain", 1, gradient_accumulation_steps=4, plain=True, **common)
    assert difference(two, one) < 1e-6
    assert difference(plain, one) > 1e-4


@pytest.mark.slow
def test_rank_zero_equals_dpo_trainer_under_the_same_launch(tmp_path):
    ours = run(tmp_path / "ours", 2, nspo2_projection_rank=0)
    plain = run(tmp_path / "plain", 2, plain=True)
    assert ours["losses"] == plain["losses"]
    assert all(torch.equal(p, plain["params"][name]) for name, p in ours["params"].items())


def test_nan_on_one_rank_skips_the_step_on_both(tmp_path):
    result = run(tmp_path / "nan", 2, nan_rank=1)  # the script checks that the ranks hold the same adapters
    assert result["skipped"] == 1
    assert all(torch.isfinite(p).all() for p in result["params"].values())


def test_resume_under_ddp_equals_uninterrupted(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = run(tmp_path / "whole", 2, **saving)
    resumed = run(tmp_path / "resumed", 2, resume=tmp_path / "whole/checkpoint-5", **saving)
    assert whole["losses"] == resumed["losses"]
    assert all(torch.equal(p, resumed["params"][name]) for name, p in whole["params"].items())
