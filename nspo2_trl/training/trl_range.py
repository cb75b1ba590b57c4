"""Which TRL this package works with. What it overrides there may be another thing in the next minor version."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def refuse_trl() -> None:
    """Raises `ImportError` where the TRL that is installed is outside of the range in setup.cfg."""
    try:
        needs = [need for need in map(Requirement, requires("nspo2_trl") or []) if need.name == "trl"]
        found = version("trl")
    except PackageNotFoundError:  # run from a folder, or there is no TRL, which its import will say
        return
    wrong = [need for need in needs if not need.specifier.contains(found, prereleases=True)]
    if wrong:
        raise ImportError(f'nspo2_trl needs {wrong[0]}, and trl {found} is installed: `pip install "{wrong[0]}"`.')


def leave_without_trl() -> None:
    """The same for a command, which it ends in one sentence."""
    try:
        refuse_trl()
    except ImportError as error:
        sys.exit(f"error: {error}")
