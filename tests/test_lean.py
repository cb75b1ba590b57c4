"""scripts/bench/lean.py is the trainer, only faster: the same batches, losses and adapters."""

import sys

import pytest
import torch
from conftest import ROOT, losses, trainable

sys.path.insert(0, str(ROOT / "scripts"))
from bench import lean

from nspo2_trl.cli.train import build, parse

RECIPE = str(ROOT / "recipes/quickstart/dpo.yaml")
FOLDERS = ["--model_name_or_path", str(ROOT / "recipes/quickstart/model")]
FOLDERS += ["--dataset_name", str(ROOT / "recipes/quickstart/data")]


def make(tmp_path, **options):
    options = {"lora_dropout": 0, "max_steps": 10, "output_dir": tmp_path / "out", "use_cpu": True} | options
    argv = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    trainer = build(*parse(["--config", RECIPE, *FOLDERS, *argv]))
    trainer.train_dataset = trainer.train_dataset.select(range(192))
    for part in trainer.nspo2.filters if trainer.nspo2 else []:
        part.config.min_rank = part.config.projection_rank  # filters within ten steps
    return trainer


def distance(first: dict, second: dict) -> float:
    """|difference| of all tensors together, as a share of |second|."""
    assert first.keys() == second.keys()
    apart = sum((first[name] - second[name]).square().sum() for name in second)
    return float((apart / sum(value.square().sum() for value in second.values())).sqrt())


def test_log_probs(tmp_path):
    trainer = make(tmp_path, nspo2_enabled=False)
    for param in trainable(trainer).values():
        torch.nn.init.normal_(param, std=0.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = lean.answers_of(lean.pairs_of(trainer.train_dataset.select(range(8)), 128))
    with torch.no_grad():
        theirs = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    assert torch.allclose(lean.scored(trainer, rows), theirs, rtol=1e-5)
    assert torch.allclose(lean.scored(trainer, rows, adapted=False), reference, rtol=1e-5)


NSPO2 = {"nspo2_update_freq": 2, "nspo2_projection_rank": 8}


@pytest.mark.parametrize(
    "options",
    [
        {"nspo2_enabled": False},
        NSPO2 | {"nspo2_strategy": "keep"},
        NSPO2 | {"nspo2_covariance": "factored", "nspo2_anneal": 0.5, "seed": 3},
        NSPO2 | {"nspo2_apply_to": "update"},
    ],
    ids=["plain", "keep", "factored", "update"],
)
def test_ten_steps_equal_the_trainers(tmp_path, options):
    trainer = make(tmp_path, logging_steps=1, eval_strategy="no", save_strategy="no", disable_tqdm=True, **options)
    trainer.train()
    fast = make(tmp_path, eval_steps=1, **options)
    data = lean.load_data(fast, range(20), tmp_path)
    run = lean.train(fast, data, looks=10)
    assert run.losses == pytest.approx(losses(trainer), rel=1e-5)
    assert distance(trainable(fast), trainable(trainer)) < 1e-4
    assert [point["step"] for point in run.curve] == list(range(1, 11))
    if options.get("nspo2_enabled", True):
        theirs = [entry for entry in trainer.state.log_history if "nspo2/variance_reduction" in entry]
        ours = [entry["variance_reduction"] for entry in run.figures if "variance_reduction" in entry]
        assert ours == pytest.approx([entry["nspo2/variance_reduction"] for entry in theirs], rel=1e-3) and ours


def test_evaluation_equals_the_trainers(tmp_path):
    trainer = make(tmp_path, nspo2_enabled=False, per_device_eval_batch_size=10)
    trainer.eval_dataset = trainer.eval_dataset.select(range(30))
    data = lean.load_data(trainer, range(30), tmp_path)
    run = lean.train(trainer, data, looks=1)
    theirs = trainer.evaluate()
    wanted = [theirs[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")]
    assert [run.curve[0][name] for name in ("loss", "accuracy", "margin")] == pytest.approx(wanted, rel=1e-4)
    assert len(list(tmp_path.glob("*.pt"))) == 2
    again = lean.load_data(trainer, range(30), tmp_path)
    assert torch.equal(again.train_reference, data.train_reference)  # from the file


def test_another_epoch(tmp_path):
    trainer = make(tmp_path, nspo2_enabled=False)
    trainer.train_dataset = trainer.train_dataset.select(range(32))
    steps = lean.order(trainer, 5)  # two of them are an epoch
    assert [len(micro) for step in steps for micro in step] == [4] * 20
    rows = [row for step in steps[:2] for micro in step for row in micro]
    assert sorted(rows) == list(range(32)) and steps[2:4] != steps[:2]
    trainer.train_dataset = trainer.train_dataset.select(range(30))
    with pytest.raises(ValueError, match="30 pairs are neither enough for 5 batches of 16"):
        lean.order(trainer, 5)
