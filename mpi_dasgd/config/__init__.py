"""The configuration of a run: its schema, its reader, and which settings go together."""

from __future__ import annotations

from mpi_dasgd.config.loader import describe, load
from mpi_dasgd.config.schema import Config

__all__ = ["Config", "describe", "load"]
