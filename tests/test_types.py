"""What a user's type checker makes of the public API."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("mypy", reason='mypy is not installed: pip install -e ".[dev]"')

# every line without a comment must pass; one with a comment must give that error, so that types are not just Any
SNIPPET = """
import torch
from torch import nn
from nspo2_trl import NSPO2, NSPO2Config, NSPO2DPOConfig, NSPO2DPOTrainer, NSPO2Optimizer
from nspo2_trl import NSPO2SFTConfig, NSPO2SFTTrainer, create_nspo2_optimizer, get_default_config

config: NSPO2Config = get_default_config(strategy="keep", projection_rank=8)
nspo2 = NSPO2(config)
filtered: torch.Tensor = nspo2.hook(torch.zeros(3))
nspo2.step_end({"loss": 1.0})
both: torch.Tensor = nspo2.step(None, torch.zeros(1, 1, 3))
model = nn.Linear(2, 1)
optimizer: NSPO2Optimizer = create_nspo2_optimizer(model, torch.optim.AdamW, {"lr": 1e-3}, config)
plain: torch.optim.Optimizer = optimizer
optimizer.step()
loss: float = optimizer.step(lambda: 1.0)
rank: int = NSPO2DPOConfig(output_dir="out", nspo2_strategy="keep").nspo2_projection_rank


def train(trainer: NSPO2DPOTrainer) -> str:
    trainer.train()
    figures: dict[str, float] = trainer.nspo2.metrics()
    return trainer.args.nspo2_strategy + str(figures)


NSPO2DPOTrainer("model", args=NSPO2DPOConfig("out"))
NSPO2SFTTrainer("model", args=NSPO2SFTConfig("out"))
NSPO2DPOConfig(output_dir="out", nspo2_strategy=1)  # [arg-type]
NSPO2DPOConfig(output_dir="out", nspo2_strategie="keep")  # [call-arg]
NSPO2DPOTrainer("model", args=config)  # [arg-type]
NSPO2("keep")  # [arg-type]
create_nspo2_optimizer(model)  # [call-arg]
nspo2.hooked(torch.zeros(3))  # [attr-defined]
from nspo2_trl import NSPO2Trainer  # [attr-defined]
"""


@pytest.mark.slow
def test_a_snippet_type_checks(tmp_path):
    """Half a minute to a minute, most of it for the types of torch and Transformers."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir=.", "snippet.py"]
    command += ["--config-file", str(ROOT / "setup.cfg")]  # for what it leaves out, which takes long
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = [line.split(":", 3) for line in done.stdout.splitlines() if line.startswith("snippet.py")]
    errors = {int(number): message.rpartition("  ")[2] for _, number, kind, message in found if "error" in kind}
    wanted = [(i, line.partition("  # ")[2]) for i, line in enumerate(SNIPPET.splitlines(), 1)]
    assert errors == {number: code for number, code in wanted if code}, done.stdout + done.stderr
