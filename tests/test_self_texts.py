"""Retained texts that the frozen model writes itself."""

import json
import logging
from contextlib import nullcontext

import pytest
import torch
from conftest import MODEL, done
from retained import adapted, sentences, tokenizer, trained

from nspo2_trl import retain_adapter
from nspo2_trl.training.self_texts import degenerate, self_texts

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'Rosa ' if m['role'] == 'user' else 'Finn ' }}{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'Finn ' }}{% endif %}"
)


def write(model=None, tok=None, samples=8, max_length=40, **options):
    return self_texts(model or adapted(), tok or tokenizer(), samples, max_length, **options)


def words(texts):
    return [tokenizer().decode(ids, skip_special_tokens=True) for ids in texts]


def test_a_base_model_writes_from_its_first_token():
    model, tok = adapted(), tokenizer()
    texts = write(model)
    assert len(texts) == 8 and {ids[0] for ids in texts} == {tok.bos_token_id}
    assert all(len(ids) <= 40 for ids in texts) and len({tuple(ids) for ids in texts}) == 8
    assert all(tok.eos_token_id not in ids[:-1] and tok.pad_token_id not in ids for ids in texts)
    assert any(ids[-1] == tok.eos_token_id for ids in texts)
    mean = loss(model, texts)
    assert mean < 2 < loss(model, [tok(text)["input_ids"] for text in sentences(8)])  # its own language


def loss(model, texts):
    with torch.no_grad(), model.disable_adapter():
        return sum(float(model(ids, labels=ids).loss) for ids in (torch.tensor([ids]) for ids in texts)) / len(texts)


def test_without_a_first_token_it_starts_from_any_word():
    tok = tokenizer()
    tok.bos_token = None
    texts = write(tok=tok)
    assert len({ids[0] for ids in texts}) > 4 and not {ids[0] for ids in texts} & set(tok.all_special_ids)


def test_a_chat_model_writes_the_users_text_and_the_answer():
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    texts = write(tok=tok, max_length=120)
    for ids in texts:
        text = tok.decode(ids)
        asked, rest = text.removeprefix("<s>Rosa").split("</s>", 1)
        assert text.startswith("<s>Rosa") and rest.startswith("Finn") and asked.strip()
        turns = [{"role": "user", "content": asked.strip()}]
        start = tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids[: len(start)] == start and len(start) < len(ids) <= 120
    assert len({tok.decode(ids).split("</s>")[0] for ids in texts}) == 8


def test_a_template_may_end_the_users_turn_with_plain_words():
    tok = tokenizer()
    tok.chat_template = "Rosa {{ messages[0]['content'] }}{% if add_generation_prompt %}.{% endif %}"
    texts = words(write(tok=tok, max_length=60))  # what is asked is one sentence, and the template's full stop follows
    assert all(text.startswith("Rosa") and ".." not in text for text in texts)
    assert sum(text.count(".") > 1 for text in texts) > 4


def test_the_frozen_model_writes():
    base = write()
    assert base == write(trained(adapted()))  # whatever the adapter is
    model = adapted()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.mul_(20)
    assert base != write(model, frozen=nullcontext)


def test_a_seed_gives_the_texts_and_training_draws_as_before():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = adapted().train()
    torch.set_rng_state(before)
    first = write(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    torch.manual_seed(4)
    assert write() == first != write(seed=1)
    assert write(samples=40)[:8] != [] and len(write(samples=40)) == 40  # more than are written side by side


def test_written_once(tmp_path):
    model = adapted()
    first = write(model, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == first
    path.write_text(json.dumps([[1, 2, 3]]))
    assert write(trained(model), folder=tmp_path) == [[1, 2, 3]]  # the adapter is no part of the key
    for options in ({"samples": 9}, {"max_length": 39}, {"seed": 1}):
        write(model, folder=tmp_path, **options)
    next(param for name, param in model.named_parameters() if "lora_" not in name).data += 1e-3
    write(model, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


# ---- what is refused or warned of ----


def test_degenerate_texts_are_named():
    good = [list(range(i, i + 20)) for i in range(10)]
    assert degenerate(good, 10) is None and degenerate(good[:5], 10) is None
    assert degenerate(good[:4], 10) == "6 of 10 texts that the model wrote end at once"
    assert degenerate([ids[:7] for ids in good], 10) == "10 of 10 texts that the model wrote end at once"
    assert "10 of 10 texts that the model wrote end at once" == degenerate(good, 10, prefix=15)
    assert degenerate([[1, 2, 3, 4] * 5] * 10, 10) == "10 of 10 texts that the model wrote repeat themselves"
    assert degenerate(good[:1] * 10, 10) == "only 1 of 10 texts that the model wrote differ"


@pytest.fixture
def broken():
    """`broken(token)`: a model whose next token is always this one."""

    def make(token):
        model = adapted()
        embedding = model.get_input_embeddings().weight.data
        embedding[token] *= 1e4
        model.base_model.model.model.norm.weight.data.zero_()
        bias = torch.zeros(len(embedding))
        bias[token] = 100.0
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, output: output + bias)
        return model

    return make


def test_a_broken_model_is_warned_of(broken, caplog):
    with caplog.at_level(logging.WARNING):
        write(broken(40))
    assert "`retain_dataset: self`: 8 of 8 texts that the model wrote repeat themselves" in caplog.text


def test_a_model_that_writes_nothing_is_refused(broken):
    for template in (None, TEMPLATE):
        tok = tokenizer()
        tok.chat_template = template
        with pytest.raises(ValueError, match="all that the model writes is empty"):
            write(broken(2), tok)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "nothing in the chat template comes before the user's text"),
        ("{% for m in messages %}Rosa{% endfor %}", "nothing in the chat template comes before the user's text"),
        ("{{ 'Rosa ' * 30 }}{{ messages[0]['content'] }}", "the chat template takes 31 of 40 tokens"),
    ],
)
def test_templates_that_do_not_fit_are_refused(template, message):
    tok = tokenizer()
    tok.chat_template = template
    with pytest.raises(ValueError, match=message):
        write(tok=tok)


# ---- where it is used ----


def test_an_adapter_is_retained_without_any_data(tmp_path):
    figures = retain_adapter(adapted(), "self", tokenizer(), samples=32, max_length=40, cache_dir=tmp_path)
    assert 0 < figures["kl"] < figures["before"]["kl"] and len(list(tmp_path.glob("self-*.json"))) == 1


def test_the_command_writes_texts_itself(tmp_path, pairs):
    from nspo2_trl.cli.retain import main

    model = adapted()
    model.peft_config["default"].base_model_name_or_path = MODEL
    model.save_pretrained(tmp_path / "adapter")
    small = ["--retain_samples", "16", "--retain_max_length", "40"]
    same = ["--retain_dataset", "self", "--retain_eval_dataset", "self", "--output_dir", str(tmp_path / "out")]
    main([str(tmp_path / "adapter"), *same, *small])
    result = json.loads((tmp_path / "out/retain.json").read_text())
    assert set(result["chosen"]["retained"]) == {"self", "self 2"}
    first, second = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("self-*.json"))
    assert not [ids for ids in first if ids in second]  # measured on others than it learned from


def test_a_trainer_retains_what_its_model_writes(make_trainer, tmp_path):
    options = {"nspo2_retain_dataset": "self", "nspo2_retain_samples": 10, "nspo2_retain_max_length": 40}
    trainer = done(make_trainer(lora={"target_modules": "all-linear"}, **options))
    retained = trainer.nspo2_retained
    assert len(retained.texts) == 8 and trainer.nspo2_retain_projected
    assert len(list((tmp_path / "out").glob("self-*.json"))) == 1
    torch.manual_seed(5)
    again = make_trainer(lora={"target_modules": "all-linear"}, **options)
    assert again.nspo2_retained.texts == retained.texts


def test_a_reward_model_cannot_write(pairs, tmp_path):
    from test_trainers import make, ours

    with pytest.raises(ValueError, match="`nspo2_retain_dataset: self`: a reward model cannot write texts"):
        make(*ours("Reward"), "Reward", pairs, tmp_path, nspo2_retain_dataset="self")
