r"""Draw what retained texts change: two runs of the quick start, with and without.

    nspo2 train --config recipes/quickstart/dpo.yaml --eval_steps 20
    nspo2 train --config recipes/quickstart/dpo.yaml --eval_steps 20 --nspo2_retain_kl 0 --nspo2_retain_project no \
        --output_dir out/quickstart-plain
    python recipes/quickstart/picture.py out/quickstart out/quickstart-plain --out out/quickstart.png

The loss of held-out pairs and the KL on retained texts are from the logs; the sums are done here. Needs matplotlib.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import PeftModel
from score import read
from sums import right
from transformers import AutoModelForCausalLM, AutoTokenizer

from nspo2_trl.cli import plots, runs
from nspo2_trl.cli.threads import few_threads

COLORS = [light for light, _ in plots.COLORS]
NAMES = ["texts retained", "without"]
PANELS = [
    ("eval_loss", "Preferences", "loss of held-out pairs"),
    ("eval_retain_kl", "Retained texts", "KL on held-out ones, nats per token"),
]


def skill(folders: list[Path], here: Path) -> list[float]:
    """Share of right sums of the model alone, and of each adapter."""
    sums = [row["text"] for row in read(here / "texts/sums_test.jsonl.gz")]
    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    found = []
    for folder in [None, *folders]:
        model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32).eval()
        found.append(right(PeftModel.from_pretrained(model, folder).eval() if folder else model, tokenizer, sums))
    return found


def draw(folders: list[Path], able: list[float], path: Path) -> None:
    """One PNG of three panels; a run whose adapter was projected at the end has two values there."""
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    axes = figure.subplots(1, len(PANELS) + 1)
    for i, (name, folder) in enumerate(zip(NAMES, folders, strict=True)):
        run = runs.read(folder, name)
        for axis, (key, title, label) in zip(axes, PANELS):
            steps, values = run.series(key)
            axis.plot(
                steps, values, color=COLORS[1 + i], linestyle=plots.STYLES[i], marker="o", markersize=3, label=name
            )
            axis.set(title=title, xlabel="step", ylabel=label)
            axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    bars = axes[-1].bar(["before", *NAMES], able, color=[COLORS[0], COLORS[1], COLORS[2]])
    axes[-1].bar_label(bars, fmt="%.2f")
    axes[-1].set(title="Sums, which no pair is about", ylabel="share that is right", ylim=(0, 1.12))
    figure.savefig(path, dpi=100)


def main() -> None:
    """Do the sums and draw."""
    parser = argparse.ArgumentParser(description="The quick start with and without retained texts, as a picture.")
    parser.add_argument("folders", type=Path, nargs=2, help="output_dir of the run with, and of the run without")
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    args = parser.parse_args()
    few_threads(on_cpu=True)
    able = skill(args.folders, Path(__file__).resolve().parent)
    draw(args.folders, able, args.out)
    print("right sums, " + ", ".join(f"{name} {share:.3f}" for name, share in zip(["before", *NAMES], able)))


if __name__ == "__main__":
    main()
