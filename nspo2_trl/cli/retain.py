"""`nspo2 retain`: an adapter, whoever trained it, projected off the directions that retained texts use.

    nspo2 retain ADAPTER --retain_dataset TEXTS --dataset_name PAIRS --output_dir OUT

Writes OUT: a plain PEFT adapter, retain.json with all that was measured, retain.png where there are pairs. Several
processes share the texts and pairs: accelerate launch --num_processes 4 -m nspo2_trl.cli.retain ADAPTER ...
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from rich.console import Console
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from ..layout.roles import unprotected
from ..projections.retain.collect import mean_leakage
from ..projections.retain.measure import retention
from ..projections.retain.pairs import pair_batches, preference, tokenize_pairs
from ..projections.retain.project import put, starts
from ..projections.retain.texts import Batch, check_texts, hold_out, refuse_same_texts
from ..training.checkpoints import refuse_trained
from ..training.loading import load
from ..training.retain import input_spaces, retained_batches, retained_texts, sound_adapters
from .frontier import Entry, choose, draw, scaled_kl, show
from .retain_arguments import LOSS_INCREASE, parse
from .shapes import no_template, settle
from .threads import few_threads

PAIRS = 256  # held-out pairs that are measured on
KNOWN_PAIRS = 1000  # pairs of each split that retained texts are compared with


def load_model(args: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """The base with the adapter, the tokenizer, and what the base is called."""
    try:
        config = PeftConfig.from_pretrained(args.adapter)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no adapter {args.adapter!r}: give a folder with adapter_config.json, or a hub id ({error})."
        ) from error
    base = args.model_name_or_path or config.base_model_name_or_path
    if not base:
        raise ValueError("The adapter does not say what its base model is: set `--model_name_or_path`.")
    device = PartialState(cpu=not torch.cuda.is_available()).device  # of this process
    options: dict[str, Any] = {"dtype": args.dtype or ("float32" if device.type == "cpu" else "auto")}
    if args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(base, **options)
        own = any((Path(args.adapter) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        tokenizer = AutoTokenizer.from_pretrained(args.adapter if own else base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base model {base!r} could not be loaded: set `--model_name_or_path` ({error})."
        ) from error
    return PeftModel.from_pretrained(model, args.adapter), tokenizer, base


def load_pairs(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list, list[list[int]]]:
    """Held-out pairs, and token ids of pairs of all splits to compare retained texts with."""
    splits = {
        name: settle(rows, f"{args.dataset_name}, split {name}") for name, rows in load(args.dataset_name).items()
    }
    held = splits["test"] if "test" in splits else next(iter(splits.values()))
    if tokenizer.chat_template is None and not isinstance(held[0]["chosen"], str):
        raise no_template(tokenizer.name_or_path)
    some = [rows.select(range(min(KNOWN_PAIRS, len(rows)))) for rows in splits.values()]
    known = [pair for rows in some for pair in tokenize_pairs(rows, tokenizer, args.max_length)]
    held = held.shuffle(seed=0).select(range(PAIRS)) if len(held) > PAIRS else held
    texts = [pair["prompt_ids"] + pair[name] for pair in known for name in ("chosen_ids", "rejected_ids")]
    found = tokenize_pairs(held, tokenizer, args.max_length)
    if len(found) < len(held) and PartialState().is_main_process:
        lost = len(held) - len(found)
        print(f"{lost} of {len(held)} held-out pairs are left out: their prompts alone fill `--max_length`.")
    return found, texts


def retain(args: argparse.Namespace) -> dict[str, Any]:
    """All that `retain.json` has, with the adapter written; see the module's docstring."""
    refuse_trained(args.output_dir)
    model, tokenizer, base = load_model(args)
    adapters = sound_adapters(model, "default")
    learned: list[list[int]] = []
    measured: dict[str, list[Batch]] = {}
    samples, length, folder = args.retain_samples, args.retain_max_length, args.output_dir
    for seed, option in enumerate(("retain_dataset", "retain_eval_dataset")):
        for name in getattr(args, option):
            texts = retained_texts(model, name, tokenizer, samples, length, option, seed=seed, folder=folder)
            check_texts(texts, model, option=option)
            held = texts
            if option == "retain_dataset":
                more, held = hold_out(texts)
                learned += more
            measured[label(name, measured)] = retained_batches(held, tokenizer)
    names = list(measured)[: len(args.retain_dataset)]
    rank = max(point.rank for point in args.grid)
    tokens = check_texts(learned, model, rank)
    pairs = None
    if args.dataset_name:
        held_pairs, known = load_pairs(args, tokenizer)
        refuse_same_texts(learned, known)
        pairs = pair_batches(held_pairs, tokenizer.pad_token_id or 0)
    own = [batch for name in names for batch in measured[name]]
    spaces = input_spaces(model, adapters, learned, own, tokenizer, rank, args.output_dir)
    states = [partial(put, adapters, starts(adapters), spaces, point) for point in args.grid]
    points: list[Entry] = [{"rank": p.rank, "scale": p.scale, "form": p.form, "retained": {}} for p in args.grid]
    for name, held_batches in measured.items():
        for entry, figures in zip(points, retention(model, held_batches, states)):
            entry["retained"][name] = figures
    if pairs:
        for entry, figures in zip(points, preference(model, pairs, states, beta=args.beta)):
            entry.update(figures)
    if args.point or not pairs:
        chosen = points[args.grid.index(args.point or args.grid[-1])]
    else:
        allowed = LOSS_INCREASE if args.max_loss_increase is None else args.max_loss_increase
        chosen = choose(points, names, allowed)
    states[points.index(chosen)]()
    result = {
        **{"adapter": args.adapter, "base": base, "dataset_name": args.dataset_name, "beta": args.beta},
        **{"retain_dataset": names, "retain_eval_dataset": list(measured)[len(names) :], "tokens": tokens},
        "leakage": {rank: mean_leakage(spaces, rank) for rank in sorted({p.rank for p in args.grid})},
        "unprotected": unprotected(model, "default"),
        **{"chosen": chosen, "points": points},
    }
    if pairs:
        result["scaled_kl"] = {name: scaled_kl(points, name, chosen["loss"]) for name in measured}
    if PartialState().is_main_process:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        (Path(args.output_dir) / "retain.json").write_text(json.dumps(result, indent=1))
    return result


def label(path: str, taken: dict) -> str:
    """A short name of a dataset that nothing in `taken` has."""
    name = Path(path).name.split(".")[0] or path
    return name if name not in taken else f"{name} {len(taken) + 1}"


def report(result: dict[str, Any], output_dir: str) -> None:
    """Print what was measured and chosen, and draw it where there are pairs."""
    points, chosen = result["points"], result["chosen"]
    console = Console(soft_wrap=True, markup=False, highlight=False)
    show(points, chosen, console)
    for name, kl in result.get("scaled_kl", {}).items():
        if kl and chosen["rank"]:
            share = chosen["retained"][name]["kl"] / kl
            console.print(f"{name}: {share:.0%} of the KL that the adapter has where it is only scaled to this loss.")
    for kind, names in result["unprotected"].items():
        console.print(f"Not protected, since no projection reaches them: {kind} ({len(names)} parameters).")
    if "loss" in chosen:
        try:
            draw(points, chosen, Path(output_dir) / "retain.png")
            console.print(f"Picture: {output_dir}/retain.png")
        except ImportError:
            console.print('No picture: it needs matplotlib (pip install -e ".[plot]").')
    console.print(f"Figures: {output_dir}/retain.json")
    console.print(f"Adapter: {output_dir} ({chosen['rank']} directions taken out, scale {chosen['scale']:g})")


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        few_threads(not torch.cuda.is_available())
        result = retain(args)
        if PartialState().is_main_process:
            report(result, args.output_dir)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
