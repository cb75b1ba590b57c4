"""Retained texts in the trainers, and in trainers that `attach_nspo2` is given."""

import pytest
import torch
from conftest import assert_same, done, figures, losses, trainable
from retained import sentences, tokenizer
from safetensors.torch import load_file
from test_trainers import KINDS, make, ours, theirs
from transformers import TrainerCallback

from nspo2_trl import NSPO2Config, attach_nspo2
from nspo2_trl.retain_config import RetainConfig

OFF = {"nspo2_projection_rank": 0, "nspo2_retain_kl": 0, "nspo2_retain_project": "no"}
WEIGHT = 3.0


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def retaining(kind, pairs, folder, texts=None, steps=2, **options):
    cls, config_cls = ours(kind)

    def with_texts(*args, **kwargs):
        return cls(*args, retain_dataset=texts or sentences(), **kwargs)

    return make(with_texts, config_cls, kind, pairs, folder, **({"max_steps": steps} | options))


@pytest.mark.parametrize("kind", ["DPO", *KINDS])
def test_all_off_is_plain(kind, pairs, tmp_path):
    plain = done(make(*theirs(kind), kind, pairs, tmp_path / "plain", max_steps=2))
    off = done(retaining(kind, pairs, tmp_path / "off", **OFF))
    assert losses(off) == losses(plain) and not figures(off, "retain_kl")
    assert_same(trainable(off), trainable(plain))


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step, and stops."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: param.grad.clone() for name, param in model.named_parameters() if param.requires_grad}

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def first_gradient(trainer):
    keeper = FirstGradient()
    trainer.add_callback(keeper)
    away(trainer.model)
    trainer.train()
    return keeper.found


def away(model):
    """The policy is not the frozen model any more."""
    for name, param in model.named_parameters():
        if "lora_B" in name and param.requires_grad:
            torch.nn.init.normal_(param, std=0.05, generator=torch.Generator().manual_seed(0))


def gradient_by_hand(trainer, numbers):
    """The KL term, the mean over texts of their mean over tokens, times its weight; and its gradient."""
    model, retained = trainer.model, trainer.nspo2_retained
    model.zero_grad()
    away(model)
    term = 0.0
    for number in numbers:
        ids = torch.tensor([retained._text(number)])
        with torch.no_grad(), model.disable_adapter():
            frozen = model(ids).logits.log_softmax(-1)
        policy = model(ids).logits.log_softmax(-1)
        part = WEIGHT / len(numbers) * (frozen.exp() * (frozen - policy)).sum(-1).mean()
        part.backward()
        term += part.item()
    return term, {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


SPLITS = {  # the same texts: one per micro-batch, or all in one
    "accumulated": {"gradient_accumulation_steps": 2, "nspo2_retain_kl_samples": 1},
    "at once": {"gradient_accumulation_steps": 1, "nspo2_retain_kl_samples": 2},
}


@pytest.mark.parametrize(
    ("kind", "split"),
    [("DPO", "at once"), ("SFT", "at once"), ("KTO", "accumulated"), ("GRPO", "accumulated")]
    + [slow("SFT", "accumulated"), slow("KTO", "at once"), slow("GRPO", "at once")],
)
def test_the_kl_term_has_its_weight_in_the_gradient(kind, split, pairs, tmp_path):
    check_weight(kind, pairs, tmp_path, numbers=[0, 1], **SPLITS[split])


@pytest.mark.parametrize("kind", ["SFT", slow("KTO")])
def test_also_where_the_last_step_has_fewer_micro_batches(kind, pairs, tmp_path):
    check_weight(kind, pairs.select(range(2)), tmp_path, numbers=[0], gradient_accumulation_steps=2)


def check_weight(kind, pairs, folder, numbers, **options):
    texts = [text for text in sentences(400) if len(tokenizer()(text)["input_ids"]) == 12]  # all weigh the same
    same = {
        "nspo2_projection_rank": 0,
        "nspo2_retain_project": "no",
        "max_grad_norm": 0.0,
        "learning_rate": 0.0,
    } | options
    found, loss = {}, {}
    for weight in (0.0, WEIGHT):
        trainer = retaining(kind, pairs, folder, texts, nspo2_retain_kl=weight, **same)
        found[weight], loss[weight] = first_gradient(trainer), losses(trainer)[0]
    term, by_hand = gradient_by_hand(trainer, numbers)
    assert loss[WEIGHT] - loss[0.0] == pytest.approx(term, abs=1e-3) and term > 0.01
    assert len(texts) > 10 and any(grad.abs().max() > 1e-3 for grad in by_hand.values())
    for name, grad in by_hand.items():
        torch.testing.assert_close(found[WEIGHT][name] - found[0.0][name], grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["SFT", slow("KTO"), slow("GRPO")])
def test_the_model_is_kept_closer(kind, pairs, tmp_path):
    kl = {}
    for name, options in {"plain": {"nspo2_retain_kl": 0, "nspo2_retain_project": "no"}, "kept": {}}.items():
        trainer = done(retaining(kind, pairs, tmp_path / name, steps=12, learning_rate=1e-2, **options))
        kl[name] = trainer.nspo2_retained.measure()["kl"]
    assert 0 < kl["kept"] < 0.5 * kl["plain"]
    assert figures(trainer, "retain_kl")[-1] > 0 and (tmp_path / "kept/unprojected").is_dir()


def test_a_reward_model_is_projected_and_has_no_kl_term(pairs, tmp_path, caplog):
    trainer = done(retaining("Reward", pairs, tmp_path, eval_strategy="no"))
    assert "A reward model has no next-token distribution" in caplog.text
    assert not figures(trainer, "retain_kl") and 0 < figures(trainer, "retain_leakage")[-1] < 1
    trainer.save_model()
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("unprojected", "."))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "lora_A" in name}
    assert trainer.nspo2_retained.measure() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_attached_retains_as_if_made_so(kind, pairs, tmp_path):
    options = {"kl": 1.0, "rank": 4, "samples": 20}
    made = retaining(
        kind, pairs, tmp_path / "made", **{f"nspo2_retain_{name}": value for name, value in options.items()}
    )
    made.train()
    plain = make(*theirs(kind), kind, pairs, tmp_path / "attached", max_steps=2)
    config = RetainConfig(**options)
    attached = attach_nspo2(plain, NSPO2Config(strategy="keep"), retain_dataset=sentences(), retain_config=config)
    attached.train()
    assert losses(attached) == losses(made) and figures(attached, "retain_kl") == figures(made, "retain_kl")
    assert attached.nspo2_retain_projected
    assert_same(trainable(attached), trainable(made))
