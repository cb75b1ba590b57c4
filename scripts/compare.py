"""Train with and without NSPO2 and with each of its strategies, and draw what happened.

    python scripts/compare.py                                             # a noisy quadratic, in seconds
    python scripts/compare.py --recipe recipes/quickstart/dpo.yaml [--any_field value]

Writes comparison.png, comparison.html (the page of `nspo2 report`, means over seeds) and comparison.json (seeds,
settings, all figures) into `--output_dir` and prints a table. One learning rate for all methods: what is compared is
what each does, not which one wins; for that, tune each one's rate on seeds of its own.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from nspo2_trl import create_nspo2_optimizer, get_default_config

try:
    from nspo2_trl.cli import plots, runs
except ImportError:
    sys.exit('error: the plots need matplotlib: pip install -e ".[plot]"')
from nspo2_trl.cli.panels import PANELS
from nspo2_trl.cli.report import summary, write_page

METHODS = ["plain", "noise", "keep", "hybrid"]
SHOWN = ("loss", "accuracy", "variance_reduction", "bias", "rank")


def quadratic(method: str, seed: int, steps: int, inside: bool, dim: int = 200, noisy: int = 4) -> runs.Run:
    """½‖w − w*‖² with the gradient noise mostly in a few directions; the optimum lies there too, or not at all."""
    torch.manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(dim, noisy)).Q
    optimum = torch.randn(dim)
    optimum -= directions @ (directions.T @ optimum)
    if inside:
        optimum = directions @ torch.full((noisy,), 3.0)
    weight = nn.Parameter(torch.zeros(dim))
    strategy = "noise" if method == "plain" else method
    config = get_default_config(strategy=strategy, projection_rank=8, trust_radius=1.0, target_bias=0.5)
    config.sentinel = False  # it would change the strategies that are compared
    optimizer = create_nspo2_optimizer([weight], torch.optim.SGD, {"lr": 0.02}, config)
    optimizer.set_enabled(method != "plain")
    log, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        noise = directions @ torch.randn(noisy) * 5 + 0.1 * torch.randn(dim)
        weight.grad = weight.detach() - optimum + noise
        optimizer.step()
        if step % 10 == 0:
            loss = (weight.detach() - optimum).square().sum().item() / 2
            entry = {"step": step, "loss": loss, "nspo2/step_time": (time.perf_counter() - start) / step}
            if method != "plain":
                entry |= {f"nspo2/{name}": value for name, value in optimizer.nspo2.metrics().items()}
            log += [entry, {"step": step, "eval_loss": loss}]
    run = runs.of(log, method)
    run.spectra = [] if method == "plain" else [(steps, optimizer.nspo2.spectrum())]
    return run


def recipe(method: str, seed: int, options: list[str], folder: Path) -> runs.Run:
    """One run of a recipe through the trainer."""
    from nspo2_trl.cli.train import build, parse

    extra = ["--seed", str(seed), "--output_dir", str(folder / f"{method}-{seed}"), "--save_strategy", "no"]
    extra += ["--nspo2_enabled", "false"] if method == "plain" else ["--nspo2_strategy", method]
    parsed = parse([*options, *extra])
    parsed[1].nspo2_retain_dataset = None  # what is compared is filters
    parsed[1].eval_on_start = parsed[1].eval_strategy != "no"
    trainer = build(*parsed)
    trainer.train()
    run = runs.of(trainer.state.log_history, method)
    if trainer.nspo2 and any(found := trainer.nspo2.spectrum()):
        run.spectra = [(trainer.state.global_step, found)]
    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="a YAML recipe; without one, the noisy quadratic")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4 on the quadratic, 0 on a recipe")
    parser.add_argument("--steps", type=int, default=400, help="of the quadratic; for a recipe use --max_steps")
    parser.add_argument("--signal", choices=["outside", "inside"], default="outside", help="of the noisy directions")
    parser.add_argument("--output_dir", type=Path, default=Path("out/compare"))
    args, options = parser.parse_known_args(argv)
    if options and args.recipe is None:
        parser.error(f"{options[0]} is no option without --recipe")
    if args.output_dir.is_file():
        parser.error(f"--output_dir {str(args.output_dir)!r} is a file: choose a folder, it will be made")
    seeds = args.seeds or ([0] if args.recipe else list(range(5)))
    torch.set_num_threads(1)
    found: dict[str, list[runs.Run]] = {method: [] for method in args.methods}
    one = partial(quadratic, steps=args.steps, inside=args.signal == "inside")
    if args.recipe is not None:
        one = partial(recipe, options=["--config", str(args.recipe), *options], folder=args.output_dir)
    for seed, method in track([(seed, method) for seed in seeds for method in args.methods], "Comparing"):
        found[method].append(one(method, seed))
    title = f"NSPO2 on {args.recipe or f'a noisy quadratic, signal {args.signal} the noisy directions'}"
    means = [runs.average(found[method], method, i) for i, method in enumerate(args.methods)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    png, page, raw = (args.output_dir / f"comparison.{ending}" for ending in ("png", "html", "json"))
    write_page(means, page, title)
    shown = [p for p in PANELS if p.key in SHOWN and any(run.has(key) for run in means for key in p.lines)]
    parts = [(panel.title, partial(plots.panel_on, panel=panel, runs=means)) for panel in shown]
    if any(run.spectra for run in means):
        parts.append(("Eigenvalues of the noise at the end", partial(plots.spectrum_on, runs=means)))
    plots.picture(png, title, parts, means)
    settings = vars(args) | {"seeds": seeds, "options": options, "text": args.recipe and args.recipe.read_text()}
    each = [{"seed": seed} | asdict(run) for of in found.values() for seed, run in zip(seeds, of)]
    raw.write_text(json.dumps({"title": title, "settings": settings, "runs": each}, indent=1, default=str))
    header, rows = summary(means)
    columns = [column for column in zip(header, *rows) if set(column[1:]) != {"–"}]
    printed = Table(*(column[0] for column in columns), title=title)
    for row in zip(*(column[1:] for column in columns)):
        printed.add_row(*row)
    Console().print(printed)
    print(png, page, raw, sep="\n")


if __name__ == "__main__":
    main()
