"""Graphs over the ranks, their mixing weights and their spectra."""

from __future__ import annotations

from mpi_dasgd.topology.topology import NAMES, Topology, build

__all__ = ["NAMES", "Topology", "build"]
