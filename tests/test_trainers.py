"""KTO, GRPO, reward and SFT trainers with NSPO2, and `attach_nspo2`: real steps, and rank 0 is TRL to the bit."""

import pytest
from conftest import ARGS, FAST_NSPO2, LORA, MODEL, assert_same, configure, figures, losses, trainable
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import (
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import nspo2_trl
from nspo2_trl import NSPO2Config, NSPO2DPOTrainer, attach_nspo2

KINDS = {
    "KTO": (KTOTrainer, KTOConfig),
    "GRPO": (GRPOTrainer, GRPOConfig),
    "Reward": (RewardTrainer, RewardConfig),
    "SFT": (SFTTrainer, SFTConfig),
}
SAMPLING = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 4}
OPTIONS = {"GRPO": SAMPLING, "RLOO": SAMPLING, "KTO": {"per_device_train_batch_size": 4}}
TASKS = {"Reward": {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}}


def rows(kind, pairs):
    """The pairs in the shape that the trainer takes."""
    if kind == "KTO":
        both = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs
            for name in ("chosen", "rejected")
        ]
        return type(pairs).from_list(both)
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
    return cls(
        MODEL, args=configure(config_cls, **options), train_dataset=rows(kind, pairs), peft_config=lora, **extra
    )


def ours(kind):
    return getattr(nspo2_trl, f"NSPO2{kind}Trainer"), getattr(nspo2_trl, f"NSPO2{kind}Config")


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_filters(kind, pairs, tmp_path, caplog):
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


@pytest.mark.parametrize("kind", KINDS)
def test_rank_0_equals_trl(kind, pairs, tmp_path):
    plain = make(*KINDS[kind], kind, pairs, tmp_path / "plain")
    plain.train()
    trainer = make(*ours(kind), kind, pairs, tmp_path / "ours", nspo2_projection_rank=0, nspo2_update_freq=2)
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert_same(trainable(trainer), trainable(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_config_is_refused(kind, pairs, tmp_path):
    with pytest.raises(TypeError, match=f"replace `{kind}Config\\(...\\)` by `NSPO2{kind}Config"):
        make(ours(kind)[0], KINDS[kind][1], kind, pairs, tmp_path)


def test_attached_trains_as_if_made_so(make_trainer):
    made = make_trainer()
    made.train()
    plain = make_trainer(DPOTrainer)
    options = {name.removeprefix("nspo2_"): value for name, value in FAST_NSPO2.items()}
    attached = attach_nspo2(plain, NSPO2Config(strategy="keep", **options))
    assert attached is plain and isinstance(attached, DPOTrainer)
    attached.train()
    assert losses(attached) == losses(made) and figures(attached, "rank") == figures(made, "rank")
    assert_same(trainable(attached), trainable(made))


def test_attached_resumes(make_trainer):
    def attached(**args):
        return attach_nspo2(make_trainer(DPOTrainer, **args), NSPO2Config(strategy="keep", update_freq=2, min_rank=4))

    whole = attached(save_strategy="steps", save_steps=4)
    whole.train()
    rest = attached(save_strategy="no")
    rest.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert_same(trainable(rest), trainable(whole))


def test_attach_to_other_trainers(pairs, tmp_path):
    trainer = attach_nspo2(make(RLOOTrainer, RLOOConfig, "RLOO", pairs, tmp_path), NSPO2Config(update_freq=2))
    trainer.train()
    assert figures(trainer, "active")[-1] == 1

    assert "nspo2" in trainer._tag_names

    bare = make(*KINDS["SFT"], "SFT", pairs, tmp_path)
    plain = Trainer(bare.model, bare.args, bare.data_collator, bare.train_dataset)
    attach_nspo2(plain, NSPO2Config(update_freq=2)).train()
    assert figures(plain, "active")[-1] == 1


def test_attach_to_a_trainer_that_makes_its_model_later(pairs, tmp_path):
    parts = make(*KINDS["SFT"], "SFT", pairs, tmp_path)

    def model_init():
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
        return get_peft_model(base, LoraConfig(**LORA))

    plain = Trainer(None, parts.args, parts.data_collator, parts.train_dataset, model_init=model_init)
    attach_nspo2(plain, NSPO2Config(update_freq=2)).train()
    assert figures(plain, "active")[-1] == 1


def test_a_trainer_of_ones_own_with_the_mixin(pairs, tmp_path):
    class Own(nspo2_trl.NSPO2SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    trainer = make(Own, nspo2_trl.NSPO2SFTConfig, "SFT", pairs, tmp_path, **FAST_NSPO2)
    trainer.train()
    assert figures(trainer, "active")[-1] == 1


def test_other_log_calls_take_no_figures(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.add_callback(Talks(trainer))
    trainer.train()
    entries = trainer.state.log_history
    assert not any("nspo2/step_time" in entry for entry in entries if "mine" in entry)
    assert all("nspo2/step_time" in entry for entry in entries if "loss" in entry)


class Talks(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, *args, **kwargs):
        self.trainer.log({"mine": 1.0})


def test_attach_refuses(make_trainer):
    with pytest.raises(ValueError, match="has NSPO2 already"):
        attach_nspo2(make_trainer())
    trainer = make_trainer(DPOTrainer)
    for p in trainer.model.parameters():
        p.requires_grad = False
    with pytest.raises(ValueError, match="No trainable LoRA adapter"):
        attach_nspo2(trainer)
    assert not isinstance(trainer, NSPO2DPOTrainer)
