"""SHA-256 of what short runs end with: two versions of the package train alike where these are equal.

    python tests/equal_bytes.py                       # compare this checkout with tests/equal_bytes.json
    python tests/equal_bytes.py --root OTHER --write  # keep the hashes of another checkout, such as one of 9b63399

Hashes depend on the machine and on torch's version: on another machine write them from the old checkout first. Each
run has its own process, with the package of `--root`. The stories run needs ../shared and is left out without it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()
KEPT = HERE.with_suffix(".json")
SHARED = HERE.parents[2] / "shared"
RECIPE = Path("recipes/quickstart/dpo.yaml")
STORIES = [
    "--model_name_or_path",
    f"{SHARED}/models/stories260k",
    "--dataset_name",
    f"{SHARED}/data/stories_sentiment",
]
# the trainers' defaults of 9b63399
OLD = {"covariance": "adapter", "projection_rank": 16, "update_freq": 10, "basis_dtype": "float32"}
PROCESSES = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate_configs/cpu_2proc.yaml"]


def digest(named: dict) -> str:
    found = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def command(out: str, steps: int, *options: str, launcher: tuple = ()) -> str:
    """The adapter that scripts/train.py leaves in `out`."""
    from safetensors.torch import load_file

    quiet = ["--report_to", "none", "--eval_strategy", "no", "--save_strategy", "no", "--use_cpu", "true"]
    recipe = Path(f"{out}.yaml")  # without retained texts, which 9b63399 did not have
    lines = [line for line in RECIPE.read_text().splitlines() if "nspo2_retain" not in line]
    recipe.write_text("\n".join(lines))
    line = [
        sys.executable,
        *launcher,
        "scripts/train.py",
        "--config",
        str(recipe),
        "--max_steps",
        str(steps),
        "--output_dir",
        out,
    ]
    quiet += [part for name, value in OLD.items() for part in (f"--nspo2_{name}", str(value))]
    subprocess.run([*line, *quiet, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return digest(load_file(f"{out}/adapter_model.safetensors"))


def trainer(kind: str, out: str) -> str:
    """5 steps of another trainer on the quick start's model and pairs."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification

    import nspo2_trl

    pairs = load_dataset("recipes/quickstart/data", split="train").select(range(48))
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    columns, model, extra, own = pairs.column_names, "recipes/quickstart/model", {}, {}
    task = "CAUSAL_LM"
    if kind == "SFT":
        pairs = pairs.map(lambda row: {"prompt": row["prompt"], "completion": row["chosen"]}, remove_columns=columns)
    elif kind == "KTO":
        rows = [
            {"prompt": r["prompt"], "completion": r[c], "label": c == "chosen"} for r in pairs for c in columns[1:]
        ]
        pairs = type(pairs).from_list(rows)
    elif kind == "GRPO":
        pairs = pairs.select_columns(["prompt"])
        extra = {"reward_funcs": lambda completions, **_: [float(len(set(text.split()))) for text in completions]}
        own = {"num_generations": 2, "max_completion_length": 12}
    elif kind == "Reward":
        task = "SEQ_CLS"
        torch.manual_seed(0)  # of the new head
        model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="float32")
    args = getattr(nspo2_trl, f"NSPO2{kind}Config")(
        output_dir=out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        max_steps=5,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        seed=0,
        **{f"nspo2_{name}": value for name, value in (OLD | {"update_freq": 2, "projection_rank": 4}).items()},
        nspo2_max_rank=8,
        **own,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task)
    run = getattr(nspo2_trl, f"NSPO2{kind}Trainer")(model, args=args, train_dataset=pairs, peft_config=lora, **extra)
    run.train()
    assert any(entry.get("nspo2/active") for entry in run.state.log_history), "nothing was filtered"
    return digest({name: param for name, param in run.model.named_parameters() if param.requires_grad})


def wrapper(strategy: str) -> str:
    """50 steps of the optimizer wrapper on a small regression."""
    import torch
    from torch import nn

    from nspo2_trl import create_nspo2_optimizer, get_default_config

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    config = get_default_config(strategy=strategy, projection_rank=4, update_freq=5)
    optimizer = create_nspo2_optimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config)
    active = False
    for _ in range(50):
        optimizer.zero_grad()
        x = torch.randn(16, 8)
        (model(x)[:, 0] - x.sum(1)).square().mean().backward()
        optimizer.step()
        active |= optimizer.get_metrics()["is_active"]
    assert active, "nothing was filtered"
    return digest(dict(model.named_parameters()))


def run(name: str) -> str:
    with tempfile.TemporaryDirectory() as out:
        if name == "quickstart":
            return command(out, 20)
        if name == "stories":
            return command(out, 20, *STORIES)
        if name == "ddp":
            return command(out, 10, launcher=tuple(PROCESSES))
        kind, _, strategy = name.partition("-")
        return wrapper(strategy) if kind == "wrapper" else trainer(kind, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="the checkout whose package is run")
    parser.add_argument("--write", action="store_true", help="keep the hashes instead of comparing with them")
    parser.add_argument("--one", help="only this run, its hash on the last line")
    args = parser.parse_args()
    if args.one:
        print(run(args.one))
        return
    names = ["quickstart", "SFT", "KTO", "GRPO", "Reward", "wrapper-noise", "wrapper-keep", "wrapper-hybrid", "ddp"]
    names += ["stories"] * SHARED.is_dir()
    root = args.root.resolve()
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    kept = json.loads(KEPT.read_text()) if KEPT.exists() and not args.write else {}
    found, failed = {}, 0
    for name in names:
        line = [sys.executable, str(HERE), "--one", name]
        said = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True)
        found[name] = said.stdout.split()[-1] if said.returncode == 0 else said.stderr[-800:]
        same = "written" if args.write else "equal" if kept.get(name) == found[name] else "DIFFERS"
        if said.returncode != 0:
            same = "FAILED"
        failed += same in ("DIFFERS", "FAILED")
        print(f"{name:16} {same:8} {found[name]}", flush=True)
    if args.write and not failed:
        KEPT.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
