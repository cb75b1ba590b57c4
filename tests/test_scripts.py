"""scripts/train.py as a user runs it, and every way of running it wrongly."""

import functools
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, write

from nspo2_trl import NSPO2DPOTrainer
from nspo2_trl.cli import train

RECIPE = str(ROOT / "recipes/quickstart/dpo.yaml")
pytestmark = pytest.mark.usefixtures("in_the_repository")


@functools.cache
def small_data() -> str:
    """A folder with the first pairs of the quick start, which are tokenized faster than all of them."""
    folder = Path(tempfile.mkdtemp())
    for split in ("train", "test"):
        few_rows(folder / f"{split}.jsonl", 48 if split == "train" else 8)
    return str(folder)


def command(tmp_path, *extra, steps=4):
    options = f"--config {RECIPE} --dataset_name {small_data()} --output_dir {tmp_path}/out --max_steps {steps}"
    options += " --use_cpu true --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    options += " --nspo2_update_freq 2 --disable_tqdm true --logging_steps 1"
    return [*options.split(), *extra]


def few_rows(path, rows=40, columns=("prompt", "chosen", "rejected")):
    """The first pairs of the quick start as a .jsonl file, with some of the columns only."""
    with gzip.open(ROOT / "recipes/quickstart/data/train.jsonl.gz", "rt") as file:
        picked = [json.loads(line) for line, _ in zip(file, range(rows))]
    for row in picked:
        if "prompt" not in columns:  # implicit prompt
            row["chosen"], row["rejected"] = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
    picked = [{name: row[name] for name in columns} for row in picked]
    write(path, picked)
    return picked


def refused(capsys, argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    return str(stopped.value.code) if stopped.value.code != 2 else capsys.readouterr().err


def logged(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


# ---- it works ----


def test_trains_reports_and_resumes(tmp_path, capsys):
    argv = command(tmp_path, "--save_steps", "3", "--eval_steps", "4", steps=5)
    train.main(argv)
    printed = capsys.readouterr().out
    for words in ("rewards/accuracies", "nspo2/variance_reduction", "before", "after", "trainer_state.json"):
        assert words in printed, words
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").is_file() and (out / "checkpoint-3/nspo2_state.pt").is_file()
    first = logged(out)
    # the last one is of the projected adapter
    assert [e["step"] for e in first if "eval_loss" in e] == [0, 4, 5, 5]
    train.main([*argv, "--resume_from_checkpoint", str(out / "checkpoint-3")])
    assert [e["loss"] for e in first if "loss" in e] == [e["loss"] for e in logged(out) if "loss" in e]
    checkpoint = train.checkpoint_to_resume(train.parse([*argv, "--resume_from_checkpoint", "true"])[1])
    assert checkpoint == str(out / "checkpoint-5")


def test_model_options_reach_the_model(tmp_path):
    parsed = train.parse(command(tmp_path, "--dtype", "bfloat16", "--attn_implementation", "eager"))
    trainer = train.build(*parsed)
    assert str(trainer.model.get_base_model().lm_head.weight.dtype) == "torch.bfloat16"
    assert trainer.model.config._attn_implementation == "eager"
    assert train.build(*train.parse(command(tmp_path, "--nspo2_enabled", "false"))).nspo2 is None
    quantized = train.parse(command(tmp_path, "--load_in_4bit", "true"))[2]
    assert train.get_quantization_config(quantized).load_in_4bit


# ---- it refuses ----


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--nspo2_strategy", "quiet"], "`nspo2_strategy` must be one of 'hybrid', 'noise', 'keep', got 'quiet'"),
        (["--nspo2_projection_rank", "-1"], "`nspo2_projection_rank` must be a whole number of at least 0"),
        (["--nspo2_max_rank", "4"], "raise `nspo2_max_rank` to at least 8"),
        (["--dataset_name", "./nowhere.jsonl"], "`dataset_name`: there is no file or folder './nowhere.jsonl'"),
        (["--dataset_name", "README.md"], "`dataset_name` 'README.md': a file must end in"),
        (["--dataset_train_split", "training"], "`dataset_train_split` is 'training', but the dataset has"),
        (["--resume_from_checkpoint", "true"], "has no checkpoint. To start anew, leave it out, and"),
        (["--resume_from_checkpoint", "./nowhere"], "`resume_from_checkpoint`: there is no folder './nowhere'"),
        (["--use_peft", "false"], "No trainable LoRA adapter was found"),
        (["--nspo2_projection_rnak", "8"], "no option `--nspo2_projection_rnak`. Did you mean `--nspo2_projection_ra"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        pytest.param(
            ["--bf16", "true", "--use_cpu", "false"],
            "`bf16`: there is no GPU here that can",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        (["--output_dir", "README.md"], "`output_dir` 'README.md' is a file: choose a folder"),
        (["--output_dir", "README.md/out"], "`output_dir` 'README.md/out' cannot be made in "),
        (["--model_name_or_path", "./nowhere"], "`model_name_or_path`: there is no folder './nowhere'"),
        (["--model_name_or_path", "nowhere"], "`model_name_or_path`: there is no folder 'nowhere', and as a hub id"),
        (["--config", "recipes/none.yaml"], "`--config` 'recipes/none.yaml': there is no such recipe"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, extra, message):
    said = refused(capsys, extra if extra[0] == "--config" else command(tmp_path, *extra))
    assert message in said and said.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_processes_that_would_each_train_alone_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = command(tmp_path)
    argv.remove("--use_cpu")
    argv.remove("true")
    assert "add `--use_cpu true`" in refused(capsys, argv)


@pytest.mark.parametrize("started", [True, False])
def test_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch, started):
    after_step = NSPO2DPOTrainer._nspo2_after_step

    def interrupt(self, *args):
        if not started or self.state.global_step == 3:
            raise KeyboardInterrupt
        after_step(self)

    monkeypatch.setattr(*((NSPO2DPOTrainer, "_nspo2_after_step") if started else (train, "splits")), interrupt)
    with pytest.raises(SystemExit) as stopped:
        train.main(command(tmp_path, "--save_steps", "2", "--eval_strategy", "no", steps=6))
    said = capsys.readouterr().err
    assert stopped.value.code == 130
    if started:
        assert "Interrupted after step 3: add `--resume_from_checkpoint true` to the same command" in said
        assert said.endswith("checkpoint-2.\n")
    else:
        assert "Interrupted before training: nothing was written." in said


def test_an_earlier_run_is_not_overwritten(tmp_path, capsys):
    argv = command(tmp_path, "--save_steps", "2", "--eval_strategy", "no")
    train.main(argv)
    before = (tmp_path / "out/checkpoint-4/adapter_model.safetensors").read_bytes()
    said = refused(capsys, [*argv, "--learning_rate", "1e-4"])
    assert "checkpoint-4' is of an earlier run. Add `--resume_from_checkpoint true` to go on with it" in said
    assert (tmp_path / "out/checkpoint-4/adapter_model.safetensors").read_bytes() == before
    said = refused(capsys, [*argv, "--resume_from_checkpoint", "true", "--lora_r", "4"])
    assert said.startswith("error: `lora_r` is 4, but the adapter in ") and "set it to 8" in said


@pytest.mark.parametrize("every", [2, 50])
def test_a_run_too_short_to_project_says_so(tmp_path, capsys, every):
    """Steps after the last log count too."""
    train.main(command(tmp_path, "--logging_steps", "10", "--nspo2_update_freq", str(every), steps=3))
    said = capsys.readouterr().out
    assert ("NSPO2 projected nothing: the first basis comes after `nspo2_update_freq` (50) steps" in said) == (
        every == 50
    )
    assert any(entry.get("nspo2/active") for entry in logged(tmp_path / "out")) == (every == 2)


def test_the_package_imports_from_beside_the_repository():
    """Installed with -e, from a folder that holds the repository: its folder has the package's name."""
    done = subprocess.run([sys.executable, "-c", "from nspo2_trl import NSPO2"], cwd=ROOT.parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_bit_base_model(tmp_path):
    """QLoRA, where bitsandbytes runs; on a CPU it is slow."""
    pytest.importorskip("bitsandbytes")
    options = ["--load_in_4bit", "true", "--nspo2_update_freq", "2", "--logging_steps", "1", "--eval_strategy", "no"]
    train.main(command(tmp_path, *options, steps=4))
    history = logged(tmp_path / "out")
    assert any(entry.get("nspo2/variance_reduction", 0) > 0 for entry in history)


# ---- the real model and data ----

shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the model and data beside the repository are not there")


def on_shared(data: str, out, steps: int, *options: str) -> list[dict]:
    """The quick start's recipe on the pretrained model beside the repository; what it logged."""
    model = ["--model_name_or_path", str(SHARED / "models/stories260k"), "--dataset_name", str(SHARED / "data" / data)]
    always = ["--config", RECIPE, *model, "--use_cpu", "true", "--learning_rate", "2e-3", "--max_steps", str(steps)]
    train.main([*always, "--output_dir", str(out), *options])
    return logged(out)


@shared
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("factored", [False, True])
def test_pretrained_model_on_sentiment_pairs(tmp_path, factored):
    options = ["--nspo2_covariance", "factored", "--nspo2_projection_rank", "4"] if factored else []
    history = on_shared("stories_sentiment", tmp_path / "out", 150, *options)
    reductions = [entry["nspo2/variance_reduction"] for entry in history if "nspo2/variance_reduction" in entry]
    assert [e for e in history if "eval_loss" in e][-1]["eval_rewards/accuracies"] >= 0.70
    assert sum(reductions) / len(reductions) >= 0.25
    if factored:
        on_shared("stories_sentiment", tmp_path / "whole", 10, "--save_steps", "10", "--eval_strategy", "no")
        states = ("out/checkpoint-150", "whole/checkpoint-10")
        sizes = [(tmp_path / name / "nspo2_state.pt").stat().st_size for name in states]
        assert sizes[0] <= sizes[1] / 4


@shared
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_human_preferences_with_implicit_prompt(tmp_path):
    history = on_shared("hh_harmless/pairs.jsonl.gz", tmp_path / "out", 20)
    assert [e for e in history if "eval_loss" in e][-1]["step"] == 20
