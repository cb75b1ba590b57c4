"""What a model forgets in DPO, and what keeps it: runs, their adapters, and each adapter's frontier.

    python scripts/benchmark.py retain --model FOLDER --pairs FILE_OR_FOLDER [--retain TEXTS ...] --output_dir DIR
    python scripts/benchmark.py retain --smoke

Per seed a plain run and one for each weight of the KL term. Each adapter is then measured on held-out pairs and on
texts of several kinds: merely scaled (the rival), projected off K of the retained texts, and off random K (the
control). `retain_judge` makes figures of the rows. Finished runs and lots are skipped: stop it when you like, the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from nspo2_trl import NSPO2DPOConfig, NSPO2DPOTrainer
from nspo2_trl.layout.roles import InputAdapter, input_adapters
from nspo2_trl.projections.retain.collect import InputSpace
from nspo2_trl.projections.retain.measure import retention
from nspo2_trl.projections.retain.pairs import pair_batches, preference, tokenize_pairs
from nspo2_trl.projections.retain.project import Point, put, starts
from nspo2_trl.training.loading import load
from nspo2_trl.training.retain import input_spaces, retained_batches

from . import ROOT, retain_judge
from .retain_texts import domains, given_texts

PROMPT, ANSWER, CHUNK = 48, 40, 128  # tokens
RANKS, SCALES = [12, 4, 1, 29], [1.0, 1.2, 1.5]
ALONE = [1.0, 0.75, 0.6, 0.45, 0.3]  # scales of the rival
FIRST = 3  # lots that are measured for all seeds before the others
GIVEN = "prose"  # the domain that the method is given texts of
SMOKE = "--seeds 0 1 --learning_rate 2e-3 --ranks 12 --scales 1.0 1.2 1.5 --held_out 100 --chunks 8"


def parse(argv: list[str]) -> argparse.Namespace:
    found = argparse.ArgumentParser(
        "benchmark.py retain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--name", default="quickstart", help="of the study: the raw file is retain-NAME.jsonl.gz")
    add("--model", default=str(ROOT / "recipes/quickstart/model"), help="folder of a model")
    add("--pairs", default=str(ROOT / "recipes/quickstart/data"), help="preference pairs with the splits train, test")
    add("--retain", nargs="*", default=[], help="texts that the method is given; English prose if left out")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--kl", type=float, nargs="+", default=[2.0], help="weights of the KL term, a run each beside the plain one")
    add("--learning_rate", type=float, default=5e-4)
    add("--steps", type=int, default=34, help="of 12 pairs")
    add("--ranks", type=int, nargs="+", default=RANKS, help="directions taken out, in the order of measuring")
    add("--scales", type=float, nargs="+", default=SCALES, help="of what is left of the adapter")
    add("--held_out", type=int, default=64, help="pairs that are measured on")
    add("--chunks", type=int, default=24, help=f"of {CHUNK} tokens that are measured on, of each kind of text")
    add("--raw", type=Path, help="folder of the raw file; `--output_dir` if left out")
    add("--output_dir", type=Path, default=Path("out/retain"), help="adapters, finished lots, table, picture")
    add("--smoke", action="store_true", help=f"the quick start's model with {SMOKE}")
    options = found.parse_args(argv)
    return found.parse_args([*SMOKE.split(), *argv]) if options.smoke else options


def cut(pair: dict) -> dict:
    """The end of the prompt, the beginnings of the answers."""
    answers = {name: pair[name][:ANSWER] for name in ("chosen_ids", "rejected_ids")}
    return {"prompt_ids": pair["prompt_ids"][-PROMPT:], **answers}


class ShortPairs(NSPO2DPOTrainer):
    """On pairs that are cut."""

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        return super()._prepare_dataset(*args, **kwargs).map(cut)


def name_of(weight: float) -> str:
    return f"kl{weight:g}" if weight else "plain"


def train(options: argparse.Namespace, texts: list[str], weight: float, seed: int, folder: Path) -> None:
    """One run, its adapter into `folder`, with run.json: settings, losses, time of a step and of the KL term in it."""
    if (folder / "run.json").exists():
        return
    config = NSPO2DPOConfig(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=4,
        beta=0.1,
        seed=seed,
        logging_steps=1,
        save_steps=4,  # a run that was cut off goes on from here
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        nspo2_enabled=weight > 0,
        nspo2_projection_rank=0,  # the noise filter is off
        nspo2_update_freq=10**6,
        nspo2_retain_kl=weight,
        nspo2_retain_project="no",  # that is done to the finished adapter, in many ways
        nspo2_retain_max_length=CHUNK,
    )
    set_seed(seed)  # LoRA's start is drawn before the trainer sets its own
    trainer = ShortPairs(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=config,
        train_dataset=load(options.pairs, option="--pairs")["train"],
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        retain_dataset=texts if weight else None,
    )
    start = time.process_time()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    run = {"seconds": time.process_time() - start, "losses": [entry["loss"] for entry in logs]}
    for name in ("step_time", "retain_ms", "retain_kl"):
        figures = [entry[f"nspo2/{name}"] for entry in logs if f"nspo2/{name}" in entry]
        run[name] = sum(figures) / len(figures) if figures else None
    trainer.model.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(run))


def random_spaces(spaces: list[InputSpace], seed: int) -> list[InputSpace]:
    """As many random orthonormal directions in the place of each input's."""
    found = []
    for space in spaces:
        normal = torch.randn(space.vectors.shape, generator=torch.Generator().manual_seed(seed + len(found)))
        found.append(InputSpace(space.modules, torch.linalg.qr(normal).Q, space.shares, space.held_out))
    return found


def lots(options: argparse.Namespace) -> list[tuple[str, list[Point]]]:
    """What is measured together, by name, in this order: a lot is kept as a whole."""
    found = [("scaled", [Point(0, scale) for scale in ALONE])]
    for rank in options.ranks:
        found += [(f"rank{rank}", [Point(rank, scale) for scale in options.scales])]
        found += [(f"random{rank}", [Point(rank, 1.0)])]
    return found


class Meter:
    """Measures points of adapters on one base model."""

    def __init__(self, options: argparse.Namespace, given: list[str]):
        self.options = options
        self.tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        splits = load(options.pairs, option="--pairs")
        held = splits["test"].shuffle(seed=0).select(range(min(options.held_out, len(splits["test"]))))
        pairs = [cut(pair) for pair in tokenize_pairs(held, self.tokenizer)]
        self.pairs = pair_batches(pairs, self.tokenizer.pad_token_id or 0)
        texts = domains(options.retain, self.tokenizer, CHUNK, options.chunks)
        self.texts = {name: retained_batches(ids, self.tokenizer) for name, ids in texts.items()}
        self.learned = [self.tokenizer(text)["input_ids"] for text in given]

    def measure(self, folder: Path, seed: int, lot: str, points: list[Point]) -> list[dict]:
        """A row for each point of the adapter in `folder`."""
        base = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder))
        adapters: list[InputAdapter] = input_adapters(model, "default")
        most = max(self.options.ranks) if points[0].rank else 0
        cache = self.options.output_dir / "spaces"
        spaces = input_spaces(model, adapters, self.learned, self.texts[GIVEN], self.tokenizer, most, cache)
        if lot.startswith("random"):
            spaces = random_spaces(spaces, 1000 * (seed + 1))
        states = [partial(put, adapters, starts(adapters), spaces, point) for point in points]
        rows = [asdict(point) | {"control": lot.startswith("random")} for point in points]
        for row, figures in zip(rows, preference(model, self.pairs, states)):
            row |= figures | {"retained": {}}
        for name, batches in self.texts.items():
            for row, figures in zip(rows, retention(model, batches, states)):
                row["retained"][name] = figures
        return rows


def run(argv: list[str]) -> int:
    """Run what is missing, and judge what is there after each seed: the first rank for all seeds, then the others."""
    options = parse(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    texts = given_texts(options.retain, AutoTokenizer.from_pretrained(options.model), CHUNK)
    meter, everything = Meter(options, texts), lots(options)
    for part in (everything[:FIRST], everything[FIRST:]):
        for seed in options.seeds if part else ():
            for weight in (0.0, *options.kl):
                folder = options.output_dir / f"{name_of(weight)}-s{seed}"
                train(options, texts, weight, seed, folder)
                for lot, points in part:
                    path = folder / f"{lot}.json"
                    if not path.exists():
                        rows = meter.measure(folder, seed, lot, points)
                        path.write_text(json.dumps([{"method": name_of(weight), "seed": seed} | row for row in rows]))
                        print(f"{time.strftime('%H:%M')} measured: {path}", flush=True)
            retain_judge.finish(options.output_dir, options.raw or options.output_dir, options.name)
    return 0


def check_settings(options: argparse.Namespace) -> None:
    """Raises `SystemExit` where `--output_dir` has cells of other settings."""
    same = ("model", "pairs", "retain", "learning_rate", "steps", "scales", "held_out", "chunks")
    mine, path = {name: getattr(options, name) for name in same}, options.output_dir / "settings.json"
    there = json.loads(path.read_text()) if path.exists() else mine
    if there != mine:
        other = ", ".join(f"--{name} {there[name]}" for name in same if there[name] != mine[name])
        raise SystemExit(f"error: `--output_dir` {options.output_dir} has runs with {other}: choose another folder.")
    path.write_text(json.dumps(mine))
