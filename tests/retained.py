"""Shared pieces of the tests of retained knowledge; run by test_retain.py with torchrun to collect in two processes.

torchrun --nproc_per_node 2 tests/retained.py OUT [fsdp]
"""

import os
import random
import sys

import torch
from conftest import MODEL
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = "Finn Rosa Otto Lena saw a bell wall bridge bread the yellow cat and map ran past in spring".split()
ALL_LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHORT = ["The yellow cat ran past the wall", "Rosa saw a map in spring and"]  # inputs that span little


def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def adapted(adapter_name: str = "default", **lora):
    """The quick start's model with an adapter as if trained: neither A nor B is zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**(ALL_LINEAR | lora)), adapter_name)
    return trained(model, adapter_name)


def trained(model, adapter_name: str = "default"):
    for name, param in model.named_parameters():
        if "lora_" in name and adapter_name in name.split(".") and "magnitude" not in name:
            torch.nn.init.normal_(param, std=0.05)
    return model.eval()


def sentences(count: int = 40, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(6, 20))) for _ in range(count)]


def main(out: str, kind: str = "") -> None:
    from accelerate import PartialState
    from torch.distributed.fsdp import fully_shard

    from nspo2_trl.layout.roles import input_adapters
    from nspo2_trl.projections.retain.collect import collect
    from nspo2_trl.projections.retain.measure import retention
    from nspo2_trl.projections.retain.project import Point, put, starts
    from nspo2_trl.projections.retain.texts import batches, tokenize

    state = PartialState(cpu=True)
    model = adapted()
    if kind == "fsdp":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    adapters = input_adapters(model, "default")
    reading = batches(tokenize(sentences(), tokenizer()), 0, tokens=100)
    held_out = batches(tokenize(sentences(7, seed=1), tokenizer()), 0, tokens=100)
    spaces = collect(model, adapters, reading, held_out, rank=6)
    tensors = [(space.vectors @ space.vectors.T, space.shares, space.held_out) for space in spaces]
    result = {"tensors": tensors, "retention": retention(model, held_out), "processes": state.num_processes}
    put(adapters, starts(adapters), spaces, Point(6, 1.2))
    result["weights"] = [getattr(a.weight, "full_tensor", lambda a=a: a.weight)().detach() for a in adapters]
    if state.is_main_process:
        torch.save(result | {"batches": len(reading)}, f"{out}/result.pt")
    state.wait_for_everyone()
    os._exit(0)  # two gloo processes were seen to hang on a regular exit


if __name__ == "__main__":
    main(*sys.argv[1:])
