"""Graphs over the ranks, their mixing weights, spectral gaps and spanning trees."""

from __future__ import annotations

from mpi_dasgd.topology.spanning_tree import tree_branches
from mpi_dasgd.topology.spectrum import spectral_gap
from mpi_dasgd.topology.topology import NAMES, Topology, build

__all__ = ["NAMES", "Topology", "build", "spectral_gap", "tree_branches"]
