"""What a trained model is judged by besides its loss: gold score of what it writes, and KL both ways."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from runpy import run_path

import torch
from torch.nn.utils.rnn import pad_sequence

from nspo2_trl import NSPO2DPOTrainer

from . import ROOT

HAPPY = """happy fun smile smiled love loved good nice laughed laugh friend friends great excited proud best kind hug
    hugged play played glad thanked thank""".split()
UNHAPPY = """sad cry cried scared bad angry mad hurt sorry upset worried afraid lost broken broke mean fell dark
    alone""".split()


def stories_score(text: str) -> int:
    """Number of happy words less number of unhappy words."""
    words = re.findall("[a-z]+", text.lower())
    return sum(word in HAPPY for word in words) - sum(word in UNHAPPY for word in words)


@cache
def quickstart() -> dict:
    """What is in the script that made the quick start's stories."""
    sys.path.insert(0, str(ROOT / "recipes/quickstart"))  # of what it imports
    return run_path(str(ROOT / "recipes/quickstart/build.py"))


def gold_score(task: str) -> Callable[[str], int]:
    """The score that the pairs of a task were made with."""
    return stories_score if task == "stories" else quickstart()["gold_score"]


def skills(prompts: list[str], answers: list[str]) -> dict[str, float]:
    """What the quick start's model could before: share of sentences that its grammar could have written (`grammar`),
    and of the names and things in the answers that their prompts have (`memory`; all in the stories it learned from).
    """
    made = quickstart()
    return {"grammar": made["well_formed"](prompts, answers), "memory": made["remembered"](prompts, answers)}


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


@torch.no_grad()
def log_probs(trainer: NSPO2DPOTrainer, rows: list[tuple[list[int], list[int]]], adapted: bool = True) -> torch.Tensor:
    """(rows,) log-probabilities of answers after their prompts; without `adapted` those of the reference model."""
    found = []
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        padded = lambda texts, pad: pad_sequence([torch.tensor(t) for t in texts], batch_first=True, padding_value=pad)
        inputs = {
            "input_ids": padded([prompt + answer for prompt, answer in part], trainer.processing_class.pad_token_id),
            "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in part], 0),
            "labels": padded([[-100] * len(prompt) + answer for prompt, answer in part], -100),
        }
        with nullcontext() if adapted else trainer.model.disable_adapter():
            found.append(trainer.model(**inputs, fused_lm_head=True).log_probs.sum(1))
    return torch.cat(found)


def judge(trainer: NSPO2DPOTrainer, task: str, number: int) -> dict:
    """Gold score of samples, and KL between the model p and its reference q, of whole answers, in nats.

    `kl` is KL(p|q), the mean of log p - log q over the model's samples. `forgotten` is KL(q|p), the mean of
    log q - log p over the reference's: how unlikely what it used to write has become. The quick start has [`skills`].
    """
    score, sets = gold_score(task), (trainer.train_dataset, trainer.eval_dataset)
    prompts = trainer.eval_dataset[:number]["prompt_ids"]
    longest = max(len(ids) for data in sets for name in ("chosen_ids", "rejected_ids") for ids in data[name])
    drawn, known = (draw(trainer, prompts, longest, adapted) for adapted in (True, False))
    own, old = (log_probs(trainer, rows) - log_probs(trainer, rows, adapted=False) for rows in (drawn, known))
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
