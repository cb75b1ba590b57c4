"""A checkpoint is whole or absent: Ctrl-C in the midst of saving, a full disk, half a folder left by a kill."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, trainable
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from nspo2_trl.cli.arguments import checkpoint_to_resume
from nspo2_trl.training.checkpoints import NSPO2_STATE_NAME, CheckpointError, last_whole, unreadable_file


def saving(make_trainer, **args):
    return make_trainer(save_strategy="steps", save_steps=2, max_steps=6, **args)


PLACES = ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model"]


@pytest.mark.parametrize("place", PLACES)
def test_interrupt_while_saving_leaves_no_half_checkpoint(make_trainer, monkeypatch, place):
    trainer = saving(make_trainer)
    whole = getattr(Trainer, place)

    def interrupted(self, output_dir, *args, **kwargs):
        if str(output_dir).endswith("checkpoint-4"):
            os.makedirs(output_dir, exist_ok=True)
            with open(os.path.join(output_dir, "half"), "w"):
                raise KeyboardInterrupt
        return whole(self, output_dir, *args, **kwargs)

    monkeypatch.setattr(Trainer, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    out = trainer.args.output_dir
    assert not os.path.exists(f"{out}/checkpoint-4")
    assert last_whole(out)[0] == get_last_checkpoint(out) == f"{out}/checkpoint-2"

    monkeypatch.undo()
    rest = saving(make_trainer)
    rest.train(resume_from_checkpoint=True)
    uninterrupted = saving(make_trainer, output_dir=f"{out}-again")
    uninterrupted.train()
    assert_same(trainable(rest), trainable(uninterrupted))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_saving_over_the_checkpoint_of_an_earlier_run(make_trainer, monkeypatch, error):
    first = saving(make_trainer)
    first.train()
    out = first.args.output_dir
    second = saving(make_trainer, learning_rate=1e-4)
    whole = Trainer._save_optimizer_and_scheduler

    def interrupted(self, output_dir):
        if output_dir.endswith("checkpoint-4"):
            raise error
        whole(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        second.train()
    assert not os.path.exists(f"{out}/checkpoint-4") and unreadable_file(f"{out}/checkpoint-2") is None


@pytest.mark.parametrize(
    "error, words",
    [(RuntimeError("CUDA out of memory"), "CUDA out of memory"), (RuntimeError(), ""), (KeyError("a bug"), "a bug")],
)
def test_errors_that_are_not_of_the_disk_stay_what_they_are(make_trainer, monkeypatch, error, words):
    trainer = saving(make_trainer)

    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", broken)
    with pytest.raises(type(error), match=words):
        trainer.train()
    assert not os.path.exists(f"{trainer.args.output_dir}/checkpoint-2")


def test_resuming_passes_over_half_a_checkpoint_and_says_so(make_trainer, caplog):
    once = saving(make_trainer)
    once.train()
    out = once.args.output_dir
    shutil.rmtree(f"{out}/checkpoint-6")
    os.remove(f"{out}/checkpoint-4/trainer_state.json")  # what a kill in the midst of saving leaves
    rest = saving(make_trainer)
    with pytest.raises(
        ValueError, match="checkpoint-4' was saved only in part, it has no readable trainer_state.json"
    ):
        rest.train(resume_from_checkpoint=f"{out}/checkpoint-4")
    assert not caplog.records
    Path(out, "checkpoint-2/model.pt-br.txt").write_text("not one of Trainer's")
    rest.train(resume_from_checkpoint=True)
    assert "passed over: checkpoint-4 (no readable trainer_state.json)." in caplog.text
    assert_same(trainable(rest), trainable(once))
    for step in (2, 4, 6):
        os.truncate(f"{out}/checkpoint-{step}/scheduler.pt", 100)
    with pytest.raises(
        ValueError, match="has no whole checkpoint: checkpoint-6 .no readable scheduler.pt., checkpoint-4"
    ):
        rest.train(resume_from_checkpoint=True)


def test_interrupt_after_saving_keeps_the_checkpoint(make_trainer, monkeypatch):
    trainer = saving(make_trainer)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

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


def test_full_disk_ends_in_one_error_and_the_last_whole_checkpoint_resumes(make_trainer, small_disk, tmp_path):
    once = saving(make_trainer, output_dir=str(tmp_path / "once"))
    once.train()
    size = sum(file.stat().st_size for file in (tmp_path / "once/checkpoint-2").iterdir())
    disk = small_disk(int(1.6 * size / 2**20) + 1)

    trainer = saving(make_trainer, output_dir=str(disk))
    with pytest.raises(CheckpointError) as refused:
        trainer.train()
    message = str(refused.value)
    assert "checkpoint-4' could not be written" in message and "MiB are free" in message
    assert f"resume from {disk / 'checkpoint-2'}" in message and len(message.splitlines()) == 1
    assert not (disk / "checkpoint-4").exists() and unreadable_file(disk / "checkpoint-2") is None

    rest = saving(make_trainer, output_dir=str(tmp_path / "room"))
    rest.train(resume_from_checkpoint=str(disk / "checkpoint-2"))
    assert_same(trainable(rest), trainable(once))


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name, text in (("checkpoint-12", None), ("checkpoint-14", '{"global_step": 14, "log_hist')):
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / "optimizer.pt")
        if text:
            (tmp_path / name / "trainer_state.json").write_text(text)
    for step, name in ((16, "optimizer.pt"), (18, "rng_state.pth"), (20, "adapter_model.safetensors")):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "checkpoint-10", folder)
        write = save_file if name.endswith(".safetensors") else torch.save
        write({"weight": torch.zeros(1000)}, folder / name)
        assert unreadable_file(folder) is None
        os.truncate(folder / name, 2000)
        assert unreadable_file(folder) == name
    (tmp_path / "checkpoint-10" / NSPO2_STATE_NAME).write_bytes(b"torn")  # a run goes on without it
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole(tmp_path)[0] == str(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert last_whole(tmp_path)[0] == str(tmp_path / "checkpoint-2")
    assert last_whole(tmp_path / "none")[0] is None
    shutil.rmtree(tmp_path / "checkpoint-2")
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint="true")
    with pytest.raises(ValueError, match=r"no whole checkpoint: checkpoint-20 .no readable adapter_model.+Leave it"):
        checkpoint_to_resume(args)
