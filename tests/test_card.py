"""The model card, what is pushed to the hub, and that trackers get NSPO2's figures."""

import math

import numpy as np
import pytest
import yaml
from conftest import MODEL, ROOT, figures
from huggingface_hub import HfApi, ModelCard, RepoUrl
from test_scripts import command, logged, small_data
from transformers import BitsAndBytesConfig
from trl import DPOTrainer, RichProgressCallback

from nspo2_trl import NSPO2Config, attach_nspo2
from nspo2_trl.cli import train
from nspo2_trl.training.card import means


def test_card_has_the_recipe_and_the_figures_of_the_run(make_trainer):
    trainer = make_trainer(beta=0.2, nspo2_strategy="noise", hub_token="secret")
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(8)))
    trainer.create_model_card(model_name="mine")
    path = f"{trainer.args.output_dir}/README.md"
    card = ModelCard.load(path)
    text = open(path).read()
    assert {"trl", "dpo", "nspo2"} <= set(card.data.tags)
    assert "Direct Preference Optimization" in text and "title = {NSPO2: Null Space" in text
    assert "None" not in text and "secret" not in text
    assert text.count("## NSPO2") == 1 and text.count("---\n") == 2

    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["beta"] == 0.2 and recipe["nspo2_strategy"] == "noise" and recipe["lora_r"] == 4
    assert "nspo2_sentinel" not in recipe and "output_dir" not in recipe
    row = f"| `nspo2/variance_reduction` | {means(trainer.state.log_history)['variance_reduction']:.4g} |"
    assert row in text and f"run of {trainer.state.global_step} steps" in text
    measured = figures(trainer, "variance_reduction")
    assert math.isclose(means(trainer.state.log_history)["variance_reduction"], sum(measured) / len(measured))
    assert "`eval_loss`" in text


def test_the_recipe_of_the_card_trains_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.main(command(tmp_path, "--nspo2_strategy", "hybrid"))
    text = (tmp_path / "out/README.md").read_text()
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    recipe |= {"model_name_or_path": MODEL, "dataset_name": small_data(), "output_dir": str(tmp_path / "again")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train.main(["--config", str(tmp_path / "recipe.yaml")])
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second


def test_card_keeps_secrets_and_takes_any_value(make_trainer):
    trainer = make_trainer(max_steps=2, pad_token="</s>", model_init_kwargs={"dtype": "float32", "token": "hf_SECRET"})
    trainer.args.learning_rate = np.float64(1e-3)
    trainer.args.model_init_kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    trainer.train()
    trainer.create_model_card()
    text = open(f"{trainer.args.output_dir}/README.md").read()
    assert "SECRET" not in text and "learning_rate: 0.001" in text and "load_in_4bit" in text
    assert "pad_token: </s>" in text
    assert MODEL not in text and trainer.args.output_dir not in text and "model_name_or_path: model" in text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"nspo2_projection_rank": 0}, "it only measured, nothing was filtered"),
        ({"nspo2_apply_to": "update"}, "The updates were filtered"),
        ({"nspo2_update_freq": 9}, "it only measured, nothing was filtered"),
    ],
)
def test_card_says_what_was_done(make_trainer, options, said):
    trainer = make_trainer(max_steps=4, lora={"use_dora": True}, **options)
    trainer.train()
    trainer.create_model_card()
    text = open(f"{trainer.args.output_dir}/README.md").read()
    assert said in text and "use_dora: true" in text


def test_card_of_an_attached_trainer(make_trainer):
    trainer = attach_nspo2(make_trainer(DPOTrainer, max_steps=2), NSPO2Config(strategy="noise", projection_rank=3))
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    assert "nspo2" in card.data.tags
    assert "nspo2_strategy: noise" in card.content and "nspo2_projection_rank: 3" in card.content


def test_card_of_a_plain_run_claims_nothing(make_trainer):
    trainer = make_trainer(nspo2_enabled=False, max_steps=2)
    trainer.train()
    trainer.create_model_card()
    text = open(f"{trainer.args.output_dir}/README.md").read()
    assert "without NSPO2" in text and "variance_reduction" not in text and "were filtered" not in text


def test_what_is_pushed_to_the_hub(make_trainer, monkeypatch):
    calls = {}

    def create_repo(api, repo_id, **kwargs):
        calls["repo"] = repo_id
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api, **kwargs):
        calls["files"] = kwargs

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer = make_trainer(push_to_hub=True, hub_model_id="someone/model", hub_token="secret", max_steps=2)
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/pairs")
    assert calls["repo"] == "someone/model" and calls["files"]["repo_id"] == "someone/model"
    card = ModelCard.load(f"{calls['files']['folder_path']}/README.md")
    assert card.data.datasets == "someone/pairs" and "nspo2" in card.data.tags
    assert "secret" not in card.content and 'model="someone/model"' in card.content


def test_figures_reach_tensorboard(make_trainer, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("torch.utils.tensorboard")
    trainer = make_trainer(report_to="tensorboard")
    trainer.train()
    events = next((tmp_path / "out").rglob("events.out.*"))
    read = loader.EventAccumulator(str(events))
    read.Reload()
    name = "train/nspo2/variance_reduction"
    assert [round(e.value, 6) for e in read.Scalars(name)] == [
        round(value, 6) for value in figures(trainer, "variance_reduction")
    ]


def test_the_live_table_of_trl_shows_the_figures(make_trainer, capsys):
    trainer = make_trainer(max_steps=4, trainer={"callbacks": [RichProgressCallback()]})
    trainer.train()
    assert "variance_reduction" in capsys.readouterr().out


def test_time_of_a_step_is_logged_without_nspo2_too(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.main(command(tmp_path, "--nspo2_enabled", "false", "--logging_steps", "2"))
    steps = [entry for entry in logged(tmp_path / "out") if "loss" in entry]
    assert all(entry["nspo2/step_time"] > 0 and entry["nspo2/batch_size"] == 4 for entry in steps) and len(steps) == 2
    assert not any("nspo2/rank" in entry for entry in steps)
