"""Graphs over the ranks: which ranks may exchange models, and with which mixing weights.

Regular graphs are kept as a rule (each rank computes its own neighbours in O(degree)), so that a
ring of 65,536 ranks or a complete graph of 4096 costs nothing; whole matrices are built only
when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, overload

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, shortest_path

from mpi_dasgd.config.schema import TopologyConfig
from mpi_dasgd.errors import UserError, nearest
from mpi_dasgd.topology.graphs import Cayley, cayley_graph, random_regular, read_edges

__all__ = ["NAMES", "Topology", "build"]

NAMES: tuple[str, ...] = get_args(TopologyConfig.model_fields["graph"].annotation)
"""Names of all graphs: those of `topology.graph` in a configuration."""

LISTED_RANKS = 64
"""Ranks up to which complete graphs have lists of neighbours."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class AllButOne(Sequence[int]):
    """All ranks but one, ascending, without the memory of a list.

    Args:
        size: number of ranks.
        rank: the rank that is left out.
    """

    size: int
    rank: int

    def __len__(self) -> int:
        return self.size - 1

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not 0 <= index < self.size - 1:
            if not -self.size < index < 0:
                raise IndexError(index)
            index += self.size - 1
        return index + (index >= self.rank)

    def __contains__(self, rank: object) -> bool:
        return isinstance(rank, int) and 0 <= rank < self.size and rank != self.rank


@dataclass(frozen=True, eq=False)
class Topology:
    """An undirected graph over the ranks 0..size-1, with mixing weights.

    Attributes:
        name: one of `NAMES`.
        size: number of ranks, removed ones included: ranks keep their numbers.
        removed: ranks that `without` took out; they have no neighbours.
    """

    name: str
    size: int
    _graph: Any  # a Cayley, or a csr_array with sorted indices and the weights, if any, as data
    _weighted: bool = False
    removed: frozenset[int] = frozenset()
    _tuples: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def neighbours(self, rank: int) -> Sequence[int]:
        """Return the ranks that `rank` may exchange with, ascending."""
        if rank not in self._tuples:
            if self.name == "complete" and self.size > LISTED_RANKS and not self.removed:
                return AllButOne(self.size, rank)
            self._tuples[rank] = tuple(self._neighbour_array(rank).tolist())
        return self._tuples[rank]

    def degree(self, rank: int) -> int:
        """Return the number of neighbours of `rank`."""
        return int(self._degrees[rank])

    def weights(self, rank: int) -> tuple[float, ...]:
        """Return the mixing weights W_ij of `neighbours(rank)`; 1 minus their sum is its own."""
        if self._weighted:
            start, end = self._graph.indptr[rank : rank + 2]
            kept = self._alive[self._graph.indices[start:end]] & self._alive[rank]
            return tuple(self._graph.data[start:end][kept].tolist())
        larger = np.maximum(self._degrees[rank], self._degrees[self._neighbour_array(rank)])
        return tuple((1.0 / (1.0 + larger)).tolist())

    def eccentricity(self, rank: int) -> int:
        """Return the number of edges to the rank farthest from `rank`; no rank may be removed."""
        distances = shortest_path(self.adjacency(), unweighted=True, indices=rank)
        return int(distances.max())

    @property
    def edges(self) -> Ints:
        """Edges i < j, (edges, 2), int64, sorted; computed at each access."""
        pairs = np.stack(self.adjacency().nonzero(), axis=1).astype(np.int64)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        return pairs[np.lexsort(pairs.T[::-1])]

    def adjacency(self) -> Any:
        """Return the adjacency matrix, a (size, size) csr_array; its data are any given weights."""
        graph = self._graph.adjacency() if isinstance(self._graph, Cayley) else self._graph
        if self.removed:
            keep = sp.diags_array(self._alive.astype(float))
            graph = (keep @ graph @ keep).tocsr()
            graph.eliminate_zeros()
        return graph

    def mixing_matrix(self) -> Any:
        """Return the mixing matrix W as a (size, size) float64 csr_array.

        Symmetric and doubly stochastic: the weights of the edge file where it gives them, else
        Metropolis-Hastings, W_ij = 1 / (1 + max(degree_i, degree_j)) (Xiao, Boyd and Lashkari,
        2004). Removed ranks have a 1 on the diagonal.
        """
        graph = self.adjacency().tocoo()
        rows, columns = graph.coords
        larger = np.maximum(self._degrees[rows], self._degrees[columns])
        weights = graph.data if self._weighted else 1.0 / (1.0 + larger)
        others = sp.csr_array((weights, (rows, columns)), shape=graph.shape)
        # Weights that sum to 1 may leave a diagonal of -1e-17.
        own = np.maximum(1.0 - others.sum(axis=1), 0.0)
        return (others + sp.diags_array(own)).tocsr()

    @cached_property
    def is_connected(self) -> bool:
        """Whether every rank that is not removed can reach every other."""
        if self.cayley is not None:
            return True
        kept = self.remaining
        parts = connected_components(self.adjacency()[kept][:, kept], return_labels=False)
        return bool(parts == 1)

    @property
    def is_bipartite(self) -> bool:
        """Whether the ranks split into two sets with all edges between them."""
        return self.bipartition is not None

    @cached_property
    def bipartition(self) -> NDArray[np.int8] | None:
        """Side of each rank, 0 or 1, (size,), with all edges between the sides; rank 0 is on 0.

        None if the graph is not bipartite.
        """
        sides = np.full(self.size, -1, dtype=np.int8)
        for start in range(self.size):
            if sides[start] >= 0:
                continue
            sides[start] = 0
            frontier = [start]
            while frontier:
                rank = frontier.pop()
                neighbours = self._neighbour_array(rank)
                if (sides[neighbours] == sides[rank]).any():
                    return None
                unseen = neighbours[sides[neighbours] < 0]
                sides[unseen] = 1 - sides[rank]
                frontier.extend(unseen.tolist())
        return sides

    @cached_property
    def is_complete(self) -> bool:
        """Whether every rank may talk to every other."""
        return bool((self._degrees == self.size - 1).all())

    def without(self, ranks: Iterable[int]) -> Topology:
        """Return the graph without `ranks`, connected or not.

        The numbering and `size` stay; the weight of a removed neighbour goes to the rank itself.
        """
        return replace(self, removed=self.removed | frozenset(ranks), _tuples={})

    @property
    def cayley(self) -> Cayley | None:
        """The rule that makes this graph; None if there is none, or if ranks were removed."""
        return self._graph if isinstance(self._graph, Cayley) and not self.removed else None

    @property
    def remaining(self) -> Ints:
        """Ranks that were not removed, ascending."""
        return np.flatnonzero(self._alive)

    @cached_property
    def _alive(self) -> NDArray[np.bool_]:
        alive = np.ones(self.size, dtype=bool)
        alive[list(self.removed)] = False
        return alive

    @cached_property
    def _degrees(self) -> Ints:
        if isinstance(self._graph, Cayley):
            degrees = np.full(self.size, len(self._graph.generators), dtype=np.int64)
        else:
            degrees = np.diff(self._graph.indptr).astype(np.int64)
        for rank in self.removed:
            degrees[self._all_neighbours(rank)] -= 1
        degrees[list(self.removed)] = 0
        return degrees

    def _all_neighbours(self, rank: int) -> Ints:
        if isinstance(self._graph, Cayley):
            return np.sort(self._graph.neighbours(np.array([rank]))[0])
        start, end = self._graph.indptr[rank : rank + 2]
        return np.asarray(self._graph.indices[start:end], dtype=np.int64)

    def _neighbour_array(self, rank: int) -> Ints:
        if rank in self.removed:
            return np.empty(0, dtype=np.int64)
        neighbours = self._all_neighbours(rank)
        return neighbours[self._alive[neighbours]] if self.removed else neighbours


def build(
    name: str,
    size: int,
    *,
    degree: int | None = None,
    file: str | Path | None = None,
    seed: int = 0,
) -> Topology:
    """Build the graph `name` over `size` ranks; every rank that calls it gets the same one.

    Args:
        name: one of `NAMES`. `exponential` has hops 2^m both ways, `bipartite_exponential` hops 1
            and 1 + 2^m both ways (Assran et al., 2019), `torus` is 2-D and as square as can be.
        size: number of ranks; 1 gives a graph without edges.
        degree: neighbours per rank, for `random_regular`.
        file: edge file, for `edge_list`: "i j" or "i j weight" per line, # starts a comment.
        seed: seed of `random_regular`.

    Raises:
        UserError: no such graph exists, or it would not be connected.
    """
    if name not in NAMES:
        hint = nearest(name, NAMES)
        raise UserError(f"topology {name!r} is unknown; it is one of {', '.join(NAMES)}{hint}")
    if size < 1:
        raise UserError(f"topology {name}: size must be at least 1, got {size}")
    if degree is not None and name != "random_regular":
        raise UserError(f"topology {name} takes no degree (got {degree}); random_regular does")
    if file is not None and name != "edge_list":
        raise UserError(
            f"topology {name} takes no edge file (got {file}); the topology edge_list does"
        )
    if name == "edge_list":
        if file is None:
            raise UserError("topology edge_list needs an edge file: give its path as file")
        graph, weighted = read_edges(Path(file), size)
        return Topology(name, size, graph, weighted)
    if size == 1:
        return Topology(name, size, Cayley.undirected((1,), []))
    if name == "random_regular":
        return Topology(name, size, random_regular(size, degree, seed))
    return Topology(name, size, cayley_graph(name, size))
