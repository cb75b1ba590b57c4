"""Retained knowledge: every kind of adapter and of text, worked with, reported or refused in a sentence."""

import pytest
import torch
from conftest import MODEL, SHARED
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from retained import ALL_LINEAR, SHORT, adapted, sentences, tokenizer, trained
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from nspo2_trl import retain_adapter
from nspo2_trl.layout.roles import input_adapters, unprotected
from nspo2_trl.projections.retain.texts import batches, check_texts, hold_out, refuse_same_texts, tokenize


def down(model, adapter_name="default"):
    return {adapter.name: adapter.weight.detach().clone() for adapter in input_adapters(model, adapter_name)}


def changed(model, before, adapter_name="default"):
    after = down(model, adapter_name)
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- adapters ----


def test_of_two_adapters_the_named_one_is_projected():
    model = adapted()
    model.add_adapter("other", LoraConfig(**(ALL_LINEAR | {"r": 2, "target_modules": ["q_proj"]})))
    trained(model, "other")
    first, second = down(model), down(model, "other")
    wants = [param.requires_grad for param in model.parameters()]
    figures = retain_adapter(model, sentences(), tokenizer(), adapter_name="other")
    assert not changed(model, first) and changed(model, second, "other") == set(second)
    assert 0 < figures["kl"] < figures["before"]["kl"]
    assert model.active_adapters == ["default"] and wants == [param.requires_grad for param in model.parameters()]


KINDS = [
    ({"use_dora": True}, "DoRA's magnitude", 21),
    ({"modules_to_save": ["norm"]}, "modules_to_save", 7),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings", 1),
    ({"lora_bias": True}, "biases of lora_B", 21),
    ({"trainable_token_indices": [1, 2]}, "trained tokens", 1),
    ({}, None, 0),
]


@pytest.mark.parametrize(("lora", "kind", "count"), KINDS)
def test_what_no_projection_reaches_is_reported(lora, kind, count):
    model = adapted(**lora)
    before = down(model)
    figures = retain_adapter(model, sentences(), tokenizer(), rank=8)
    assert {name: len(names) for name, names in figures["unprotected"].items()} == ({kind: count} if kind else {})
    assert changed(model, before) == set(before)


@pytest.mark.parametrize(("bias", "count"), [("all", 7), ("lora_only", 2)])
def test_trained_biases_are_reported(bias, count):
    model = gpt2(bias=bias)
    assert {name: len(names) for name, names in unprotected(model, "default").items()} == {"biases of the base": count}


def gpt2(**lora):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=756, n_positions=64, n_embd=48, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    options = {"r": 2, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return trained(get_peft_model(GPT2LMHeadModel(config), LoraConfig(**(options | lora))))


def test_linear_layers_that_are_stored_the_other_way_round():
    model = gpt2().double()
    retain_adapter(model, SHORT * 10, tokenizer(), rank=32)
    for text in tokenize(SHORT, tokenizer()):
        with torch.no_grad():
            after = model(torch.tensor([text])).logits
            with model.disable_adapter():
                assert (model(torch.tensor([text])).logits - after).abs().max() < 1e-5


def test_the_output_layer_may_be_adapted():
    model = adapted(target_modules=["lm_head"])
    before = down(model)
    figures = retain_adapter(model, sentences(), tokenizer())
    assert changed(model, before) and figures["kl"] < figures["before"]["kl"]


def test_a_base_in_bfloat16():
    model = adapted()
    model.base_model.model.to(torch.bfloat16)
    figures = retain_adapter(model, sentences(), tokenizer(), rank=32)
    assert figures["kl"] < 0.5 * figures["before"]["kl"]


def test_a_model_trained_on_stories():
    path = SHARED / "models/stories260k"
    if not path.exists():
        pytest.skip("no stories260k here")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    model = trained(get_peft_model(base, LoraConfig(**ALL_LINEAR)))
    texts = [f"Once upon a time there was a {a} {b}. It ran to the {c} and was happy." for a in ("red", "big", "sad")
             for b in ("cat", "dog", "boat") for c in ("park", "sea", "hill")]  # fmt: skip
    figures = retain_adapter(model, texts, AutoTokenizer.from_pretrained(path), rank=12, scale=1.0)
    assert figures["kl"] < 0.5 * figures["before"]["kl"]


def quick_start():
    return AutoModelForCausalLM.from_pretrained(MODEL)


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(4, 4, 1)


REFUSED = [
    (lambda: get_peft_model(Convolution(), LoraConfig(target_modules=["conv"])), "LoRA on Conv1d .* linear layers"),
    (lambda: get_peft_model(quick_start(), LoraConfig(target_modules=["embed_tokens"])), "on no linear layer"),
    (quick_start, "has no adapter"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_other_adapters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        retain_adapter(make(), sentences(), tokenizer())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_holds_a_part_of_the_base_is_refused_until_it_is_converted(start, tmp_path):
    """The base without such an adapter is not the model as it was."""
    lora = LoraConfig(**ALL_LINEAR, init_lora_weights=start)
    model = get_peft_model(quick_start().float(), lora)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, param in model.named_parameters():
        if ".lora_B." in name:
            param.data += 0.01 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="part of the base .* `path_initial_model_for_weight_conversion`"):
        retain_adapter(model, sentences(), tokenizer())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = PeftModel.from_pretrained(quick_start().float(), tmp_path / "plain")
    figures = retain_adapter(plain, sentences(), tokenizer())
    assert 0 <= figures["kl"] < 0.5 * figures["before"]["kl"] < 1


def test_a_merged_adapter_and_an_unknown_name_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="`adapter_name` is 'mine', but the model has 'default'"):
        retain_adapter(model, sentences(), tokenizer(), adapter_name="mine")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged .* `unmerge_adapter"):
        retain_adapter(model, sentences(), tokenizer())


# ---- options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "`rank` must be"),
        ({"rank": 1.5}, "`rank` must be"),
        ({"scale": 0}, "`scale` must be"),
        ({"scale": float("nan")}, "`scale` must be"),
        ({"form": "soft"}, "`form` must be one of hard, ridge"),
        ({"rank": 96}, "`rank` 96 would take all 96 directions"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    model = adapted()
    before = down(model)
    with pytest.raises(ValueError, match=message):
        retain_adapter(model, sentences(), tokenizer(), **options)
    assert not changed(model, before)


def test_rank_0_merely_scales():
    model = adapted()
    before = down(model)
    figures = retain_adapter(model, sentences(), tokenizer(), rank=0, scale=0.5)
    for name, weight in down(model).items():
        assert torch.equal(weight, 0.5 * before[name])
    assert figures["leakage"] == 1 and figures["kl"] < figures["before"]["kl"]


# ---- texts ----

CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def talk(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "Finn saw a bell"}, "Finn saw a bell"),
        ({"prompt": "Finn saw", "completion": " a bell"}, "Finn saw a bell"),
        ({"messages": [talk("Finn"), talk("saw")]}, "user Finn user saw "),
        ({"prompt": [talk("Finn")], "completion": [talk("saw")]}, "user Finn user saw "),
        ({"text": "Finn saw a bell", "messages": None, "other": 3}, "Finn saw a bell"),
    ],
)
def test_columns(row, text):
    chat = tokenizer()
    chat.chat_template = CHAT
    expected = chat(text, add_special_tokens=not text.startswith("user"))
    for dataset in (Dataset.from_list([row]), IterableDataset.from_generator(lambda: iter([row]))):
        assert tokenize(dataset, chat) == [expected["input_ids"]]


def test_samples_and_their_length_are_bounded():
    texts = sentences(50)
    some = tokenize(Dataset.from_dict({"text": texts}), tokenizer(), samples=10, max_length=5)
    assert len(some) == 10 and {len(ids) for ids in some} == {5}
    whole = [ids[:5] for ids in tokenize(texts, tokenizer())]
    assert some != whole[:10] and all(ids in whole for ids in some)  # drawn, not the first
    assert some == tokenize(Dataset.from_dict({"text": texts}), tokenizer(), samples=10, max_length=5)


def test_texts_are_held_out_and_put_into_bounded_batches():
    texts = tokenize(sentences(23), tokenizer())
    learned, held_out = hold_out(texts)
    assert (len(learned), len(held_out)) == (19, 4) and not [ids for ids in learned if ids in held_out]
    assert [len(part) for part in hold_out(texts[:2])] == [1, 1] and hold_out(texts[:1]) == (texts[:1], texts[:1])
    found = batches(texts, 0, tokens=60)
    rows = [row[mask.bool()].tolist() for b in found for row, mask in zip(b["input_ids"], b["attention_mask"])]
    assert sorted(rows) == sorted(texts) and all(batch["input_ids"].numel() <= 60 for batch in found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "`retain_dataset` is empty"),
        (["", "  "], "`retain_dataset` is empty"),
        ([{"messages": [talk("hello")]}], "no chat template"),
        ([{"chosen": "a", "rejected": "b"}], "holds preference pairs"),
        ([{"sentence": "a"}], "has the columns sentence: it needs `text`"),
        ([{"text": None}], "filled in every row"),
        (["Finn"] * 9, "no text is longer than the first 4 tokens"),
        (["Finn saw a bell by"] * 3, "too few for `rank` 12"),
    ],
)
def test_texts_that_cannot_work_are_refused(rows, message):
    dataset = Dataset.from_list(rows) if rows and isinstance(rows[0], dict) else rows
    with pytest.raises(ValueError, match=message):
        retain_adapter(adapted(), dataset, tokenizer())


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="token id 756, the model's vocabulary ends at 755"):
        check_texts([[1, 2, 3, 4, 5, 756]], adapted())


def test_the_preference_pairs_themselves_are_refused():
    pair, texts = [1, 5, 6, 7, 8, 9], [[5, 6, 7], [1, 5], [30, 31], [7, 9]]
    refuse_same_texts(texts[2:], [pair])
    refuse_same_texts([[5, 6], [3, 0], [55, 6]], [pair])
    with pytest.raises(ValueError, match="2 of 4 texts of `retain_dataset` are texts of the preference pairs"):
        refuse_same_texts(texts, [pair])


def test_a_dataset_by_name(tmp_path):
    path = tmp_path / "texts.jsonl"
    Dataset.from_dict({"text": sentences()}).to_json(path)
    by_name = retain_adapter(adapted(), str(path), tokenizer(), cache_dir=tmp_path)
    assert by_name == retain_adapter(adapted(), sentences(), tokenizer(), cache_dir=tmp_path)
    assert len(list(tmp_path.glob("retained-*.safetensors"))) == 1
    with pytest.raises(FileNotFoundError, match="`retain_dataset`: there is no file or folder"):
        retain_adapter(adapted(), str(tmp_path / "none.jsonl"), tokenizer())


def test_the_adapter_stays_a_plain_one(tmp_path):
    model = adapted()
    retain_adapter(model, sentences(), tokenizer())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quick_start().float(), tmp_path)
    batch = torch.tensor(tokenize(sentences(1), tokenizer()))
    with torch.no_grad():
        expected = model(batch).logits
        assert torch.equal(loaded(batch).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(batch).logits, expected, rtol=1e-4, atol=1e-4)
