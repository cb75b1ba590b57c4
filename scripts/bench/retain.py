"""What a model forgets in DPO, and what keeps it: runs, their adapters, and each adapter's frontier.

    python scripts/benchmark.py retain --model FOLDER --pairs FILE_OR_FOLDER [--retain TEXTS ...] --output_dir DIR
    python scripts/benchmark.py retain --smoke

Per seed a run of each method (`retain_methods`). Each adapter is then measured on held-out pairs and on several kinds
of text, merely scaled. Those of some methods (`PROJECTED`) are also projected off K of the retained texts; plain's, at
the first rank, also off random K, K of the pairs, and K of another layer, as controls. `retain_judge` makes figures of
the rows. Finished runs and lots are skipped: stop it when you like, the same command goes on.
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
from peft import PeftModel
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from nspo2_trl.layout.roles import InputAdapter, input_adapters
from nspo2_trl.projections.retain.collect import InputSpace
from nspo2_trl.projections.retain.measure import retention
from nspo2_trl.projections.retain.pairs import pair_batches, preference, tokenize_pairs
from nspo2_trl.projections.retain.project import Point, put, starts
from nspo2_trl.training.loading import load
from nspo2_trl.training.retain import input_spaces, retained_batches

from . import ROOT, retain_judge
from .retain_methods import CHUNK, METHODS, PROJECTED, train
from .retain_texts import GIVEN_CHUNKS, domains, given_texts, gold, right_sums
from .retain_trainers import TRAINERS, answer_losses, cut

RANKS, SCALES = [12, 4, 1, 29], [1.0, 1.2, 1.5]
ALONE = [1.0, 0.75, 0.6, 0.45, 0.3, 1.25, 1.5]  # scales of an adapter as it is
FIRST = 3  # lots that are measured for all seeds before the others
CONTROLS = tuple(filter(None, retain_judge.CONTROLS))
SMOKE = "--seeds 0 1 --learning_rate 2e-3 --ranks 12 --scales 1.0 1.2 1.5 --held_out 100 --chunks 8"


def parse(argv: list[str]) -> argparse.Namespace:
    found = argparse.ArgumentParser(
        "benchmark.py retain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--name", default="quickstart", help="of the study: the raw file is retain-NAME.jsonl.gz")
    add("--model", default=str(ROOT / "recipes/quickstart/model"), help="folder of a model")
    add("--pairs", default=str(ROOT / "recipes/quickstart/data"), help="preference pairs with the splits train, test")
    add("--retain", nargs="*", default=[], help="texts that methods are given, or `self`; English prose if left out")
    add("--measure", nargs="*", default=[], help="NAME=FILE: texts to measure on, instead of the usual kinds")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--methods", nargs="+", choices=METHODS, default=["kl2"], help="beside plain")
    add(
        "--trainer", choices=TRAINERS, default="dpo", help="SFT learns the chosen answers, and is judged by their loss"
    )
    add(
        "--judge",
        choices=["loss", "gold"],
        default="loss",
        help="gold: minus that of fresh answers, quick start alone",
    )
    add("--texts", type=int, nargs="*", default=[], help="K of plain's also of fewer texts: of so many each")
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


def random_spaces(spaces: list[InputSpace], seed: int) -> list[InputSpace]:
    """As many random orthonormal directions in the place of each input's."""
    found = []
    for space in spaces:
        normal = torch.randn(space.vectors.shape, generator=torch.Generator().manual_seed(seed + len(found)))
        found.append(InputSpace(space.modules, torch.linalg.qr(normal).Q, space.shares, space.held_out))
    return found


def shifted_spaces(spaces: list[InputSpace]) -> list[InputSpace]:
    """The directions of another input of the same width in the place of each input's: of the next in the model."""
    found = []
    for i, space in enumerate(spaces):
        same = [other for other in spaces[i + 1 :] + spaces[:i] if len(other.vectors) == len(space.vectors)]
        found.append(InputSpace(space.modules, same[0].vectors, space.shares, space.held_out))
    return found


def lots(options: argparse.Namespace, method: str) -> list[tuple[str, list[Point]]]:
    """What is measured together, by name, in this order: a lot is kept as a whole."""
    found = [("scaled", [Point(0, scale) for scale in ALONE])]
    for i, rank in enumerate(options.ranks if method in PROJECTED else ()):
        found += [(f"rank{rank}", [Point(rank, scale) for scale in options.scales])]
        if method == "plain" and i == 0:
            others = [f"{control}{rank}" for control in CONTROLS] + [f"texts{number:04}" for number in options.texts]
            found += [(name, [Point(rank, 1.0)]) for name in others]
    return found


class Meter:
    """Measures points of adapters on one base model."""

    def __init__(self, options: argparse.Namespace, given: list[str]):
        self.options = options
        self.tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        splits = load(options.pairs, option="--pairs")
        held = splits["test"].shuffle(seed=0).select(range(min(options.held_out, len(splits["test"]))))
        pairs = [cut(pair) for pair in tokenize_pairs(held, self.tokenizer)]
        some = splits["train"].select(range(min(GIVEN_CHUNKS, len(splits["train"]))))
        known = [cut(pair) for pair in tokenize_pairs(some, self.tokenizer)]
        self.known = [pair["prompt_ids"] + pair["chosen_ids"] for pair in known]
        self.prompts = held["prompt"] if options.judge == "gold" else []
        self.pairs = pair_batches(pairs, self.tokenizer.pad_token_id or 0)
        self.domains = domains(options.retain, options.measure, self.tokenizer, CHUNK, options.chunks)
        self.texts = {name: retained_batches(ids, self.tokenizer) for name, ids in self.domains.items()}
        self.learned = [self.tokenizer(text)["input_ids"] for text in given]

    def measure(self, folder: Path, seed: int, lot: str, points: list[Point]) -> list[dict]:
        """A row for each point of the adapter in `folder`."""
        base = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder))
        adapters: list[InputAdapter] = input_adapters(model, "default")
        most = max(self.options.ranks) if points[0].rank else 0
        cache = self.options.output_dir / "spaces"
        control = next((name for name in CONTROLS if lot.startswith(name)), "")
        learned = self.known if control == "pairs" else self.learned
        if lot.startswith("texts"):
            learned, control = learned[: int(lot.removeprefix("texts"))], lot
        measured = next(iter(self.texts.values()))
        first, began = not cache.exists(), time.process_time()
        spaces = input_spaces(model, adapters, learned, measured, self.tokenizer, most, cache)
        if first and most:
            (self.options.output_dir / retain_judge.K_TIME).write_text(json.dumps(time.process_time() - began))
        if control == "random":
            spaces = random_spaces(spaces, 1000 * (seed + 1))
        elif control == "layer":
            spaces = shifted_spaces(spaces)
        states = [partial(put, adapters, starts(adapters), spaces, point) for point in points]
        rows = [asdict(point) | {"control": control} for point in points]
        for row, figures in zip(rows, preference(model, self.pairs, states)):
            row |= figures | {"retained": {}}
        if self.options.trainer == "sft":
            for row, loss in zip(rows, answer_losses(model, self.pairs, states)):
                row["loss"] = loss
        if self.options.judge == "gold":
            for row, state in zip(rows, states):
                state()
                row["loss"] = -gold(model, self.tokenizer, self.prompts)
        for name, batches in self.texts.items():
            for row, figures in zip(rows, retention(model, batches, states)):
                row["retained"][name] = figures
        if "sums" in self.texts:
            for row, state in zip(rows, states):
                state()
                row["right"] = right_sums(model, self.tokenizer, self.domains["sums"])
        return rows


def run(argv: list[str]) -> int:
    """Run what is missing, and judge what is there after each seed: the first rank for all seeds, then the others."""
    options = parse(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    texts = given_texts(options.retain, options.model, CHUNK, options.output_dir)
    meter = Meter(options, texts)
    for part in (slice(FIRST), slice(FIRST, None)):
        for seed in options.seeds:
            for method in dict.fromkeys(["plain", *options.methods]):
                folder = options.output_dir / f"{method}-s{seed}"
                train(options, texts, method, seed, folder)
                for lot, points in lots(options, method)[part]:
                    path = folder / f"{lot}.json"
                    if not path.exists():
                        rows = meter.measure(folder, seed, lot, points)
                        path.write_text(json.dumps([{"method": method, "seed": seed} | row for row in rows]))
                        print(f"{time.strftime('%H:%M')} measured: {path}", flush=True)
            retain_judge.finish(options.output_dir, options.raw or options.output_dir, options.name)
    return 0


def check_settings(options: argparse.Namespace) -> None:
    """Raises `SystemExit` where `--output_dir` has cells of other settings."""
    same = "model pairs retain measure trainer judge learning_rate steps scales held_out chunks".split()
    mine, path = {name: getattr(options, name) for name in same}, options.output_dir / "settings.json"
    there = json.loads(path.read_text()) if path.exists() else mine
    if there != mine:
        other = ", ".join(f"--{name} {there.get(name)}" for name in same if there.get(name) != mine[name])
        raise SystemExit(f"error: `--output_dir` {options.output_dir} has runs with {other}: choose another folder.")
    path.write_text(json.dumps(mine))
