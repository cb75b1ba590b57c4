"""What a trained model is judged by besides its loss: gold score of what it writes, and KL both ways."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import torch

from nspo2_trl import NSPO2DPOTrainer

from . import ROOT, lean

HAPPY = frozenset(
    """happy fun smile smiled love loved good nice laughed laugh friend friends great excited proud best kind hug
    hugged play played glad thanked thank""".split()
)
UNHAPPY = frozenset(
    """sad cry cried scared bad angry mad hurt sorry upset worried afraid lost broken broke mean fell dark
    alone""".split()
)


def stories_score(text: str) -> int:
    """Number of happy words less number of unhappy words."""
    words = re.findall("[a-z]+", text.lower())
    return sum(word in HAPPY for word in words) - sum(word in UNHAPPY for word in words)


@cache
def quickstart() -> ModuleType:
    """The script that made the quick start's stories."""
    spec = importlib.util.spec_from_file_location("quickstart_build", ROOT / "recipes/quickstart/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gold_score(task: str) -> Callable[[str], int]:
    """The score that the pairs of a task were made with."""
    return stories_score if task == "stories" else quickstart().gold_score


def skills(prompts: list[str], answers: list[str]) -> dict[str, float]:
    """What the quick start's model could before, in the answers that are preferred or not, and that no pair is about.

    `grammar` is the share of the sentences that the grammar could have written. `memory` is the share of the names
    and things in the answers that their prompts have: in the stories it was trained on, all.
    """
    made = quickstart()
    return {"grammar": made.well_formed(prompts, answers), "memory": made.remembered(prompts, answers)}


@torch.no_grad()
def draw(trainer: NSPO2DPOTrainer, prompts: list[list[int]], longest: int, adapted: bool) -> list[tuple]:
    """Each of `prompts` with a continuation at temperature 1.

    They end with the model's end mark, or after `longest` tokens. Without `adapted` the reference writes them.
    """
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    width = max(len(prompt) for prompt in prompts)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": pad, "eos_token_id": end}
    with nullcontext() if adapted else model.disable_adapter():
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=longest, **how)[:, width:].tolist()
    cut = [row[: row.index(end) + 1] if end in row else row for row in found]
    return list(zip(prompts, cut))


def judge(trainer: NSPO2DPOTrainer, data: lean.Data, task: str, number: int) -> dict:
    """Gold score of samples, and KL between the model p and its reference q, of whole answers, in nats.

    `kl` is KL(p|q), the mean of log p - log q over the model's samples. `forgotten` is KL(q|p), the mean of
    log q - log p over the reference's: how unlikely what it used to write has become. The quick start has [`skills`].
    """
    score = gold_score(task)
    prompts = [pair.prompt for pair in data.held_out[:number]]
    longest = max(len(answer) for pair in data.train + data.held_out for answer in (pair.chosen, pair.rejected))
    drawn, known = (draw(trainer, prompts, longest, adapted) for adapted in (True, False))
    own, old = (lean.scored(trainer, rows) - lean.scored(trainer, rows, adapted=False) for rows in (drawn, known))
    texts, before, beginnings = (
        trainer.processing_class.batch_decode(part, skip_special_tokens=True)
        for part in ([answer for _, answer in drawn], [answer for _, answer in known], prompts)
    )
    scores = torch.tensor([float(score(text)) for text in texts])
    end = trainer.processing_class.eos_token_id
    able = {}
    if task == "quickstart":
        able = {"skills": skills(beginnings, texts), "skills_before": skills(beginnings, before)}
    return able | {
        "gold": scores.mean().item(),
        "kl": own.mean().item(),
        "forgotten": -old.mean().item(),
        "tokens": sum(len(answer) for _, answer in drawn) / len(drawn),
        "finished": sum(answer[-1] == end for _, answer in drawn) / len(drawn),
    }
