"""Retained texts: tokenised, checked, a part held out, and put into batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

SKIP_TOKENS = 4  # first tokens of a text, where attention sinks with activations of their own stand
HELD_OUT = 5  # every fifth text is measured on and not learned from
TOKENS_A_BATCH = 1024  # padding included: bounds the logits of a large vocabulary
Batch = dict[str, torch.Tensor]


def tokenize(
    dataset: Dataset | IterableDataset | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 256,
    max_length: int = 512,
    seed: int = 0,
    option: str = "retain_dataset",
) -> list[list[int]]:
    """Token ids of at most `samples` texts, each cut to `max_length` tokens.

    Args:
        dataset: texts, or rows with a column `text`, `messages`, or `prompt` and `completion` (text or messages); more
            rows than `samples` are drawn from with `seed`, of a stream the first are taken.
        option: what messages call the dataset.

    Raises:
        ValueError: there is no row, no such column, a row is empty, or messages meet a tokenizer without template.
    """
    if isinstance(dataset, Dataset):
        if len(dataset) > samples:
            dataset = dataset.shuffle(seed=seed).select(range(samples))
    found: list[list[int]] = []
    for row in dataset:
        ids = _ids({"text": row} if isinstance(row, str) else row, tokenizer, f"`{option}`")
        if ids:
            found.append(ids[:max_length])
        if len(found) == samples:
            break
    if not found:
        raise ValueError(f"`{option}` is empty: give rows with `text`, `messages`, or `prompt` and `completion`.")
    return found


def _ids(row: dict, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of one row; none where its text is empty."""
    if row.get("text") is not None:
        content = row["text"]
    elif row.get("messages") is not None:
        content = row["messages"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        content = row["prompt"] + row["completion"]
    elif "chosen" in row and "rejected" in row:
        raise ValueError(
            f"{name} holds preference pairs (`chosen`, `rejected`): retain other texts than those the model is to "
            "change on, with a column `text`, `messages`, or `prompt` and `completion`."
        )
    else:
        raise ValueError(
            f"{name} has the columns {', '.join(row)}: it needs `text`, `messages`, or `prompt` and `completion`, "
            "filled in every row."
        )
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"]) if content.strip() else []
    if not content:
        return []
    if tokenizer.chat_template is None:
        raise ValueError(f"{name} holds messages, and the tokenizer has no chat template: give plain `text` instead.")
    return list(tokenizer.apply_chat_template(content, return_dict=False))


def check_texts(
    texts: Sequence[Sequence[int]],
    model: nn.Module,
    rank: int = 0,
    skip: int = SKIP_TOKENS,
    option: str = "retain_dataset",
) -> int:
    """How many tokens of `texts` can be learned from: those after the first `skip` of each.

    Raises:
        ValueError: no text is longer than `skip`, there are fewer such tokens than `rank`, or ids that the model's
            vocabulary lacks.
    """
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max(max(ids) for ids in texts)
    if largest >= size:
        raise ValueError(
            f"`{option}` has the token id {largest}, the model's vocabulary ends at {size - 1}: use the tokenizer "
            "that belongs to the model."
        )
    tokens = sum(max(0, len(ids) - skip) for ids in texts)
    if not tokens:
        raise ValueError(
            f"`{option}`: no text is longer than the first {skip} tokens, which are left out: give longer texts."
        )
    if tokens < rank:
        raise ValueError(
            f"`{option}` has {tokens} tokens after the first {skip} of each text, too few for `rank` {rank}: give "
            "more texts, or lower `rank`."
        )
    return tokens


def refuse_same_texts(
    texts: Iterable[Sequence[int]], pairs: Iterable[Sequence[int]], option: str = "retain_dataset"
) -> None:
    """Refuse retained texts that are the preference data's own.

    Args:
        texts: token ids of retained texts. pairs: token ids of prompts with answers.

    Raises:
        ValueError: at least half of the texts stand in one of the `pairs`.
    """
    # the first two tokens may differ inside a longer text: its beginning, and a word without a space before it
    parts = [_words(list(ids)[2:] if len(ids) > 6 else ids) for ids in texts]
    known = [_words(ids) for ids in pairs]
    same = sum(any(part in pair for pair in known) for part in parts)
    if parts and 2 * same >= len(parts):
        raise ValueError(
            f"{same} of {len(parts)} texts of `{option}` are texts of the preference pairs: that would take back what "
            "the pairs taught. Retain texts of other kinds; for what the pairs are about, `beta` is the tool."
        )


def _words(ids: Sequence[int]) -> str:
    return " " + " ".join(map(str, ids)) + " "


def hold_out(texts: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Texts to learn from and texts to measure on: every fifth, at least one; of a single text both are the same."""
    if len(texts) < 2:
        return list(texts), list(texts)
    last = min(HELD_OUT, len(texts)) - 1
    held = [ids for i, ids in enumerate(texts) if i % HELD_OUT == last]
    return [ids for i, ids in enumerate(texts) if i % HELD_OUT != last], held


def batches(texts: Sequence[Sequence[int]], pad_token_id: int, tokens: int = TOKENS_A_BATCH) -> list[Batch]:
    """`input_ids` and `attention_mask` (rows, length) of texts of similar length, at most `tokens` a batch.

    The same texts give the same batches, on any number of processes. A longer text is a batch by itself.
    """
    groups: list[list[Sequence[int]]] = []
    for ids in sorted(texts, key=len):
        if groups and (len(groups[-1]) + 1) * len(ids) <= tokens:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    found = []
    for group in groups:
        length = len(group[-1])
        padded = [[*ids, *[pad_token_id] * (length - len(ids))] for ids in group]
        mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids in group]
        found.append({"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)})
    return found
