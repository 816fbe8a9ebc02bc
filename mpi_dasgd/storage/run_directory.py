"""Result directory of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from mpi_dasgd.errors import UserError

__all__ = ["prepare"]


def prepare(directory: Path, overwrite: bool, resume: bool) -> None:
    """Create the directory of a run; an older result is never overwritten silently.

    Args:
        directory: directory to create.
        overwrite: remove an older result.
        resume: keep an older result; its run files are set aside.

    Raises:
        UserError: if the directory exists, cannot be created, or has no checkpoints to resume from.
    """
    ranks = directory / "ranks"
    try:
        if resume:
            if not (directory / "checkpoints").is_dir():
                raise UserError(
                    f"run.resume: expected checkpoints in {directory}/checkpoints, found none; "
                    "start the run without run.resume=true"
                )
            if ranks.exists():
                number = sum(1 for _ in directory.glob("ranks-before-*")) + 1
                ranks.rename(directory / f"ranks-before-{number}")
        elif directory.exists():
            if not overwrite:
                raise UserError(
                    f"run directory {directory} exists; choose another run.name, or say "
                    "run.overwrite=true to replace it or run.resume=true to go on"
                )
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run directory {directory}: {error.strerror}") from error
