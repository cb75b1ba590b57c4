"""How a run of `retain` is trained: plain DPO, ours, and what else a user would try against forgetting."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from nspo2_trl.training.loading import load

from .retain_trainers import TRAINERS

CHUNK = 128  # tokens of a retained text
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Method:
    """What differs from plain DPO: options of the trainer, of LoRA, factors of the study's rate and steps.

    Args:
        given: it reads the retained texts. replay: weight of their loss per token, added to DPO's.
        frozen_a: A stays as it starts. corda: the adapter starts as CorDA has it, "knowledge preserved".
    """

    words: str
    options: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    rate: float = 1.0
    steps: float = 1.0
    given: bool = False
    replay: float = 0.0
    frozen_a: bool = False
    corda: bool = False


def kl(weight: float, texts: int = 1) -> Method:
    words = f"KL term, weight {weight:g}" + (f", {texts} texts" if texts > 1 else "")
    return Method(words, {"nspo2_retain_kl": weight, "nspo2_retain_kl_samples": texts}, given=True)


def replay(weight: float) -> Method:
    return Method(f"replay, weight {weight:g}", given=True, replay=weight)


def sft(weight: float) -> Method:
    return Method(f"SFT term, weight {weight:g}", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]})


DURING = {"nspo2_retain_project": "during"}
METHODS = {
    "plain": Method("plain"),
    "kl0.5": kl(0.5),
    "kl2": kl(2),
    "kl8": kl(8),
    "kl2x2": kl(2, 2),
    "replay0.1": replay(0.1),
    "replay0.5": replay(0.5),
    "rate0.5": Method("half the rate", rate=0.5),
    "rate2": Method("twice the rate", rate=2),
    "beta0.2": Method("beta 0.2", {"beta": 0.2}),
    "beta0.4": Method("beta 0.4", {"beta": 0.4}),
    "early": Method("half the steps", steps=0.5),
    "decay0.1": Method("weight decay 0.1", {"weight_decay": 0.1}),
    "decay1": Method("weight decay 1", {"weight_decay": 1.0}),
    "rank4": Method("LoRA rank 4", lora={"r": 4, "lora_alpha": 8}),
    "mlp": Method("LoRA on the MLP alone", lora={"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "sft0.2": sft(0.2),
    "sft1": sft(1.0),
    "corda": Method("CorDA, knowledge preserved", given=True, corda=True),
    "corda0.4": Method("CorDA, 0.4 of the rate", given=True, corda=True, rate=0.4),
    "corda0.2": Method("CorDA, a fifth of the rate", given=True, corda=True, rate=0.2),
    "during": Method("in the null space during training", DURING, given=True),
    "frozen-a": Method("in the null space, A as it starts", DURING, given=True, frozen_a=True),
}
PROJECTED = ("plain", "kl0.5", "kl2", "kl8", "corda0.4")  # their adapters are projected too


def corda_start(base: Any, texts: Sequence[str], tokenizer: Any, lora: LoraConfig, folder: Path) -> Any:
    """A model whose adapter and residual weights are CorDA's; its start is kept in `folder` to convert it back."""

    from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which PEFT does not install

    def read() -> None:
        for text in texts:
            base(torch.tensor([tokenizer(text)["input_ids"][:CHUNK]], device=base.device))

    linear = {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    lora.target_modules = linear - {"lm_head"}  # CorDA does not know "all-linear"
    lora.init_lora_weights, lora.corda_config = "corda", CordaConfig(corda_method="kpm")
    with torch.no_grad():
        preprocess_corda(base, lora, run_model=read)
    model = get_peft_model(base, lora)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder)
    return model


def train(options: argparse.Namespace, texts: list[str], name: str, seed: int, folder: Path) -> None:
    """One run, its adapter into `folder`, with run.json: losses, processor seconds, times of a step and KL term."""
    if (folder / "run.json").exists():
        return
    method, (config_class, kind, rows, examples) = METHODS[name], TRAINERS[options.trainer]
    config = {
        "output_dir": str(folder),
        "max_steps": round(options.steps * method.steps),
        "per_device_train_batch_size": examples,
        "gradient_accumulation_steps": 2,
        "learning_rate": options.learning_rate * method.rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 4,
        **({} if options.trainer == "sft" else {"beta": 0.1}),
        "seed": seed,
        "logging_steps": 1,
        "save_steps": 4,  # a run that was cut off goes on from here
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "nspo2_enabled": bool(method.options.keys() & {"nspo2_retain_kl", "nspo2_retain_project"}),
        "nspo2_projection_rank": 0,  # the noise filter is off
        "nspo2_update_freq": 10**6,
        "nspo2_retain_kl": 0.0,
        "nspo2_retain_project": "no",  # that is done to the finished adapter, in many ways
        "nspo2_retain_max_length": CHUNK,
    } | method.options
    set_seed(seed)  # LoRA's start is drawn before the trainer sets its own
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lora = LoraConfig(**(LORA | method.lora), task_type="CAUSAL_LM")
    start = folder / "start"
    began = time.process_time()
    if method.corda:
        model = corda_start(model, texts, tokenizer, lora, start)
    preparing = time.process_time() - began
    trainer = kind(
        model,
        args=config_class(**config),
        train_dataset=rows(load(options.pairs, option="--pairs")["train"]),
        processing_class=tokenizer,
        peft_config=None if method.corda else lora,
        retain_dataset=texts if method.given and not method.corda else None,
    )
    trainer.replay = method.replay
    for key, param in trainer.model.named_parameters():
        if method.frozen_a and ".lora_A." in key:
            param.register_hook(torch.zeros_like)
    began = time.process_time()
    cut_off = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=cut_off)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = None if cut_off else preparing + time.process_time() - began
    run = {"seconds": seconds, "losses": [entry["loss"] for entry in logs]}
    for figure in ("step_time", "retain_ms", "retain_kl"):
        figures = [entry[f"nspo2/{figure}"] for entry in logs if f"nspo2/{figure}" in entry]
        run[figure] = sum(figures) / len(figures) if figures else None
    back = {"path_initial_model_for_weight_conversion": str(start)} if method.corda else {}
    trainer.model.save_pretrained(folder, **back)
    (folder / "run.json").write_text(json.dumps(run))
