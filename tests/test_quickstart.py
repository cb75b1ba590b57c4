"""The quick start's language, model and data are what its README says; and DPO on them visibly works."""

import gzip
import json
import random
import re
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import MODEL, ROOT
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = ROOT / "recipes/quickstart"
sys.path.insert(0, str(FOLDER))
import build
import sums


def rows(split, folder="data"):
    with gzip.open(FOLDER / f"{folder}/{split}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def texts(name):
    return [row["text"] for row in rows(name, "texts")]


def test_stories_of_the_grammar_are_well_formed():
    assert build.gold_score("She SHARED, hugged and cried; unkindly.") == 1 and build.gold_score("") == 0
    rng = random.Random(0)
    stories = [build.write_story(rng) for _ in range(200)]
    opening, rest = ([" ".join(part) for part in parts] for parts in zip(*stories))
    assert build.well_formed(opening, [" " + text for text in rest]) == 1
    assert build.well_formed(["Ada met Bea."], [" Ada the ball kicked."]) == 0
    scores = [build.gold_score(text) for text in rest]
    assert min(scores) < -2 < 2 < max(scores)


def test_data_is_as_described():
    train, test = rows("train"), rows("test")
    assert len(train) == 4000 and len(test) == 500
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in train + test:
        assert row["score_chosen"] == build.gold_score(row["chosen"]) != row["score_rejected"]
        assert row["score_rejected"] == build.gold_score(row["rejected"])
    flipped = sum(row["score_chosen"] < row["score_rejected"] for row in train)
    assert flipped == 400 and all(row["score_chosen"] > row["score_rejected"] for row in test)
    assert len({row["chosen"] for row in train} | {row["rejected"] for row in train}) > 7900


def test_model_is_small_and_writes_well_formed_sentences():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert model.num_parameters() == 349_728
    size = sum(path.stat().st_size for name in ("model", "data", "texts") for path in (FOLDER / name).iterdir())
    assert size < 3_000_000
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in rows("test")[:64]]
    written = build.sample(model, tokenizer, prompts)
    done = [(prompt, text) for prompt, text in zip(prompts, written) if text]
    assert len(done) >= 60 and build.well_formed(*zip(*done)) > 0.9


def numbers(text):
    """Of each sum in a text its two numbers, the smaller first, and the result."""
    return [(*sorted((int(a), int(b))), int(c)) for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)\.", text)]


def test_texts_are_sums_and_stories_and_those_held_out_are_others():
    retained, held_out = ([found for text in texts(name) for found in numbers(text)] for name in ("sums", "sums_test"))
    assert len(retained) == 5 * 256 and len(held_out) == 5 * 200
    assert all(a + b == c and 0 <= a <= b <= sums.LARGEST for a, b, c in retained + held_out)
    assert not set(retained) & set(held_out) and len(set(retained) | set(held_out)) > 110
    stories = texts("stories_test")
    assert build.well_formed([""] * len(stories), [" " + text for text in stories]) == 1
    assert not any(re.search(r"\d", row[key]) for row in rows("train") for key in ("prompt", "chosen", "rejected"))


def test_the_pairs_are_all_that_the_data_folder_holds():
    data = load_dataset(str(FOLDER / "data"))
    assert {name: len(split) for name, split in data.items()} == {"train": 4000, "test": 500}


def test_sums_are_scored_exactly():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    asked = texts("sums_test")[:40]
    assert sums.right(model.float(), tokenizer, asked) > 0.9
    wrong = [re.sub(r"(\d+)\.$", lambda found: f"{int(found[1]) + 1}.", text) for text in asked]
    assert sums.right(model, tokenizer, wrong) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_teaches_kindness(tmp_path):
    recipe = ["--config", "recipes/quickstart/dpo.yaml", "--output_dir", str(tmp_path)]
    subprocess.run(["accelerate", "launch", "scripts/train.py", *recipe], cwd=ROOT, check=True, timeout=300)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [e for e in history if "eval_loss" in e][-1]["eval_rewards/accuracies"] >= 0.70
    score = [sys.executable, str(FOLDER / "score.py"), str(tmp_path)]
    printed = subprocess.run(score, capture_output=True, text=True, check=True).stdout
    before, after = (float(re.search(rf"^{name} +(-?[\d.]+)", printed, re.M)[1]) for name in ("before", "after"))
    assert after > before + 1
    skill = re.search(r"retained skill: right before / after ([\d.]+) / ([\d.]+)", printed)
    assert float(skill[1]) > 0.95 and float(skill[2]) > float(skill[1]) - 0.1


@pytest.fixture
def run(monkeypatch):
    def start(script, *argv):
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        runpy.run_path(str(FOLDER / script), run_name="__main__")

    return start


def test_what_score_and_build_refuse(tmp_path, run):
    with pytest.raises(SystemExit, match="holds no LoRA adapter"):
        run("score.py", tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match="pass --force to overwrite"):
        run("build.py", "--out", tmp_path)


def test_score_says_when_too_few_samples_came_to_an_end(tmp_path, run, capsys):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(tmp_path)
    run("score.py", tmp_path, "--num_prompts", "1")
    said = capsys.readouterr().out
    assert len(re.findall("[01] of 1 samples came to an end; a score needs two at least", said)) == 2
