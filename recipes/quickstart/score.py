"""Show what preference training did: the gold score of fresh samples before and after, and what it cost.

Loads the quick start's base model and a LoRA adapter trained on it, lets both continue the same prompts of the test
split at temperature 1 from the same seed, and prints the mean gold score of each with its standard error, which share
of their sentences the grammar could have written, which share of their names and things the prompt has, and a few of
the continuations. Both also do sums, which no pair is about, and whose numbers no retained text has together.

    python recipes/quickstart/score.py ADAPTER_DIR [--num_prompts 200] [--seed 0]
"""

import argparse
import gzip
import json
import statistics
import sys
from pathlib import Path

import torch
from build import gold_score, remembered, sample, well_formed
from peft import PeftModel
from sums import right
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo2_trl.cli.threads import few_threads


def read(path: Path) -> list[dict]:
    """The rows of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    """Score the base model and the adapted one, and print both."""
    parser = argparse.ArgumentParser(description="Gold score of fresh samples before and after preference training.")
    parser.add_argument("adapter_dir", type=Path, help="folder of the trained LoRA adapter")
    parser.add_argument("--num_prompts", type=int, default=200, help="how many prompts of the test split to use")
    parser.add_argument("--seed", type=int, default=0)
    args, here = parser.parse_args(), Path(__file__).resolve().parent
    if not (args.adapter_dir / "adapter_config.json").is_file():
        sys.exit(f"{args.adapter_dir} holds no LoRA adapter: it has no adapter_config.json.")
    few_threads(on_cpu=True)

    prompts = [row["prompt"] for row in read(here / "data/test.jsonl.gz")][: args.num_prompts]
    sums = [row["text"] for row in read(here / "texts/sums_test.jsonl.gz")]
    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32).eval()

    samples, able = {}, []
    for name in ("before", "after"):
        if name == "after":
            model = PeftModel.from_pretrained(model, args.adapter_dir).eval()
        torch.manual_seed(args.seed)
        samples[name] = sample(model, tokenizer, prompts, desc=f"sampling {name}")
        able.append(right(model, tokenizer, sums))

    print(f"\n{'':8}{'mean gold score':>16}{'standard error':>16}{'samples':>9}{'grammar':>9}{'memory':>8}")
    for name, texts in samples.items():
        done = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text is not None]
        if len(done) < 2:
            print(f"{name:8}{len(done)} of {len(prompts)} samples came to an end; a score needs two at least")
            continue
        begun, ended = zip(*done)
        scores = [gold_score(text) for text in ended]
        error = statistics.stdev(scores) / len(scores) ** 0.5
        kept = f"{well_formed(begun, ended):>9.2f}{remembered(begun, ended):>8.2f}"
        print(f"{name:8}{statistics.mean(scores):>16.2f}{error:>16.2f}{len(scores):>9}{kept}")
    print(
        "grammar: share of sentences that could be in the stories; memory: of names and things that are in the prompt"
    )
    print(f"retained skill: right before / after {able[0]:.3f} / {able[1]:.3f} ({len(sums)} sums)")
    for index, prompt in enumerate(prompts[:3]):
        print(f"\nprompt: {prompt}")
        for name, texts in samples.items():
            print(f"  {name + ':':8}{texts[index] or ' (did not come to an end)'}")


if __name__ == "__main__":
    main()
