"""The breadth-first spanning tree of a graph, along which messages are relayed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import breadth_first_order

from mpi_dasgd.topology.topology import Topology

__all__ = ["tree_branches"]


def tree_branches(topology: Topology, rank: int) -> dict[int, int]:
    """Return the neighbours of `rank` in the breadth-first spanning tree from rank 0.

    All ranks build the same tree.

    Returns:
        For each neighbour the number of ranks on its side of the edge, itself included.
    """
    parents, subtree_sizes = _spanning_tree(topology)
    branches = {int(child): int(subtree_sizes[child]) for child in np.flatnonzero(parents == rank)}
    if parents[rank] >= 0:
        branches[int(parents[rank])] = topology.size - int(subtree_sizes[rank])
    return branches


@lru_cache(maxsize=1)  # the ranks of a simulation ask for the same tree one after another
def _spanning_tree(topology: Topology) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the parent of each rank, negative for rank 0, and the size of its subtree, (size,)."""
    order, parents = breadth_first_order(topology.adjacency(), 0)
    subtree_sizes = np.ones(topology.size, dtype=np.int64)
    for rank in order[:0:-1]:
        subtree_sizes[parents[rank]] += subtree_sizes[rank]
    return parents.astype(np.int64), subtree_sizes
