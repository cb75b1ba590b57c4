"""Retained texts while training runs: measures, the KL term, and the null space, in all trainers."""

import json

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import MODEL, assert_same, done, figures, losses, trainable, write
from peft import LoraConfig, PeftModel, get_peft_model
from retained import SHORT, sentences, tokenizer
from test_scripts import command
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from nspo2_trl import attach_nspo2
from nspo2_trl.cli import train
from nspo2_trl.retain_config import RetainConfig

LINEAR = {"target_modules": "all-linear"}
EVAL = {"eval_strategy": "steps", "eval_steps": 4}


def make(make_trainer, texts=None, trainer=None, **options):
    given = {"retain_dataset": sentences() if texts is None else texts} | (trainer or {})
    return make_trainer(lora=LINEAR, trainer=given, **options)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_measured_alone_it_changes_nothing(make_trainer, pairs):
    plain = done(make_trainer(DPOTrainer, lora=LINEAR))
    measured = done(make(make_trainer, trainer={"eval_dataset": pairs.select(range(4))}, nspo2_enabled=False, **EVAL))
    assert_same(trainable(plain), trainable(measured))
    kl, loss = logged(measured, "eval_retain_kl"), logged(measured, "eval_retain_loss")
    assert len(kl) == len(loss) == 2 and 0 < kl[0] < kl[1] and all(abs(value) < 1 for value in loss)


def test_kl_term_keeps_the_model_closer(make_trainer):
    found = {}
    options = {
        "nspo2_retain_project": "no",
        "max_steps": 30,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
    }
    for weight in (0, 1):
        trainer = done(make(make_trainer, nspo2_retain_kl=weight, nspo2_retain_kl_samples=4, **options))
        found[weight] = trainer.nspo2_retained.measure()["kl"]
    assert found[1] < 0.3 * found[0]
    assert all(value > 0 for value in figures(trainer, "retain_kl")[1:]) and figures(trainer, "retain_ms")[0] > 0


@pytest.mark.parametrize("own", [{"nspo2_retain_kl": 5}, {"nspo2_retain_project": "during"}])
def test_resumes_bit_identical(make_trainer, tmp_path, own):
    options = own | {"save_strategy": "steps", "save_steps": 4}
    whole = done(make(make_trainer, output_dir=str(tmp_path / "whole"), **options))
    again = make(make_trainer, output_dir=str(tmp_path / "again"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert losses(whole)[4:] == losses(again)[4:]
    assert_same(trainable(whole), trainable(again))


def logits(model, texts=SHORT):
    with torch.no_grad():
        return [model(torch.tensor([tokenizer()(text)["input_ids"]])).logits for text in texts]


@pytest.mark.parametrize("project", ["after", "during"])
def test_texts_that_span_less_than_the_rank_are_read_as_before(make_trainer, project):
    options = {"nspo2_retain_project": project, "nspo2_retain_kl": 0, "weight_decay": 0.1, "nspo2_retain_rank": 20}
    trainer = make(make_trainer, texts=SHORT * 6, **options)
    before = logits(trainer.model.eval())
    trainer.train()
    for first, last in zip(before, logits(trainer.model.eval())):
        torch.testing.assert_close(first, last, atol=1e-5, rtol=1e-6)  # float32 of logits above 10
    others = zip(before, logits(trainer.model, ["Otto and Lena saw a bridge"]))
    assert all((first[:, :4] - last[:, :4]).abs().max() > 1e-3 for first, last in others)


def test_after_keeps_the_adapter_as_it_was_beside_it(make_trainer, tmp_path):
    from safetensors.torch import load_file

    plain = done(make(make_trainer, nspo2_retain_kl=0, nspo2_retain_project="no"))
    trainer = done(make(make_trainer, nspo2_retain_kl=0))
    trainer.save_model()
    unprojected = load_file(tmp_path / "out/unprojected/adapter_model.safetensors")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, param in plain.model.named_parameters():
        if param.requires_grad:
            assert torch.equal(unprojected[name.replace(".default", "")], param.detach())
    assert any(not torch.equal(written[name], unprojected[name]) for name in written if "lora_A" in name)
    assert all(torch.equal(written[name], unprojected[name]) for name in written if "lora_B" in name)
    before, after = figures(trainer, "retain_kl_unprojected")[-1], logged(trainer, "eval_retain_kl")[-1]
    assert after < before and 0 < figures(trainer, "retain_leakage")[-1] < 1


def test_a_trained_adapter_is_kept_as_it_was(make_trainer, tmp_path):
    """Frozen is what the run started from, not the base below it."""
    first = done(make_trainer(lora=LINEAR))
    second = make(make_trainer, model=first.model, nspo2_retain_project="no", nspo2_retain_kl=0)
    assert second.nspo2_retained.measure()["kl"] == pytest.approx(0, abs=1e-7)
    second.train()
    assert second.nspo2_retained.measure()["kl"] > 1e-5


@pytest.mark.parametrize(
    "texts, options, words",
    [
        ([""], {}, "`nspo2_retain_dataset` is empty"),
        (sentences(200), {"nspo2_retain_rank": 200}, "would take all .* directions of an input away: set it to"),
        (sentences(), {"nspo2_retain_kl": -1}, "`nspo2_retain_kl` must be a number of at least 0"),
    ],
)
def test_refused_before_training(make_trainer, texts, options, words):
    with pytest.raises(ValueError, match=words):
        make(make_trainer, texts=texts, **options)


def test_the_pairs_own_texts_are_refused(make_trainer, pairs):
    with pytest.raises(ValueError, match="texts of the preference pairs"):
        make(make_trainer, texts=[row["prompt"] + row["chosen"] for row in pairs])


# ---- what the command and the model card say ----


def texts_file(tmp_path) -> str:
    return write(tmp_path / "texts.jsonl", [{"text": text} for text in sentences()])


@pytest.mark.usefixtures("in_the_repository")
def test_the_final_table_is_of_the_adapter_that_is_saved(tmp_path, capsys):
    options = ["--nspo2_retain_dataset", texts_file(tmp_path), "--eval_steps", "4"]
    train.main(command(tmp_path, *options))
    printed = capsys.readouterr().out
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "eval_loss" in e] == [0, 4, 4]  # the last one after the projection
    rows = train.before_and_after(history)
    for name in ("loss", "rewards/margins", "retain_kl"):
        first, trained, last = (entry[f"eval_{name}"] for entry in history if "eval_loss" in entry)
        assert rows[name] == {"before": first, "unprojected": pytest.approx(trained), "after": last}
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {name} "))
        assert all(f"{value:.4f}" in line for value in (first, trained, last))
    assert rows["retain_kl"]["before"] == pytest.approx(0, abs=1e-6)
    assert 0 < rows["retain_kl"]["after"] < rows["retain_kl"]["unprojected"]
    assert "unprojected: the adapter as training left it" in printed


@pytest.mark.usefixtures("in_the_repository")
def test_without_a_projection_the_table_has_no_such_column(tmp_path, capsys):
    options = ["--nspo2_retain_dataset", texts_file(tmp_path), "--nspo2_retain_project", "no", "--eval_steps", "4"]
    train.main(command(tmp_path, *options))
    printed = capsys.readouterr().out
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "eval_loss" in e] == [0, 4]
    assert "unprojected" not in printed and "retain_kl" in printed


def test_the_card_says_what_was_retained(make_trainer, pairs, tmp_path):
    held_out = {"eval_dataset": pairs.select(range(4))}
    trainer = done(make(make_trainer, trainer=held_out, nspo2_retain_kl=3, nspo2_retain_rank=5, **EVAL))
    trainer.create_model_card()
    card = (tmp_path / "out/README.md").read_text()
    assert f"a dataset given to the trainer, 32 texts of {trainer.nspo2_retained.tokens:,} tokens; 8 more" in card
    assert "KL term of weight 3; 5 directions taken out of each input after training, the rest" in card
    assert "`eval_loss`" in card and "last evaluation, before the projection" in card
    for name in ("eval_retain_kl", "nspo2/retain_kl_unprojected"):
        assert f"| `{name}` | {logged(trainer, name)[-1]:.4g} |" in card
    trainer.evaluate()
    trainer.create_model_card()
    assert "before the projection" not in (tmp_path / "out/README.md").read_text()


def test_the_card_of_texts_that_were_only_measured(make_trainer, tmp_path):
    trainer = done(make(make_trainer, texts=texts_file(tmp_path), nspo2_enabled=False, max_steps=2))
    trainer.create_model_card()
    card = (tmp_path / "out/README.md").read_text()
    assert "Only measured, nothing was done to retain them." in card and str(tmp_path) not in card


@pytest.mark.parametrize("options", [{"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}])
def test_in_bfloat16(make_trainer, options):
    trainer = done(make(make_trainer, max_steps=4, **options))
    found = figures(trainer, "retain_kl")
    assert all(0 <= value < 0.1 for value in found) and found[-1] > 0 and trainer.nspo2_retain_projected


def test_gradient_checkpointing_changes_nothing(make_trainer):
    found = []
    for checkpointing in (False, True):
        trainer = done(make(make_trainer, max_steps=4, gradient_checkpointing=checkpointing))
        found.append((losses(trainer), trainable(trainer)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize(("lora", "words"), [({"use_dora": True}, "DoRA's magnitude (21)"), ({}, None)])
def test_what_the_projection_does_not_reach_is_said_once(make_trainer, caplog, lora, words):
    make_trainer(lora=LINEAR | lora, trainer={"retain_dataset": sentences()}, max_steps=2)
    said = [record.getMessage() for record in caplog.records if "does not reach" in record.getMessage()]
    assert len(said) == (words is not None) and all(words in message for message in said)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_trained_adapter_is_refused_where_it_is_sharded(make_trainer, monkeypatch, kind):
    trainer = make_trainer(lora=LINEAR, nspo2_retain_project="no")
    for name, param in trainer.model.named_parameters():
        if "lora_B" in name:
            param.data.fill_(0.1)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match="an adapter that was trained before .* launch with DDP"):
        trainer._nspo2_setup(sentences())


@pytest.mark.parametrize("project", ["after", "during"])
@pytest.mark.parametrize("start", ["pissa", "trained"])
def test_an_adapter_that_already_does_something_is_not_projected(make_trainer, tmp_path, start, project):
    """Projected, it would lose what it did before, which is what shall be kept. The KL term keeps it."""
    done(make_trainer(lora=LINEAR, max_steps=4)).save_model(tmp_path / "trained")

    def make_with(project):
        own = {"lora": LINEAR | {"init_lora_weights": "pissa"}}
        if start == "trained":
            base = AutoModelForCausalLM.from_pretrained(MODEL)
            own = {"model": PeftModel.from_pretrained(base, tmp_path / "trained", is_trainable=True)}
        options = {"max_steps": 3, "learning_rate": 1e-5, "nspo2_retain_project": project}
        return make_trainer(**own, **options, trainer={"retain_dataset": sentences()})

    with pytest.raises(ValueError, match="`nspo2_retain_project` .* merge it .* 'no', which leaves the KL term"):
        make_with(project)
    kept = done(make_with("no"))
    assert figures(kept, "retain_kl") and abs(kept.nspo2_retained.measure()["kl"]) < 1e-3


def test_adapters_on_top_of_each_other_are_refused(make_trainer):
    """Without them all, the model is not the one that shall be kept."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**LINEAR))
    model.add_adapter("second", LoraConfig(**LINEAR))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="active adapters default, second: leave the one .* merge the others"):
        make_trainer(model=model, trainer={"retain_dataset": sentences()})


FRESH = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "gaussian"},
    {"modules_to_save": ["norm"]},
    {"use_dora": True},
]


@pytest.mark.parametrize("lora", FRESH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_adds_nothing_yet_is_taken(make_trainer, lora, dtype):
    options = {"max_steps": 1, "model_init_kwargs": {"dtype": dtype}}
    trainer = make_trainer(lora=LINEAR | lora, trainer={"retain_dataset": sentences()}, **options)
    assert trainer.nspo2_retained.config.project == "after"


def test_of_a_trained_adapter_whose_b_is_frozen(make_trainer):
    """As MiCA trains it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**LINEAR))
    for name, param in model.named_parameters():
        if ".lora_B." in name:
            param.data.fill_(0.1)
            param.requires_grad_(False)
    with pytest.raises(ValueError, match="take away what the adapter already does"):
        make_trainer(model=model, trainer={"retain_dataset": sentences()})
    model.delete_adapter("ref")
    trainer = make_trainer(model=model, trainer={"retain_dataset": sentences()}, nspo2_retain_project="no")
    assert abs(trainer.nspo2_retained.measure()["kl"]) < 1e-6


def test_attached_again_after_a_refusal(make_trainer):
    trainer = make_trainer(DPOTrainer, lora=LINEAR | {"init_lora_weights": "pissa"})
    with pytest.raises(ValueError, match="take away what the adapter already does"):
        attach_nspo2(trainer, retain_dataset=sentences())
    attach_nspo2(trainer, retain_dataset=sentences(), retain_config=RetainConfig(project="no"))
    assert figures(done(trainer), "retain_kl")
