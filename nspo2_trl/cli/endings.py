"""How a command ends: in one sentence where it cannot go on, and never as a success where nothing was learned."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..training.checkpoints import first_line
from ..training.mixin import DIVERGED


def leave(message: str, main_process: bool) -> NoReturn:
    """End as an interrupted command does; what is to be said stands below the progress bar, and once."""
    if main_process:
        print(f"\n{message}", file=sys.stderr)
    sys.exit(130)


@contextmanager
def in_a_sentence(work: str = "training") -> Iterator[None]:
    """What ends a command before its `work` ends it in one sentence."""
    try:
        yield
    except ImportError as error:
        words = first_line(error).strip(" .")
        sys.exit(f"error: a package is missing: {words}. Install it, or leave out the option that asks for it.")
    except (ValueError, OSError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        leave(f"Interrupted before {work}: nothing was written.", True)


def refuse_diverged(trainer: Any) -> None:
    """End the command with an error where the run's losses or gradients were not finite at its end."""
    if (since := trainer.nspo2_diverged_at) is not None:
        words = f"error: the loss or a gradient was not finite from step {since} on: {DIVERGED}."
        sys.exit(words if trainer.accelerator.is_main_process else 1)


def refuse_no_step(trainer: Any) -> None:
    """End the command where a run took no step, before anything is saved."""
    if trainer.state.global_step == 0:
        words = (
            "\nerror: no step was taken, since the training data gives no batch. Of a stream, rows whose prompts "
            "alone have `max_length` tokens are left out, and with `dataloader_drop_last` a batch that is not full."
        )
        sys.exit(words if trainer.accelerator.is_main_process else 1)
