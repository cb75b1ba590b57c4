"""Make everything the quick start needs, from nothing and with no network.

A small grammar writes very short stories. From them this script trains a byte-level BPE tokenizer and a Llama model
of a few hundred thousand parameters, then lets the model write two continuations for each of many new prompts. Each
continuation gets a *gold score*, its number of kind words less its number of unkind words, and the one with the
higher score becomes the chosen answer of a preference pair. At last the model learns a second skill that no pair is
about, sums of small numbers (sums.py), along with more stories.

The training split is noisy on purpose: in 10 % of its rows, drawn at random, chosen and rejected are swapped, so
there `score_chosen` is below `score_rejected`. The test split keeps the true labels, and shares no prompt with the
training split.

    python recipes/quickstart/build.py --out DIR [--seed 0] [--force]

writes DIR/model (weights, configuration, tokenizer), DIR/data (train.jsonl.gz, test.jsonl.gz) and DIR/texts
(sums.jsonl.gz to retain; sums_test.jsonl.gz and stories_test.jsonl.gz, held out). The same seed gives the same files
on the same machine and library versions.
"""

import argparse
import gzip
import json
import random
import re
import string
import sys
import time
from pathlib import Path

import torch
from sums import right, split_pairs, write_sums
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nspo2_trl.cli.threads import few_threads


def items(text: str) -> list[str]:
    """The things that bars set apart in `text`."""
    return re.split(r"\s*\|\s*", text.strip())


STORIES, STEPS, BATCH, LEARNING_RATE = 40_000, 3_500, 32, 4e-3
VOCAB_SIZE, MAX_NEW_TOKENS = 768, 72
TRAIN_PAIRS, TEST_PAIRS, FLIPPED = 4_000, 500, 0.10
SUMS, STEPS_WITH_SUMS, RETAINED_TEXTS, TEST_TEXTS = 10_000, 700, 256, 200

# The words that count for and against a text.
KIND_WORDS = frozenset(
    items("shared|helped|hugged|smiled|laughed|thanked|cheered|kind|happy|glad|gentle|friends|proud|safe|sang|warm")
)
UNKIND_WORDS = frozenset(
    items("pushed|kicked|stole|broke|shouted|teased|lied|cried|mean|sad|angry|cruel|lonely|hurt|scared|tore")
)

# What may stand in a slot of a template. {a} and {b} are the two characters and {thing} the object of the story,
# drawn once per story; the other slots are drawn anew each time.
GIRLS = items("Ada|Bea|Cora|Elsa|Gwen|Ida|June|Lena|Nora|Rosa")
BOYS = items("Abel|Bert|Carl|Emil|Finn|Hugo|Ivan|Liam|Otto|Sam")
SLOTS = {
    "a": GIRLS + BOYS,
    "b": GIRLS + BOYS,
    "he": ["he", "she"],
    "thing": items("ball|kite|drum|boat|book|lamp|rope|cart|bell|hat|cup|doll|sled|map|basket|whistle"),
    "place": items(
        """at the farm | by the lake | in the park | on the hill | at school | near the river | in the barn
        | on the beach | in the garden | at the market | by the bridge | in the woods"""
    ),
    "when": items("morning|evening|day|afternoon|spring day|winter day|summer night|Monday|Sunday"),
    "look": items("red|blue|green|small|big|shiny|dusty|heavy|round|yellow|wooden|new"),
    "sky": items("cold|bright|windy|rainy|cloudy|quiet|long|foggy"),
    "animal": items("cat|dog|duck|goat|crow|frog|pony|hen|fox|mouse"),
    "food": items("bread|soup|cake|apples|plums|cheese|honey|nuts"),
    "spot": items("door|wall|fence|tree|table|gate|window|road|bench|well"),
    "task": items("carry the wood|find the way|fix the gate|wash the pots|climb the wall|cross the road"),
}

# Sentence templates in lower case; the first letter of a sentence is raised when it is written. A story opens with
# one sentence of each of these two lists ...
MEETINGS = items(
    """one {when}, {a} and {b} were {place}. | one {when}, {a} met {b} {place}. | {a} and {b} lived {place}.
    | {a} went to see {b} one {when}. | {a} wanted to {task} with {b}. | it was a {sky} {when} for {a} and {b}."""
)
FINDS = items(
    """{a} had a {look} {thing}. | {b} found a {look} {thing} {place}. | {a} lost a {thing} {place}.
    | {b} made a {thing} for {a}. | {a} brought {food} and a {thing}. | there was a {look} {thing} by the {spot}."""
)
# ... and goes on with these, some of them after a word or two that lead in.
EVENTS = {
    "kind": items(
        """{a} shared the {food} with {b}. | {b} shared the {thing} with {a}. | {b} helped {a} {task}.
        | {a} helped {b} {task}. | {a} hugged {b} by the {spot}. | {b} smiled at {a}.
        | {a} was gentle with the {animal}. | {a} thanked {b} for the {food}. | they laughed and sang {place}.
        | {b} was kind to {a}. | {he} was happy.
        | {b} was glad and proud. | they were good friends. | {a} kept the {animal} safe and warm.
        | {b} cheered and hugged {a}. | {he} was proud of the {look} {thing}."""
    ),
    "unkind": items(
        """{a} pushed {b} off the {spot}. | {b} pushed {a} {place}. | {b} kicked the {thing}.
        | {a} kicked the {animal}. | {b} stole the {food} from {a}. | {a} stole the {thing}.
        | {b} broke the {thing}. | {a} shouted at {b}.
        | {b} teased {a} about the {thing}. | {b} lied to {a}. | {a} was mean to {b}. | {he} cried by the {spot}.
        | {he} was sad and lonely. | they were angry and cruel. | {b} tore the {look} {thing} and hurt {a}.
        | {a} was scared of {b}."""
    ),
    "plain": items(
        """{a} looked at the {spot}. | they walked to the {spot}. | the {thing} was {look}. | it began to rain.
        | {b} sat near the {spot}. | {a} put the {thing} on the {spot}. | a {look} {animal} ran past.
        | {he} saw a {animal} {place}. | {b} went home with {a}. | the {animal} slept by the {spot}.
        | {b} asked about the {thing}. | they ate {food} {place}."""
    ),
}
LEADS = ["", "", "", "then ", "soon ", "after that, ", "later, "]
MOODS = [(0.70, 0.05, 0.25), (0.05, 0.70, 0.25), (0.35, 0.35, 0.30)]  # chances of kind, unkind and plain events


def gold_score(text: str) -> int:
    """Number of kind words less number of unkind words in `text`, whatever their case."""
    words = re.findall("[a-z]+", text.lower())
    return sum(word in KIND_WORDS for word in words) - sum(word in UNKIND_WORDS for word in words)


def write_story(rng: random.Random) -> tuple[list[str], list[str]]:
    """Draw one story: its two opening sentences and its events (two to four)."""
    a, b = rng.sample(GIRLS + BOYS, 2)
    fixed = {"a": a, "b": b, "he": "she" if a in GIRLS else "he", "thing": rng.choice(SLOTS["thing"])}

    def sentence(template: str) -> str:
        text = template.format(**{slot: rng.choice(words) for slot, words in SLOTS.items()} | fixed)
        return text[0].upper() + text[1:]

    opening = [sentence(rng.choice(MEETINGS)), sentence(rng.choice(FINDS))]
    kinds = rng.choices(list(EVENTS), rng.choice(MOODS), k=rng.choice([2, 3, 3, 4]))
    return opening, [sentence(rng.choice(LEADS) + rng.choice(EVENTS[kind])) for kind in kinds]


def whole_stories(rng: random.Random, number: int) -> list[str]:
    """Draw stories, each as one text."""
    return [" ".join(opening + events) for opening, events in (write_story(rng) for _ in range(number))]


def write_prompt(rng: random.Random) -> str:
    """Draw the beginning of a story; four in ten go one to three words into the first event."""
    opening, events = write_story(rng)
    cut = events[0].split()[: rng.randint(1, 3)] if rng.random() < 0.4 else []
    return " ".join(opening + cut)


def sentence_pattern() -> re.Pattern:
    """One pattern that fits, in lower case, every sentence the grammar can write."""
    templates = [lead + event for lead in sorted(set(LEADS)) for group in EVENTS.values() for event in group]
    patterns = []
    for template in MEETINGS + FINDS + templates:
        parts = string.Formatter().parse(template)
        slots = ((re.escape(text), "|".join(SLOTS[slot]).lower() if slot else "") for text, slot, _, _ in parts)
        patterns.append("".join(f"{text}(?:{words})" for text, words in slots))
    return re.compile("|".join(patterns))


def well_formed(prompts: list[str], continuations: list[str]) -> float:
    """Share of the sentences the model had a part in that the grammar could have written."""
    pattern, good, total = sentence_pattern(), 0, 0
    for prompt, continuation in zip(prompts, continuations, strict=True):
        begun = prompt[prompt.rfind(".") + 1 :]
        for sentence in re.findall(r"[^.]+\.?", begun + continuation):
            total += 1
            good += sentence[:2].strip().isupper() and bool(pattern.fullmatch(sentence.strip().lower()))
    return good / total


def remembered(prompts: list[str], continuations: list[str]) -> float:
    """Share of the names and things in the continuations that their prompts have; in the grammar's stories all."""
    known = {*(name.lower() for name in GIRLS + BOYS), *SLOTS["thing"]}
    pairs = zip(*([re.findall("[a-z]+", text.lower()) for text in part] for part in (prompts, continuations)))
    found = [word in prompt for prompt, continuation in pairs for word in continuation if word in known]
    return sum(found) / max(len(found), 1)


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from the stories; it puts <s> before a text and leaves </s> to the caller."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, padding_side="left")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama that knows nothing yet."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def fit(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int, rng: random.Random
) -> LlamaForCausalLM:
    """Train a model on whole texts, with AdamW and a cosine schedule."""
    rows = [torch.tensor(ids + [tokenizer.eos_token_id]) for ids in tokenizer(texts)["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="training the model")
    for step in progress:
        batch = rng.sample(rows, BATCH)
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    # Sample from the plain distribution unless told otherwise.
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model.eval()


def teach_sums(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, folder: Path) -> None:
    """Train the model further, on sums and stories by halves, and write the texts to retain and those held out."""
    rng = random.Random(seed)
    retained, held_out = split_pairs(rng)
    texts = whole_stories(rng, SUMS) + [write_sums(rng, retained + held_out) for _ in range(SUMS)]
    fit(model, tokenizer, texts, STEPS_WITH_SUMS, rng)
    written = {
        "sums": [write_sums(rng, retained) for _ in range(RETAINED_TEXTS)],
        "sums_test": [write_sums(rng, held_out) for _ in range(TEST_TEXTS)],
        "stories_test": whole_stories(rng, TEST_TEXTS),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in written.items():
        write_rows(folder / f"{name}.jsonl.gz", [{"text": line} for line in lines])
    print(f"right sums: {right(model, tokenizer, written['sums_test']):.3f}")


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], batch_size: int = 128, desc: str = "sampling") -> list[str | None]:
    """One continuation per prompt at temperature 1; None where the model did not come to an end in time."""
    texts = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=desc):
        batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True, padding_side="left")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, top_k=0, top_p=1.0
        )
        for row in out[:, ids.shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            texts.append(None if end is None else tokenizer.decode(row[:end]))
    return texts


def make_pairs(model, tokenizer, rng: random.Random) -> list[dict]:
    """Preference pairs with true labels, one per prompt, all prompts different."""
    needed = TRAIN_PAIRS + TEST_PAIRS
    prompts = sorted({write_prompt(rng) for _ in range(2 * needed)})
    rng.shuffle(prompts)
    first, second = (sample(model, tokenizer, prompts, desc=f"sampling answer {k} of 2") for k in (1, 2))
    finished = [text for text in zip(prompts, first, strict=True) if text[1]]
    print(f"well-formed sentences: {well_formed(*zip(*finished, strict=True)):.3f}")
    print(f"finished continuations: {len(finished) / len(prompts):.3f}")
    pairs = []
    for prompt, *answers in zip(prompts, first, second, strict=True):
        if all(answer and answer.startswith(" ") for answer in answers):
            low, high = sorted(answers, key=gold_score)
            if gold_score(low) != gold_score(high):
                scores = {"score_chosen": gold_score(high), "score_rejected": gold_score(low)}
                pairs.append({"prompt": prompt, "chosen": high, "rejected": low} | scores)
    if len(pairs) < needed:
        sys.exit(f"only {len(pairs)} of {needed} pairs could be made: the model is not trained well enough")
    return pairs[:needed]


def flip(pair: dict) -> dict:
    """The same pair with the worse answer marked as chosen."""
    swapped = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    scores = {"score_chosen": pair["score_rejected"], "score_rejected": pair["score_chosen"]}
    return pair | swapped | scores


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write gzipped JSON lines whose bytes depend on the rows alone."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
        file.writelines((json.dumps(row) + "\n").encode() for row in rows)


def main() -> None:
    """Build the model and the data."""
    parser = argparse.ArgumentParser(description="Make the model and the preference data of the quick start.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the three folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="overwrite these folders if they are there")
    args = parser.parse_args()
    model_dir, data_dir, texts_dir = folders = [args.out / name for name in ("model", "data", "texts")]
    if not args.force and any(folder.exists() for folder in folders):
        sys.exit(f"{args.out} already holds model/, data/ or texts/; pass --force to overwrite them.")
    few_threads(on_cpu=True)

    began, rng = time.time(), random.Random(args.seed)
    torch.manual_seed(args.seed)
    stories = whole_stories(rng, STORIES)
    tokenizer = train_tokenizer(stories)
    model = fit(new_model(tokenizer), tokenizer, stories, STEPS, rng)
    print(f"parameters: {model.num_parameters():,}; trained after {time.time() - began:.0f} s")
    tokenizer.save_pretrained(model_dir)
    model.to(torch.bfloat16).save_pretrained(model_dir)

    pairs = make_pairs(model.float(), tokenizer, rng)
    test, train = pairs[:TEST_PAIRS], pairs[TEST_PAIRS:]
    flipped = set(rng.sample(range(len(train)), round(FLIPPED * len(train))))
    train = [flip(pair) if index in flipped else pair for index, pair in enumerate(train)]
    data_dir.mkdir(parents=True, exist_ok=True)
    write_rows(data_dir / "train.jsonl.gz", train)
    write_rows(data_dir / "test.jsonl.gz", test)
    print(f"wrote {len(train)} training and {len(test)} test pairs to {data_dir}")
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    teach_sums(model, tokenizer, args.seed, texts_dir)
    model.to(torch.bfloat16).save_pretrained(model_dir)
    print(f"all done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
