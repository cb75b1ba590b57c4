"""The command `nspo2`: its help, what it refuses, that `train` is the script, what `env` tells."""

import json
import runpy
import sys
from importlib.metadata import version

import pytest
from conftest import launch_and_log
from test_scripts import command

from nspo2_trl.cli import arguments, train
from nspo2_trl.cli import command as cli


def said(capsys, *argv) -> str:
    cli.main(list(argv))
    return capsys.readouterr().out


def test_help_names_the_commands(capsys):
    for argv in ([], ["--help"], ["-h"]):
        text = said(capsys, *argv)
        assert all(f"nspo2 {name}" in text for name in ("train", "report", "env"))
    assert said(capsys, "--version").strip() == version("nspo2_trl")


def test_help_of_train_shows_what_people_set(capsys):
    short = said(capsys, "train", "--help")
    options = [name for f in (train.NSPO2DPOConfig, train.NSPO2ScriptArguments) for name in f.__dataclass_fields__]
    for name in [name for name in options if name.startswith("nspo2_") or name.endswith("_column")]:
        assert f"  --{name}" in short
    assert "--num_processes N" in short and "tpu_num_cores" not in short
    assert all(f"--{name}" in short for name in arguments.SHOWN)
    everything = said(capsys, "train", "--help_all")
    assert len(everything) > 3 * len(short) and "--hub_strategy" in everything
    train.main(["--help"])
    assert "--num_processes" not in capsys.readouterr().out  # the script is launched by accelerate


def test_train_is_the_script(tmp_path, in_the_repository, monkeypatch):
    argv = command(tmp_path, "--eval_strategy", "no", steps=3)
    cli.main(["train", *argv])
    by_command = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train.py", *argv, "--output_dir", str(tmp_path / "script")])
    runpy.run_path("scripts/train.py", run_name="__main__")
    assert (tmp_path / "script/adapter_model.safetensors").read_bytes() == by_command


@pytest.mark.slow
def test_train_in_two_processes(tmp_path):
    argv = command(tmp_path, "--eval_strategy", "no", steps=2)
    log = launch_and_log(["nspo2", "train", "--num_processes", "2", *argv], tmp_path / "log", 100)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["log_history"][0]["nspo2/batch_size"] == 2 * 2 * 2, log


@pytest.mark.parametrize(
    "argv, message",
    [
        ("trian", "no command `nspo2 trian`. Did you mean `train`?"),
        ("train --num_processes 2 --config recipes/quickstart/dpo.yaml", "train for itself: add `--use_cpu true`"),
        ("train --num_processes two", "argument --num_processes: invalid int value: 'two'"),
        ("train --accelerate_config nowhere.yaml", "`--accelerate_config`: there is no file 'nowhere.yaml'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_launch(argv, message, in_the_repository):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv.split())
    assert message in str(stopped.value)


def test_env_tells_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    text = said(capsys, "env")
    assert all(version(name) in text for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"))
    assert "NOT SUPPORTED" not in text
    assert "CPU" in text and "OMP_NUM_THREADS        7" in text and "DeepSpeed" in text

    monkeypatch.setattr(cli, "version", lambda name: "1.0" if name == "trl" else version(name))
    wrong = [line.split()[:2] for line in said(capsys, "env").splitlines() if "NOT SUPPORTED" in line]
    assert wrong == [["trl", "1.0"]]
