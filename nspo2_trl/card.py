"""What the model card says about NSPO2: the recipe, the figures that this run measured, the versions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from .trainer import NSPO2Mixin

# key, what it means; in the order in which tables show them
FIGURES = {
    "variance_reduction": "share of the noise removed",
    "bias": "1 - cos of mean and filtered mean",
    "rank": "directions removed an adapter",
    "alpha": "share the trust region lets through",
    "noise_scale": "samples a step that still pay",
    "signal_removed": "share of the signal removed",
    "active": "share of steps projected",
    "overhead_ms": "a step",
}
CITATION = """@software{nspo2,
    title = {NSPO2: Null Space Preference Optimization v2},
    year  = 2024,
    url   = {https://github.com/PrayPrey/NSRPO2}
}"""
# where a run was, not what it did; and what Trainer fills in by itself
_LEFT_OUT = {"output_dir", "logging_dir", "run_name", "hub_model_id", "resume_from_checkpoint", "report_to"}
_LEFT_OUT |= {"accelerator_config", "debug", "do_eval", "dataloader_pin_memory", "pad_to_multiple_of", "disable_tqdm"}


def means(log_history: Sequence[dict]) -> dict[str, float]:
    """Mean of what was logged, for the names of `FIGURES` that were."""
    found = {name: [e[f"nspo2/{name}"] for e in log_history if f"nspo2/{name}" in e] for name in FIGURES}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def recipe(trainer: NSPO2Mixin) -> dict:
    """The settings of the run that differ from the defaults, as a recipe for `nspo2 train` has them.

    Folders and secrets are left out.
    """
    shown = trainer.args.to_dict()  # with secrets masked, and what YAML can hold
    chosen: dict[str, Any] = {"model_name_or_path": trainer.model.config._name_or_path}
    for f in fields(trainer.args):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = getattr(trainer.args, f.name)
        if f.init and value != default and f.name not in _LEFT_OUT and "token" not in f.name:
            chosen[f.name] = shown.get(f.name)
    peft_config = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).get("default")
    if peft_config is not None:
        modules = peft_config.target_modules
        chosen |= {
            "use_peft": True,
            "lora_r": peft_config.r,
            "lora_alpha": peft_config.lora_alpha,
            "lora_dropout": peft_config.lora_dropout,
            "lora_target_modules": sorted(modules) if isinstance(modules, (set, list)) else modules,
        }
    return chosen


def add_to_card(path: str, trainer: NSPO2Mixin) -> None:
    """Add the section on NSPO2 to the model card that TRL wrote, and mend what it says of a local base model."""
    card = Path(path).read_text()
    name = trainer.model.config._name_or_path
    card = card.replace("[None](https://huggingface.co/None)", f"`{os.path.basename(name.rstrip('/')) or 'a model'}`")
    card = card.replace('model="None"', f'model="{trainer.args.output_dir}"')
    lines = [
        "## NSPO2",
        "",
        f"The gradients of the LoRA adapters were filtered with NSPO2 (strategy `{trainer.args.nspo2_strategy}`): it "
        "estimates their noise while training runs and removes its strongest directions."
        if trainer.nspo2 is not None
        else "Trained by an NSPO2 trainer with `nspo2_enabled: false`, that is without NSPO2.",
        "",
    ]
    history = trainer.state.log_history
    evals = [entry for entry in history if "eval_loss" in entry]
    figures = [(key, f"{value:.4g}", "last evaluation") for key, value in (evals[-1] if evals else {}).items()]
    figures = [row for row in figures if row[0].startswith("eval_rewards/") or row[0] == "eval_loss"]
    figures += [(f"nspo2/{key}", f"{value:.4g}", FIGURES[key]) for key, value in means(history).items()]
    if trainer.nspo2 is not None:
        figures.append(("nspo2/skipped_steps", str(trainer.nspo2.skipped_steps), "with bad numbers"))
    lines += [
        f"Measured in this run of {trainer.state.global_step} steps; NSPO2's figures are means of what was logged:"
    ]
    lines += ["", "| figure | value | |", "|---|---|---|"]
    lines += [f"| `{key}` | {value} | {words} |" for key, value, words in figures]
    settings = yaml.safe_dump(recipe(trainer), sort_keys=False)
    lines += ["", "Settings that differ from the defaults:", "", "```yaml", settings.strip(), "```", ""]
    versions = {package: version(package) for package in ("nspo2_trl", "peft", "accelerate")}
    lines += ["Versions besides those below: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", ""]
    lines += ["Cite NSPO2 as:", "", "```bibtex", CITATION, "```", ""]
    before, mark, after = card.partition("### Framework versions")
    Path(path).write_text(before + "\n".join(lines) + "\n" + mark + after)
