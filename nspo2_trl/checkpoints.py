"""Checkpoints are whole or not there: a half-saved one is removed, and never resumed from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class CheckpointError(OSError):
    """A checkpoint could not be written; the message says where, why, and what to resume from."""


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether all of a checkpoint was written: Trainer writes `trainer_state.json` last."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint with the most steps in `output_dir`, or None."""
    found = {
        int(folder.name.rsplit("-")[-1]): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rsplit("-")[-1].isdecimal() and is_whole(folder)
    }
    return str(found[max(found)]) if found else None


@contextmanager
def half_saved(checkpoint: str, remove: bool) -> Iterator[None]:
    """Remove the folder `checkpoint` if saving it ends early, by Ctrl-C or by an error.

    Parameters:
        checkpoint: the folder that is being written.
        remove: whether this process is the one that writes it.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        yield
    except BaseException as error:
        if remove and not is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) or is_whole(checkpoint):
            raise
        folder = os.path.dirname(checkpoint)
        free = shutil.disk_usage(folder).free / 2**20
        last = last_checkpoint(folder)
        again = f"resume from {last} (`resume_from_checkpoint`)" if last else "start again: there is no checkpoint yet"
        raise CheckpointError(
            f"The checkpoint {checkpoint!r} could not be written ({str(error).splitlines()[0]}) and was removed; "
            f"{free:.0f} MiB are free there. Make room, or choose another `output_dir`, then {again}."
        ) from error
