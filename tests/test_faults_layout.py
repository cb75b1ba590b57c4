"""Kinds of adapters besides plain LoRA: filtered whole, or refused or announced in a sentence."""

import peft
import pytest
import torch
from conftest import MODEL, done, figures, trainable
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from retained import sentences
from torch import nn
from transformers import AutoModelForCausalLM

from nspo2_trl import NSPO2Config, create_nspo2_optimizer, retain_adapter
from nspo2_trl.layout.adapters import lora_blocks

BLOCKWISE = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2, match_strict=False)


def config(name, **options):
    defaults = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return getattr(peft, f"{name}Config")(**(defaults | options))


# kind, options, tensors that PEFT trains for a module
WHOLE = [
    ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 8}, 3),
    ("IA3", {"feedforward_modules": ["down_proj"]}, 1),
    ("LoHa", {"r": 4}, 4),
    ("LoKr", {"r": 4}, 3),
    ("OFT", {"r": 0, "oft_block_size": 4}, 1),
    ("Vera", {"r": 4}, 2),
    ("VBLoRA", {"r": 4, "num_vectors": 8, "vector_length": 32, "topk": 2}, 3),  # its bank is shared by all modules
    ("Lora", {"r": 4, "kasa_config": KasaConfig()}, 3),
    ("Lora", {"r": 4, "use_bdlora": BLOCKWISE}, 2),
]


@pytest.mark.parametrize(("name", "options", "count"), WHOLE)
def test_kinds_of_adapters_are_filtered_whole(make_trainer, name, options, count):
    trainer = make_trainer(trainer={"peft_config": config(name, **options)}, max_steps=4)
    blocks, before = lora_blocks(trainer.model), trainable(trainer)
    inside = [p for block in blocks for p in block.params]
    assert len(blocks) == 9 and len(blocks[0].params) == count
    assert {id(p) for p in inside} == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    trainer.train()
    assert figures(trainer, "active")[-1] == 1 and figures(trainer, "variance_reduction")
    assert not any(torch.equal(p, before[name]) for name, p in trainable(trainer).items())


@pytest.mark.parametrize("name", ["PromptTuning", "PTuning"])
def test_adapters_of_no_module_are_refused(make_trainer, name):
    prompts = getattr(peft, {"PTuning": "PromptEncoderConfig", "PromptTuning": "PromptTuningConfig"}[name])
    with pytest.raises(ValueError, match="No trainable LoRA adapter was found"):
        make_trainer(trainer={"peft_config": prompts(num_virtual_tokens=4, task_type="CAUSAL_LM")})


@pytest.mark.parametrize("more", [False, True])
def test_what_is_trained_in_no_adapter_is_announced(make_trainer, caplog, more):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config("Lora", modules_to_save=["norm"]))
    model.get_output_embeddings().weight.requires_grad_(more)
    make_trainer(model=model, model_init_kwargs=None)
    words = "does not filter 1 trained parameters that are in no adapter of a module"
    assert (words in caplog.text) == more == ("does not filter" in caplog.text)  # `modules_to_save` is known


REFUSED = [
    ("IA3", {"feedforward_modules": ["down_proj"]}, "is of the kind IA3: only LoRA adapters can be projected"),
    ("AdaLora", {"total_step": 8}, "is of the kind ADALORA: only LoRA adapters can be projected"),
    ("Lora", {"use_bdlora": BLOCKWISE}, "where A is a BlockDiagonalLinear. is not supported"),
    ("Lora", {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]}, "on single parameters"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_what_cannot_be_projected_is_refused_before_texts_are_read(make_trainer, name, options, words):
    parts = {"peft_config": config(name, **options), "retain_dataset": "no/such/texts"}
    with pytest.raises(ValueError, match=words):
        make_trainer(trainer=parts)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), parts["peft_config"])
    with pytest.raises(ValueError, match=words):
        retain_adapter(model, "no/such/texts", None)


def test_other_kinds_are_measured_on_retained_texts(make_trainer):
    parts = {"peft_config": config("AdaLora", total_step=8), "retain_dataset": sentences()}
    trainer = done(make_trainer(trainer=parts, nspo2_retain_project="no", max_steps=2))
    assert abs(trainer.nspo2_retained.measure()["kl"]) < 0.1 and figures(trainer, "retain_kl")


def test_the_optimizer_filters_other_kinds_too():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), peft.LoHaConfig(target_modules=["0", "1"])
    )
    optimizer = create_nspo2_optimizer(model, torch.optim.SGD, {"lr": 0.1}, NSPO2Config())
    assert [block.name.split(".")[-1] for block in optimizer.blocks] == ["0:default", "1:default"]
