"""The second skill of the quick start's model, which no preference pair is about: sums of small numbers.

A text is five sums, `3 + 4 = 7. 12 + 11 = 23. ...`. The model is trained on all pairs of numbers up to 14. A fifth of
the pairs is held out of the texts that are retained, and the skill is scored on these.
"""

import random

import torch
from tqdm.auto import tqdm

LARGEST, SUMS_A_TEXT, HELD_OUT = 14, 5, 0.2
Pair = tuple[int, int]


def split_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """All pairs (a, b) with a ≤ b: those of retained texts, and those held out."""
    pairs = [(a, b) for b in range(LARGEST + 1) for a in range(b + 1)]
    rng.shuffle(pairs)
    held_out = round(HELD_OUT * len(pairs))
    return pairs[held_out:], pairs[:held_out]


def write_sums(rng: random.Random, pairs: list[Pair]) -> str:
    """Draw a text: five sums of `pairs`, each in either order."""
    drawn = [rng.sample(pair, 2) for pair in rng.choices(pairs, k=SUMS_A_TEXT)]
    return " ".join(f"{a} + {b} = {a + b}." for a, b in drawn)


@torch.no_grad()
def right(model, tokenizer, texts: list[str], batch_size: int = 50) -> float:
    """Share of the last sums of `texts` whose result the model writes, greedily, after all that stands before it."""
    good = 0
    for start in tqdm(range(0, len(texts), batch_size), desc="doing sums"):
        begun, results = zip(*(text.rsplit(" =", 1) for text in texts[start : start + batch_size]))
        batch = tokenizer([text + " =" for text in begun], return_tensors="pt", padding=True, padding_side="left")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        written = tokenizer.batch_decode(out[:, ids.shape[1] :])
        good += sum(text.startswith(result) for text, result in zip(written, results, strict=True))
    return good / len(texts)
