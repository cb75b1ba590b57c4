"""Checkpoints are whole or not there: a half-saved one is removed, and resuming passes over it."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

# the first two are Trainer's; to import it takes seconds, which `nspo2 report` does not need (tests/test_canary.py)
TRAINER_STATE_NAME = "trainer_state.json"
PREFIX_CHECKPOINT_DIR = "checkpoint"
NSPO2_STATE_NAME = "nspo2_state.pt"


class CheckpointError(OSError):
    """A checkpoint could not be written, or is of another optimizer; the message says what to resume from or with."""


def unreadable_file(checkpoint: str | os.PathLike) -> str | None:
    """The file that a checkpoint lacks or that ends too early, as after a loss of power; None if none was found.

    Looked at are the files that Trainer writes for LoRA in one folder; not NSPO2's own state, which a run goes on
    without, nor the subfolders of DeepSpeed and FSDP2.
    """
    folder = Path(checkpoint)
    for name in (TRAINER_STATE_NAME, "adapter_config.json"):
        try:
            json.loads((folder / name).read_text())
        except (OSError, ValueError):
            if name == TRAINER_STATE_NAME or (folder / name).exists():
                return name
    pair = [folder / "optimizer.pt", folder / "scheduler.pt"]  # Trainer reads both or, without a word, none
    lacking = [path.name for path in pair if not path.exists()]
    if len(lacking) == 1 and not any(path.is_dir() for path in folder.iterdir()):  # DeepSpeed and FSDP2 have folders
        return lacking[0]
    archives = [*sorted(folder.glob("rng_state*.pth")), *pair]
    for path in archives:
        if path.is_file() and not zipfile.is_zipfile(path):  # an archive's directory is at its end
            return path.name
    weights = folder / "adapter_model.safetensors"
    try:
        if weights.is_file():
            safe_open(weights, "pt")  # compares the size with the header's
    except (OSError, SafetensorError):
        return weights.name
    return None


def checkpoints(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints in `output_dir`, whole or not, in their order."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    numbers = [(folder.name.removeprefix(prefix), folder) for folder in Path(output_dir).glob(f"{prefix}*")]
    return sorted((int(step), folder) for step, folder in numbers if step.isdecimal())


def last_whole(output_dir: str | os.PathLike) -> tuple[str | None, str]:
    """The whole checkpoint with the most steps, or None; and in words those with more steps that are not whole."""
    half: list[str] = []
    for _, folder in reversed(checkpoints(output_dir)):
        if (name := unreadable_file(folder)) is None:
            return str(folder), ", ".join(half)
        half.append(f"{folder.name} (no readable {name})")
    return None, ", ".join(half)


def refuse_half(checkpoint: str | os.PathLike) -> None:
    """Raises `ValueError` where not all of the folder `checkpoint` was written."""
    if (name := unreadable_file(checkpoint)) is not None:
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} was saved only in part, it has no readable {name}: "
            "name another one, or set `true` for the last whole one."
        )


def refuse_trained(output_dir: str | os.PathLike) -> None:
    """Raises `ValueError` where the folder holds an adapter or a model, which would be overwritten."""
    for kind, names in {"an adapter": "adapter_config.json adapter_model.*", "a model": "model*.safetensors"}.items():
        if any(found for name in names.split() for found in Path(output_dir).glob(name)):
            raise ValueError(f"`--output_dir` {str(output_dir)!r} holds {kind} already: choose another folder.")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def half_saved(checkpoint: str, writer: bool) -> Iterator[None]:
    """Remove the folder `checkpoint` if writing it ends early, by Ctrl-C or by an error, which is a `CheckpointError`.

    `writer` says whether this process answers for it; the others' errors stay what they are.
    """
    if writer:  # of an earlier run, whose files are overwritten from now on
        (Path(checkpoint) / TRAINER_STATE_NAME).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        if not writer or unreadable_file(checkpoint) != TRAINER_STATE_NAME:
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        torn = isinstance(error, RuntimeError) and "inline_container" in str(error)  # torch.save's writer of archives
        if not torn and not isinstance(error, (OSError, SafetensorError)):
            raise
        folder = os.path.dirname(checkpoint)
        free = shutil.disk_usage(folder).free / 2**20
        last, _ = last_whole(folder)
        again = f"resume from {last} (`resume_from_checkpoint`)" if last else "start again: there is no checkpoint yet"
        raise CheckpointError(
            f"The checkpoint {checkpoint!r} could not be written ({first_line(error)}) and was removed; "
            f"{free:.0f} MiB are free there. Make room, or choose another `output_dir`, then {again}."
        ) from error
