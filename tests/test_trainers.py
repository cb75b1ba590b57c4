"""KTO, GRPO, reward and SFT trainers with NSPO2, and `attach_nspo2`; test_measure.py has rank 0."""

import pytest
import trl
from conftest import ARGS, FAST_NSPO2, LORA, MODEL, assert_same, configure, figures, losses, trainable
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import nspo2_trl
from nspo2_trl import NSPO2Config, NSPO2DPOTrainer, attach_nspo2
from nspo2_trl.training.options import trainer_config

KINDS = ["KTO", "GRPO", "Reward", "SFT"]
SAMPLING = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 4}
OPTIONS = {"GRPO": SAMPLING, "RLOO": SAMPLING, "KTO": {"per_device_train_batch_size": 4}}
TASKS = {"Reward": {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}}


def rows(kind, pairs):
    """The pairs in the shape that the trainer takes."""
    if kind == "KTO":
        both = [(row["prompt"], row[name], name == "chosen") for row in pairs for name in ("chosen", "rejected")]
        return type(pairs).from_list([dict(zip(("prompt", "completion", "label"), row)) for row in both])
    if kind == "SFT":
        return pairs.map(lambda row: {"text": row["prompt"] + row["chosen"]}, remove_columns=pairs.column_names)
    return pairs.select_columns(["prompt"]) if kind in ("GRPO", "RLOO") else pairs


def letters(completions, **kwargs):
    """A reward that differs between completions: the share of the letter e."""
    return [text.count("e") / (len(text) + 1) for text in completions]


def make(cls, config_cls, kind, pairs, folder, **args):
    options = {"output_dir": str(folder)} | ARGS | {"max_steps": 5} | OPTIONS.get(kind, {}) | args
    extra = {"reward_funcs": letters} if kind in ("GRPO", "RLOO") else {}
    lora = LoraConfig(**LORA | TASKS.get(kind, {}))
    config = configure(config_cls, **options)
    return cls(MODEL, args=config, train_dataset=rows(kind, pairs), peft_config=lora, **extra)


def theirs(kind):
    return getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")


def ours(kind):
    return getattr(nspo2_trl, f"NSPO2{kind}Trainer"), getattr(nspo2_trl, f"NSPO2{kind}Config")


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_filters(kind, pairs, tmp_path, caplog):
    with pytest.raises(TypeError, match=f"replace `{kind}Config\\(...\\)` by `NSPO2{kind}Config"):
        make(ours(kind)[0], theirs(kind)[1], kind, pairs, tmp_path)
    trainer = make(*ours(kind), kind, pairs, tmp_path, **FAST_NSPO2, save_strategy="steps", save_steps=5)
    before = trainable(trainer)
    trainer.train()
    assert len(losses(trainer)) == 5 and all(loss == loss for loss in losses(trainer))
    assert any((p != before[name]).any() for name, p in trainable(trainer).items())
    assert figures(trainer, "active")[-1] == 1 and figures(trainer, "rank")[-1] > 0
    assert 0 < figures(trainer, "variance_reduction")[-1] < 1
    card = (tmp_path / "README.md").read_text()
    assert f"trained with {kind}" in card and "nspo2" in card.split("---")[1]

    again = make(*ours(kind), kind, pairs, tmp_path, **FAST_NSPO2 | {"max_steps": 6})
    again.train(resume_from_checkpoint=True)
    assert [part.step_count for part in again.nspo2.filters] == [6] * len(again.nspo2.filters)
    assert len(losses(again)) == 6 and not any("starts anew" in record.message for record in caplog.records)


def test_attached_trains_and_resumes_as_if_made_so(make_trainer):
    options = {name.removeprefix("nspo2_"): value for name, value in FAST_NSPO2.items()}

    def attached(**args):
        return attach_nspo2(
            make_trainer(trl.DPOTrainer, max_steps=6, **args), NSPO2Config(**{**trainer_config(), **options})
        )

    made, whole, rest = make_trainer(max_steps=6), attached(save_strategy="steps", save_steps=4), attached()
    assert isinstance(whole, trl.DPOTrainer)
    made.train()
    whole.train()
    assert losses(whole) == losses(made) and figures(whole, "rank") == figures(made, "rank")
    assert_same(trainable(whole), trainable(made))
    rest.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert_same(trainable(rest), trainable(whole))


def test_attach_to_other_trainers(pairs, tmp_path):
    """One of TRL's without a class of ours, and Trainer, which may make its model later."""

    def model_init():
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
        return get_peft_model(base, LoraConfig(**LORA))

    parts = make(*theirs("SFT"), "SFT", pairs, tmp_path)
    common = (parts.args, parts.data_collator, parts.train_dataset)
    trainers = [
        make(*theirs("RLOO"), "RLOO", pairs, tmp_path),
        Trainer(parts.model, *common),
        Trainer(None, *common, model_init=model_init),
    ]
    for trainer in trainers:
        attach_nspo2(trainer, NSPO2Config(update_freq=2)).train()
        assert figures(trainer, "active")[-1] == 1
    assert "nspo2" in trainers[0]._tag_names


def test_other_log_calls_take_no_figures(make_trainer):
    class Talks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            trainer.log({"mine": 1.0})

    trainer = make_trainer(max_steps=2)
    trainer.add_callback(Talks())
    trainer.train()
    entries = trainer.state.log_history
    assert not any("nspo2/step_time" in entry for entry in entries if "mine" in entry)
    assert all("nspo2/step_time" in entry for entry in entries if "loss" in entry)


def test_attach_refuses(make_trainer):
    trainer = make_trainer(trl.DPOTrainer)
    for p in trainer.model.parameters():
        p.requires_grad = False
    with pytest.raises(ValueError, match="No trainable LoRA adapter"):
        attach_nspo2(trainer)
    assert not isinstance(trainer, NSPO2DPOTrainer)
