"""Start a job on several ranks, and judge how it ended."""

from __future__ import annotations

from mpi_dasgd.launch.job import COMMANDS, launch, run
from mpi_dasgd.launch.outcome import Outcome
from mpi_dasgd.launch.rank_status import (
    closed,
    constructing,
    enable_stack_dump,
    ready,
    setting_up,
)

__all__ = [
    "COMMANDS",
    "Outcome",
    "closed",
    "constructing",
    "enable_stack_dump",
    "launch",
    "ready",
    "run",
    "setting_up",
]
