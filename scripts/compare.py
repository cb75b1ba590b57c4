"""Train with and without NSPO2 and with each of its strategies, and draw what happened.

    python scripts/compare.py                                             # a noisy quadratic, in seconds
    python scripts/compare.py --recipe recipes/quickstart/dpo.yaml [--any_field value]

Writes comparison.png, comparison.html (one self-contained page) and comparison.json (seeds, settings, all figures)
into `--output_dir` and prints a table. One learning rate for all methods: what is compared is what each does, not
which one wins; for that, tune each one's rate on seeds of its own.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from nspo2_trl import create_nspo2_optimizer, get_default_config
from nspo2_trl.cli.comparison import Run, table, write_page

METHODS = ["plain", "noise", "keep", "hybrid"]


# ---- a noisy quadratic ----


def quadratic(method: str, seed: int, steps: int, inside: bool, dim: int = 200, noisy: int = 4) -> Run:
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
    run, start = Run(method, seed), time.perf_counter()
    for step in range(1, steps + 1):
        noise = directions @ torch.randn(noisy) * 5 + 0.1 * torch.randn(dim)
        weight.grad = weight.detach() - optimum + noise
        optimizer.step()
        if step % 10 == 0:
            distance = (weight.detach() - optimum).norm().item()
            run.add("loss", step, distance**2 / 2)
            run.add("distance", step, distance)
            if method != "plain":
                metrics = optimizer.get_metrics()
                for key, name in (("variance_reduction", "recent_variance_reduction"), ("bias", "bias")):
                    if metrics[name] == metrics[name]:  # NaN before the first basis
                        run.add(key, step, metrics[name])
                run.add("rank", step, metrics["current_rank"])
                if step % 50 == 0:
                    run.spectrum.append((step, optimizer.nspo2.spectrum()))
    run.seconds = time.perf_counter() - start
    return run


# ---- a recipe ----


def recipe(method: str, seed: int, options: list[str], folder: Path) -> Run:
    """One run of a recipe through the trainer, with the held-out figures where there are some."""
    from transformers import TrainerCallback

    from nspo2_trl.cli.train import build, parse

    class Spectrum(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            found = trainer.nspo2.spectrum() if trainer.nspo2 else []
            if any(found):
                run.spectrum.append((state.global_step, found))

    extra = ["--seed", str(seed), "--output_dir", str(folder / f"{method}-{seed}"), "--save_strategy", "no"]
    extra += ["--nspo2_enabled", "false"] if method == "plain" else ["--nspo2_strategy", method]
    parsed = parse([*options, *extra])
    parsed[1].eval_on_start = parsed[1].eval_strategy != "no"
    run, trainer = Run(method, seed), build(*parsed)
    trainer.add_callback(Spectrum())
    start = time.perf_counter()
    trainer.train()
    run.seconds = time.perf_counter() - start
    history = trainer.state.log_history
    held_out = any("eval_loss" in entry for entry in history)
    keys = {"eval_loss" if held_out else "loss": "loss", "eval_rewards/accuracies": "accuracy"}
    keys |= {f"nspo2/{name}": name for name in ("variance_reduction", "bias", "rank")}
    for entry in history:
        for key, name in keys.items():
            if key in entry and not (key == "eval_rewards/accuracies" and entry["step"] == 0):  # all ties
                run.add(name, entry["step"], entry[key])
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
    runs = []
    for seed, method in track([(s, m) for s in seeds for m in args.methods], "Comparing"):
        if args.recipe is None:
            runs.append(quadratic(method, seed, args.steps, args.signal == "inside"))
        else:
            runs.append(recipe(method, seed, ["--config", str(args.recipe), *options], args.output_dir))
    title = f"NSPO2 on {args.recipe or f'a noisy quadratic, signal {args.signal} the noisy directions'}"
    settings = {"command": sys.argv if argv is None else argv, "seeds": seeds, "methods": args.methods}
    settings |= (
        {"steps": args.steps, "signal": args.signal}
        if args.recipe is None
        else {"options": options, "recipe": args.recipe.read_text()}
    )
    paths = write_page(runs, args.output_dir, title, settings)
    header, rows = table(runs)
    printed = Table(title=title)
    for name in header:
        printed.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        printed.add_row(*row)
    Console().print(printed)
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
