"""What is shown of each log: the few figures that people watch. All of them go to trackers and trainer_state.json."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import RichProgressCallback

WATCHED = ["loss", "rewards/accuracies", "rewards/margins", "learning_rate"]
WATCHED += ["nspo2/variance_reduction", "nspo2/noise_scale", "nspo2/active"]
WATCHED += [f"eval_{name}" for name in (*WATCHED[:3], "retain_kl", "retain_loss")]
WATCHED += ["train_loss", "train_runtime", "epoch"]
ALL = ("info", "debug", "detail")  # levels of `log_level` that ask for every figure


def brief(logs: dict[str, Any], log_level: str) -> dict[str, Any]:
    """The watched figures of `logs`, in their order; then the rest where `log_level` asks or that is nothing."""
    watched = [name for name in WATCHED if name in logs]
    rest = [name for name in logs if name not in watched] if log_level in ALL or set(watched) <= {"epoch"} else []
    return {n: f"{v:.4g}" if isinstance(v := logs[n], float) else v for n in watched + rest if n != "total_flos"}


class _Brief(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=brief(logs or {}, args.log_level), **kwargs)


class BriefLines(_Brief, PrinterCallback): ...


class BriefProgress(_Brief, ProgressCallback): ...


class BriefTable(_Brief, RichProgressCallback): ...


def show_logs(trainer: Trainer) -> RichProgressCallback | None:
    """Have the trainer show its logs in brief; returned is the table where it is drawn anew, on a terminal."""
    kind: type[TrainerCallback] = BriefLines if trainer.args.disable_tqdm else BriefProgress
    if sys.stdout.isatty() and not trainer.args.disable_tqdm and trainer.is_world_process_zero():
        kind = BriefTable
    for other in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(other)
    trainer.add_callback(shown := kind())
    return shown if isinstance(shown, BriefTable) else None


def stop(live: RichProgressCallback | None) -> None:
    """End what [`show_logs`] gave, before anything is said, and else the terminal is left without a cursor."""
    if live and live.rich_group:
        live.rich_group.stop()
