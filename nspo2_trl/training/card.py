"""What the model card says about NSPO2: the recipe, the figures that this run measured, the versions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..metrics import METRICS
from .options import TRAINER_OPTIONS, NSPO2Arguments, default_max_rank, nspo2_options

# those that tables show, in their order
SHOWN = ("variance_reduction", "bias", "rank", "alpha", "noise_scale", "signal_removed", "active", "overhead_ms")
CITATION = """@software{nspo2,
    title = {NSPO2: Null Space Preference Optimization v2},
    year  = 2024,
    url   = {https://github.com/PrayPrey/NSRPO2}
}"""
RETAINED = {
    "eval_retain_kl": "KL(frozen ‖ policy) on held-out retained texts, nats per token",
    "eval_retain_loss": "rise of the loss there, nats per token",
    "nspo2/retain_kl_unprojected": "that KL as training left the adapter",
    "nspo2/retain_loss_unprojected": "that rise as training left the adapter",
    "nspo2/retain_leakage": METRICS["retain_leakage"][0],
}
# where a run was and who may write there, not what it did; and what Trainer fills in by itself
_LEFT_OUT = {"output_dir", "logging_dir", "run_name", "hub_model_id", "resume_from_checkpoint", "report_to"}
_LEFT_OUT |= {"hub_token", "push_to_hub_token", "push_to_hub", "accelerator_config", "debug", "do_eval"}
_LEFT_OUT |= {"dataloader_pin_memory", "pad_to_multiple_of", "disable_tqdm"}
_SECRETS, _NO_SECRETS = ("token", "api_key", "password", "secret"), ("pad_token", "eos_token", "bos_token")
# option of a recipe: attribute of PEFT's config
_LORA = {name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
_LORA |= {"lora_r": "r", "lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save"}


def means(log_history: Sequence[dict]) -> dict[str, float]:
    """Mean of what was logged, for the names of `SHOWN` that were."""
    found = {name: [e[f"nspo2/{name}"] for e in log_history if f"nspo2/{name}" in e] for name in SHOWN}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def measured(trainer: Any) -> list[tuple[str, str, str]]:
    """Name, value and meaning of NSPO2's figures: means of what was logged; none without NSPO2."""
    rows = [
        (f"nspo2/{key}", f"{value:.4g}", METRICS[key][0]) for key, value in means(trainer.state.log_history).items()
    ]
    if trainer.nspo2 is not None:
        rows.append(("nspo2/skipped_steps", str(trainer.nspo2.skipped_steps), METRICS["skipped_steps"][0]))
    return rows


def recipe(trainer: Any) -> dict:
    """The settings of the run that differ from the defaults, under the names that recipes have for them.

    Folders and secrets are left out; what YAML cannot hold is written as text.
    """
    args = trainer.args
    chosen: dict[str, Any] = {"model_name_or_path": _base_model(trainer)}
    for f in fields(args):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.init and f.name not in _LEFT_OUT and getattr(args, f.name) != default:
            chosen[f.name] = getattr(args, f.name)
    if args.nspo2_retain_dataset:
        chosen["nspo2_retain_dataset"] = _public(args.nspo2_retain_dataset)
    if args.nspo2_enabled:  # an attached trainer has them beside its fields
        defaults, options = nspo2_options(NSPO2Arguments), nspo2_options(args)
        own = {name: options[name] for name in ("projection_rank", "covariance")}
        defaults["max_rank"] = default_max_rank(**own)
        chosen.pop("nspo2_max_rank", None)
        chosen |= {f"nspo2_{k}": options[k] for k in TRAINER_OPTIONS if options[k] != defaults[k]}
    peft_config = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).get("default")
    if peft_config is not None:
        lora = {option: getattr(peft_config, name, None) for option, name in _LORA.items()}
        lora |= {option: sorted(value) for option, value in lora.items() if isinstance(value, set)}
        chosen |= {"use_peft": True} | {option: value for option, value in lora.items() if value}
    if getattr(getattr(trainer.model, "config", None), "quantization_config", None) is not None:
        chosen["load_in_4bit" if getattr(trainer.model, "is_loaded_in_4bit", False) else "load_in_8bit"] = True
    plain = json.loads(json.dumps(chosen, default=lambda v: v.item() if hasattr(v, "item") else str(v)))
    return _without_secrets(plain)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        open_to_all = [key for key in value if not key.endswith(_SECRETS) or key in _NO_SECRETS]
        return {key: _without_secrets(value[key]) for key in open_to_all}
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _base_model(trainer: Any) -> str:
    return _public(str(getattr(getattr(trainer.model, "config", None), "_name_or_path", "")))


def _public(name: str) -> str:
    """A hub id, or of a local folder or file its own name."""
    name = name.rstrip("/")
    return os.path.basename(name) if os.path.exists(name) else name


def _what_was_done(trainer: Any) -> str:
    args = trainer.args
    if trainer.nspo2 is None and means(trainer.state.log_history):
        return "Trained with NSPO2 at first; then the run was resumed with `nspo2_enabled: false`, that is without it."
    if trainer.nspo2 is None:
        return "Trained by an NSPO2 trainer with `nspo2_enabled: false`, that is without NSPO2."
    estimate = "NSPO2 estimates the noise of the LoRA adapters' gradients while training runs"
    if not means(trainer.state.log_history).get("active") or args.nspo2_projection_rank == 0:
        return f"{estimate}; in this run it only measured, nothing was filtered."
    what = "The gradients of the LoRA adapters were" if args.nspo2_apply_to == "gradient" else "The updates were"
    return f"{estimate}. {what} filtered: the strongest noise directions removed (strategy `{args.nspo2_strategy}`)."


def _what_was_retained(trainer: Any) -> list[str]:
    """Lines on the retained texts: which, and what was done to keep the model as it was on them."""
    retained = trainer.nspo2_retained
    if retained is None:
        return []
    config = retained.config
    name = f"`{_public(config.dataset)}`" if config.dataset else "a dataset given to the trainer"
    texts = f"Retained texts: {name}, {len(retained.texts)} texts of {retained.tokens:,} tokens; "
    texts += f"{sum(len(batch['input_ids']) for batch in retained.held_out)} more held out to measure on."
    done = [f"KL term of weight {config.kl:g}"] if trainer._nspo2_retain_kl else []
    if trainer.args.nspo2_enabled and config.project != "no":
        scaled = f", the rest of `lora_A` times {config.scale:g}" if config.project == "after" else ""
        done.append(f"{config.rank} directions taken out of each input {config.project} training{scaled}")
    return [f"{texts} {'; '.join(done) or 'Only measured, nothing was done to retain them'}.", ""]


def _evaluated(history: Sequence[dict]) -> list[tuple[str, str, str]]:
    """Rows on the last evaluation of held-out pairs; they say so where the adapter was projected after it."""
    at = [i for i, entry in enumerate(history) if "eval_loss" in entry]
    if not at:
        return []
    later = any("nspo2/retain_kl_unprojected" in entry for entry in history[at[-1] :])
    words = "last evaluation" + (", before the projection" if later else "")
    shown = {key: v for key, v in history[at[-1]].items() if key.startswith("eval_rewards/") or key == "eval_loss"}
    return [(key, f"{value:.4g}", words) for key, value in shown.items()]


def _retained_figures(history: Sequence[dict]) -> list[tuple[str, str, str]]:
    """Rows on held-out retained texts: the last of each figure."""
    found = []
    for key, words in RETAINED.items():
        values = [entry[key] for entry in history if key in entry]
        found += [(key, f"{values[-1]:.4g}", words)] if values else []
    return found


def add_to_card(path: str, trainer: Any) -> None:
    """Add the section on NSPO2 to the model card that TRL wrote, and mend what it says of a local base model."""
    card = Path(path).read_text()
    card = card.replace("[None](https://huggingface.co/None)", f"`{_base_model(trainer) or 'a model'}`")
    if getattr(trainer.processing_class, "chat_template", None) is None:
        card = card.replace('[{"role": "user", "content": question}]', "question")
    card = card.replace('model="None"', f'model="{Path(str(trainer.args.output_dir)).name}"')
    history = trainer.state.log_history
    figures = _evaluated(history) + _retained_figures(history) + measured(trainer)
    steps = trainer.state.global_step
    lines = ["## NSPO2", "", _what_was_done(trainer), "", *_what_was_retained(trainer)]
    if (since := trainer.nspo2_diverged_at) is not None:
        lines += [f"The run diverged: its loss or a gradient was not finite from step {since} on.", ""]
    lines += [f"Measured in this run of {steps} steps; NSPO2's figures are means of what was logged:"]
    lines += ["", "| figure | value | |", "|---|---|---|"]
    lines += [f"| `{key}` | {value} | {words} |" for key, value, words in figures]
    settings = yaml.safe_dump(recipe(trainer), sort_keys=False)
    lines += ["", "Settings that differ from the defaults:", "", "```yaml", settings.strip(), "```", ""]
    versions = {package: version(package) for package in ("nspo2_trl", "peft", "accelerate")}
    lines += ["Versions besides those below: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", ""]
    lines += ["Cite NSPO2 as:", "", "```bibtex", CITATION, "```", ""]
    before, mark, after = card.partition("### Framework versions")
    Path(path).write_text(before + "\n".join(lines) + "\n" + mark + after)
