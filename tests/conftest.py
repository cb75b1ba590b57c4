"""Shared pieces: the quick start's model and pairs, which the project made itself, and tiny trainers on them."""

import json
import os
import signal
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # for models this small a second thread only costs time

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "recipes/quickstart/model")
SHARED = ROOT.parent / "shared"

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ARGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "max_steps": 8,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "model_init_kwargs": {"dtype": "float32"},
    "seed": 0,
}
FAST_NSPO2 = {"nspo2_update_freq": 2, "nspo2_projection_rank": 4, "nspo2_max_rank": 8, "nspo2_min_rank": 4}


def configure(config_class, nspo2_min_rank: int = 0, **options):
    """A trainer's config; with `nspo2_min_rank`, for which users have no option, it filters within a few steps."""
    config = config_class(**options)
    config.nspo2_min_rank = nspo2_min_rank
    return config


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def pairs():
    from datasets import load_dataset

    data = load_dataset(str(ROOT / "recipes/quickstart/data"))
    columns = ["prompt", "chosen", "rejected"]
    return data["train"].select(range(64)).select_columns(columns)


@pytest.fixture
def make_trainer(pairs, tmp_path):
    """`make(cls, lora={}, model=None, trainer={}, **args)`: a trainer on the quick start's model, not yet trained."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from nspo2_trl import NSPO2DPOConfig, NSPO2DPOTrainer

    def make(cls=NSPO2DPOTrainer, lora=None, model=MODEL, trainer=None, **args):
        plain = cls is DPOTrainer
        options = {"output_dir": str(tmp_path / "out")} | ARGS | ({} if plain else FAST_NSPO2) | args
        config = DPOConfig(**options) if plain else configure(NSPO2DPOConfig, **options)
        extra = {"train_dataset": pairs} | (trainer or {})
        if isinstance(model, str):
            extra.setdefault("peft_config", LoraConfig(**(LORA | (lora or {}))))
        return cls(model, args=config, **extra)

    return make


def done(trainer):
    """The trainer, trained."""
    trainer.train()
    return trainer


@pytest.fixture
def trained(make_trainer):
    """`make_trainer`, and the training done."""
    return lambda *args, **options: done(make_trainer(*args, **options))


def write(path: Path, rows) -> str:
    """The name of a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trainable(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def figures(trainer, name: str) -> list[float]:
    return [entry[f"nspo2/{name}"] for entry in trainer.state.log_history if f"nspo2/{name}" in entry]


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and first
    for name in first:
        assert torch.equal(first[name], second[name]), name


def launch_and_log(command: list[str], log: Path, timeout: int) -> str:
    """Run `command` from the repository's root and return what it wrote; after `timeout` seconds it is killed.

    Runs of several gloo processes were seen to hang at exit, when all is done.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return log.read_text()


def torchrun(script: str, processes: int, out: Path, *options: str, timeout: int = 120) -> dict:
    """`result.pt`, which `tests/SCRIPT OUT OPTIONS` leaves in its folder `out` when it is launched."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, str(ROOT / "tests" / script), str(out), *options]
    output = launch_and_log(command, out / "log", timeout)
    assert (out / "result.pt").is_file(), output[-4000:]
    return torch.load(out / "result.pt", weights_only=True)
