"""The model card, what is pushed to the hub, and that trackers get NSPO2's figures."""

import numpy as np
import pytest
import yaml
from conftest import MODEL, ROOT, figures
from huggingface_hub import HfApi, ModelCard, RepoUrl
from test_scripts import command, small_data
from transformers import BitsAndBytesConfig
from trl import DPOTrainer, RichProgressCallback

from nspo2_trl import NSPO2Config, attach_nspo2
from nspo2_trl.cli import train


def card_of(trainer, **options) -> ModelCard:
    trainer.create_model_card(**options)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def recipe_in(text: str) -> dict:
    return yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])


def test_card_has_the_recipe_and_the_figures_of_the_run(trained):
    trainer = trained(beta=0.2, nspo2_strategy="noise", hub_token="secret", max_steps=5)
    trainer.evaluate(trainer.train_dataset.select(range(8)))
    card = card_of(trainer, model_name="mine")
    text = str(card)
    assert {"trl", "dpo", "nspo2"} <= set(card.data.tags)
    assert "Direct Preference Optimization" in text and "title = {NSPO2: Null Space" in text
    assert "None" not in text and "secret" not in text
    assert text.count("## NSPO2") == 1 and text.count("---\n") == 2

    recipe = recipe_in(text)
    assert recipe["beta"] == 0.2 and recipe["nspo2_strategy"] == "noise" and recipe["lora_r"] == 4
    assert "nspo2_sentinel" not in recipe and "output_dir" not in recipe
    measured = figures(trainer, "variance_reduction")
    assert f"| `nspo2/variance_reduction` | {sum(measured) / len(measured):.4g} |" in text
    assert f"run of {trainer.state.global_step} steps" in text and "`eval_loss`" in text


def test_the_recipe_of_the_card_trains_the_same(tmp_path, in_the_repository):
    train.main(command(tmp_path, "--nspo2_strategy", "hybrid"))
    recipe = recipe_in((tmp_path / "out/README.md").read_text())
    recipe |= {"model_name_or_path": MODEL, "dataset_name": small_data(), "output_dir": str(tmp_path / "again")}
    recipe["nspo2_retain_dataset"] = str(ROOT / "recipes/quickstart/texts" / recipe["nspo2_retain_dataset"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train.main(["--config", str(tmp_path / "recipe.yaml")])
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second


def test_card_keeps_secrets_and_takes_any_value(make_trainer):
    trainer = make_trainer(max_steps=2, pad_token="</s>", model_init_kwargs={"dtype": "float32", "token": "hf_SECRET"})
    trainer.args.learning_rate = np.float64(1e-3)
    trainer.args.model_init_kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    text = str(card_of(trainer))
    assert "SECRET" not in text and "learning_rate: 0.001" in text and "load_in_4bit" in text
    assert "pad_token: </s>" in text
    assert MODEL not in text and trainer.args.output_dir not in text and "model_name_or_path: model" in text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"nspo2_projection_rank": 0}, "it only measured, nothing was filtered"),
        ({"nspo2_apply_to": "update", "max_steps": 3}, "The updates were filtered"),
        ({"nspo2_update_freq": 9}, "it only measured, nothing was filtered"),
        ({"nspo2_enabled": False}, "without NSPO2"),
    ],
)
def test_card_says_what_was_done(trained, options, said):
    text = str(card_of(trained(lora={"use_dora": True}, **{"max_steps": 2} | options)))
    assert said in text and "use_dora: true" in text
    assert ("were filtered" in text) == ("variance_reduction" in text) == ("nspo2_apply_to" in options)


def test_card_of_an_attached_trainer(make_trainer):
    trainer = attach_nspo2(make_trainer(DPOTrainer, max_steps=2), NSPO2Config(strategy="noise", projection_rank=3))
    trainer.train()
    card = card_of(trainer)
    assert "nspo2" in card.data.tags
    assert "nspo2_strategy: noise" in card.content and "nspo2_projection_rank: 3" in card.content


def test_what_is_pushed_to_the_hub(trained, monkeypatch):
    calls = {}
    address = lambda api, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{calls.setdefault('repo', repo_id)}")
    monkeypatch.setattr(HfApi, "create_repo", address)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **kwargs: calls.update(kwargs))
    trainer = trained(push_to_hub=True, hub_model_id="someone/model", hub_token="secret", max_steps=2)
    trainer.push_to_hub(dataset_name="someone/pairs")
    assert calls["repo"] == calls["repo_id"] == "someone/model"
    card = ModelCard.load(f"{calls['folder_path']}/README.md")
    assert card.data.datasets == "someone/pairs" and "nspo2" in card.data.tags
    assert "secret" not in card.content and 'model="someone/model"' in card.content


def test_figures_reach_tensorboard_and_the_live_table(trained, tmp_path, capsys):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("torch.utils.tensorboard")
    trainer = trained(report_to="tensorboard", max_steps=5, trainer={"callbacks": [RichProgressCallback()]})
    read = loader.EventAccumulator(str(next((tmp_path / "out").rglob("events.out.*"))))
    read.Reload()
    written = [event.value for event in read.Scalars("train/nspo2/variance_reduction")]
    assert written == pytest.approx(figures(trainer, "variance_reduction")) and written
    assert "variance_reduction" in capsys.readouterr().out
