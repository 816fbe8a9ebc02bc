"""Configuration of a run: schema, loader, and which settings are consistent."""

from __future__ import annotations

from mpi_dasgd.config.loader import describe, load
from mpi_dasgd.config.schema import Config

__all__ = ["Config", "describe", "load"]
