"""Reads what runs left behind, on any machine: no MPI, torch or CUDA is needed."""

from __future__ import annotations

from mpi_dasgd.analysis.load import Run, load_run

__all__ = ["Run", "load_run"]
