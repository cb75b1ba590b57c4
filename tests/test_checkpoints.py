"""A checkpoint is whole or absent: Ctrl-C in the midst of saving, a full disk, half a folder left by a kill."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, done, trainable
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from nspo2_trl.cli.arguments import checkpoint_to_resume
from nspo2_trl.training.checkpoints import NSPO2_STATE_NAME, CheckpointError, last_whole, unreadable_file

FULL = OSError(28, "No space left on device")


@pytest.fixture
def saving(make_trainer):
    return lambda **args: make_trainer(save_strategy="steps", save_steps=2, max_steps=4, **args)


@pytest.fixture
def break_at(monkeypatch):
    """`break_at(place, name, error)`: Trainer's method `place` fails in the midst of writing the checkpoint `name`."""

    def arrange(place, name, error):
        whole = getattr(Trainer, place)

        def broken(self, output_dir, *args, **kwargs):
            if str(output_dir).endswith(name):
                os.makedirs(output_dir, exist_ok=True)
                Path(output_dir, "half").touch()
                raise error
            return whole(self, output_dir, *args, **kwargs)

        monkeypatch.setattr(Trainer, place, broken)

    return arrange


@pytest.mark.parametrize("place", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model"])
def test_interrupt_while_saving_leaves_no_half_checkpoint(saving, trained, break_at, monkeypatch, place):
    trainer = saving()
    break_at(place, "checkpoint-4", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    out = trainer.args.output_dir
    assert not os.path.exists(f"{out}/checkpoint-4")
    assert last_whole(out)[0] == get_last_checkpoint(out) == f"{out}/checkpoint-2"
    if place == "save_model":
        monkeypatch.undo()
        rest = saving()
        rest.train(resume_from_checkpoint=True)
        assert_same(trainable(rest), trainable(trained(max_steps=4)))


@pytest.mark.parametrize("error, seen", [(KeyboardInterrupt(), KeyboardInterrupt), (FULL, CheckpointError)])
def test_saving_over_the_checkpoint_of_an_earlier_run(saving, break_at, error, seen):
    saving().train()
    second = saving(learning_rate=1e-4)
    break_at("_save_optimizer_and_scheduler", "checkpoint-4", error)
    with pytest.raises(seen):
        second.train()
    out = second.args.output_dir
    assert not os.path.exists(f"{out}/checkpoint-4") and unreadable_file(f"{out}/checkpoint-2") is None


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), RuntimeError(), KeyError("a bug")])
def test_errors_that_are_not_of_the_disk_stay_what_they_are(saving, break_at, error):
    trainer = saving()
    break_at("_save_optimizer_and_scheduler", "checkpoint-2", error)
    with pytest.raises(type(error)) as found:
        trainer.train()
    assert found.value is error and not os.path.exists(f"{trainer.args.output_dir}/checkpoint-2")


def test_resuming_passes_over_half_a_checkpoint_and_says_so(saving, caplog):
    once = done(saving())
    out = once.args.output_dir
    os.remove(f"{out}/checkpoint-4/trainer_state.json")  # what a kill in the midst of saving leaves
    rest = saving()
    with pytest.raises(ValueError, match="checkpoint-4' was saved only in part, it has no readable trainer_state"):
        rest.train(resume_from_checkpoint=f"{out}/checkpoint-4")
    assert not caplog.records
    Path(out, "checkpoint-2/model.pt-br.txt").write_text("not one of Trainer's")
    rest.train(resume_from_checkpoint=True)
    assert "passed over: checkpoint-4 (no readable trainer_state.json)." in caplog.text
    assert_same(trainable(rest), trainable(once))
    for step in (2, 4):
        os.truncate(f"{out}/checkpoint-{step}/scheduler.pt", 100)
    with pytest.raises(ValueError, match="has no whole checkpoint: checkpoint-4 .no readable scheduler.pt., check"):
        rest.train(resume_from_checkpoint=True)


def test_interrupt_after_saving_keeps_the_checkpoint(saving, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = saving()
    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert unreadable_file(f"{trainer.args.output_dir}/checkpoint-2") is None


@pytest.fixture
def small_disk(tmp_path):
    """`disk(MiB)`: a folder that is a file system of that size."""
    folder = tmp_path / "disk"

    def make(size):
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
        return folder

    yield make
    subprocess.run(["umount", "--lazy", folder], capture_output=True)  # its files may still be mapped


def test_full_disk_ends_in_one_error_and_the_last_whole_checkpoint_resumes(saving, small_disk, tmp_path):
    large = {"nspo2_covariance": "adapter", "nspo2_basis_dtype": "float32"}  # a disk is of whole MiB
    once = done(saving(output_dir=str(tmp_path / "once"), **large))
    size = sum(file.stat().st_size for file in (tmp_path / "once/checkpoint-2").iterdir())
    disk = small_disk(int(1.6 * size / 2**20) + 1)
    with pytest.raises(CheckpointError) as refused:
        saving(output_dir=str(disk), **large).train()
    message = str(refused.value)
    assert "checkpoint-4' could not be written" in message and "MiB are free" in message
    assert f"resume from {disk / 'checkpoint-2'}" in message and len(message.splitlines()) == 1
    assert not (disk / "checkpoint-4").exists() and unreadable_file(disk / "checkpoint-2") is None

    rest = saving(output_dir=str(tmp_path / "room"), **large)
    rest.train(resume_from_checkpoint=str(disk / "checkpoint-2"))
    assert_same(trainable(rest), trainable(once))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_one_of_the_two_is_not_whole(tmp_path, name):
    (tmp_path / "trainer_state.json").write_text("{}")
    for path in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, tmp_path / path)
    assert unreadable_file(tmp_path) is None
    (tmp_path / name).unlink()
    assert unreadable_file(tmp_path) == name
    (tmp_path / "global_step2").mkdir()
    assert unreadable_file(tmp_path) is None


def test_half_a_checkpoint_is_passed_over(tmp_path):
    def folder(step, text='{"global_step": 1}'):
        found = tmp_path / f"checkpoint-{step}"
        found.mkdir()
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({}, found / name)
        if text:
            (found / "trainer_state.json").write_text(text)
        return found

    for step, text in ((2, json.dumps({})), (10, json.dumps({})), (12, ""), (14, '{"global_step": 14, "log_hist')):
        folder(step, text)
    for step, name in ((16, "optimizer.pt"), (18, "rng_state.pth"), (20, "adapter_model.safetensors")):
        there = folder(step)
        write = save_file if name.endswith(".safetensors") else torch.save
        write({"weight": torch.zeros(1000)}, there / name)
        assert unreadable_file(there) is None
        os.truncate(there / name, 2000)
        assert unreadable_file(there) == name
    (tmp_path / "checkpoint-10" / NSPO2_STATE_NAME).write_bytes(b"torn")  # a run goes on without it
    (tmp_path / "checkpoint-best").mkdir()
    for step in (10, 2):
        assert last_whole(tmp_path)[0] == str(tmp_path / f"checkpoint-{step}")
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert last_whole(tmp_path / "none")[0] is None
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint="true")
    with pytest.raises(ValueError, match=r"no whole checkpoint: checkpoint-20 .no readable adapter_model.+leave it"):
        checkpoint_to_resume(args)
