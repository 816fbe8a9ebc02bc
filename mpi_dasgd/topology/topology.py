"""Who may talk to whom: graphs over the ranks, their mixing weights and their spectra.

Regular graphs are kept as a rule (each rank computes its own neighbours in O(degree)), so that a
ring of 65,536 ranks or a complete graph of 4096 costs a rank nothing; whole matrices are built only
when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import breadth_first_order, connected_components, shortest_path
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from mpi_dasgd.errors import UserError, nearest
from mpi_dasgd.topology.graphs import Cayley, cayley_graph, random_regular, read_edges

__all__ = ["NAMES", "Topology", "build"]

NAMES = (
    "ring",
    "complete",
    "exponential",
    "hypercube",
    "torus",
    "random_regular",
    "bipartite_exponential",
    "edges",
)

DENSE_RANKS = 1500  # up to here a dense eigensolver takes about a second
LISTED_RANKS = 64  # complete graphs of more have no lists of neighbours
LANCZOS_RESTARTS = 200  # a random 3-regular graph of 65,536 ranks needs about 30

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class AllButOne(Sequence[int]):
    """All ranks but one, ascending: they take no memory, as lists of all ranks of a large graph would."""

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
    """An undirected graph over the ranks 0..size-1 and what is derived from it.

    Attributes:
        name: one of `NAMES`.
        size: number of ranks, absent ones included: ranks keep their numbers.
        removed: ranks that were dropped; they have no neighbours.
    """

    name: str
    size: int
    _graph: Any  # a Cayley, or a csr_array with sorted indices and the weights, if any, as data
    _weighted: bool = False
    removed: frozenset[int] = frozenset()
    _tuples: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def neighbours(self, rank: int) -> Sequence[int]:
        """Return the ranks that `rank` may talk to, ascending."""
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
        """Return how many edges the farthest rank is away from `rank`, in a graph without absent ranks."""
        hops = shortest_path(self._adjacency(), unweighted=True, indices=rank)
        return int(hops.max())

    @property
    def edges(self) -> Ints:
        """The (m, 2) edges i < j, sorted; built anew at each call."""
        pairs = np.stack(self._adjacency().nonzero(), axis=1).astype(np.int64)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        return pairs[np.lexsort(pairs.T[::-1])]

    def mixing_matrix(self) -> Any:
        """Return the mixing matrix W as a (size, size) float64 csr_array.

        Symmetric and doubly stochastic: the weights of the edge file where it gives them, else
        Metropolis-Hastings, W_ij = 1 / (1 + max(degree_i, degree_j)) (Xiao, Boyd and Lashkari,
        2004). Absent ranks have a 1 on the diagonal.
        """
        graph = self._adjacency().tocoo()
        rows, columns = graph.coords
        larger = np.maximum(self._degrees[rows], self._degrees[columns])
        weights = graph.data if self._weighted else 1.0 / (1.0 + larger)
        others = sp.csr_array((weights, (rows, columns)), shape=graph.shape)
        # Weights that sum to 1 may leave a diagonal of -1e-17.
        own = np.maximum(1.0 - others.sum(axis=1), 0.0)
        return (others + sp.diags_array(own)).tocsr()

    def spectral_gap(self) -> float:
        """Return 1 - max(|lambda_2|, |lambda_n|) of W over the ranks that are not absent.

        0 if they are not connected, 1 if there is only one.
        """
        if self.size - len(self.removed) == 1:
            return 1.0
        if self._by_rule:
            walk = (1.0 + self._graph.eigenvalues()) / (1.0 + len(self._graph.generators))
            return float(1.0 - np.abs(walk).max())
        return _gap(self._without_removed(self.mixing_matrix())) if self.is_connected else 0.0

    def algebraic_connectivity(self) -> float:
        """Return the second smallest eigenvalue of the unweighted Laplacian D - A.

        Over the ranks that are not absent; 0 if they are not connected or there is only one.
        """
        if self.size - len(self.removed) == 1:
            return 0.0
        if self._by_rule:
            return float(len(self._graph.generators) - self._graph.eigenvalues().max())
        if not self.is_connected:
            return 0.0
        graph = self._without_removed(self._adjacency())
        graph.data[:] = 1.0
        degrees = graph.sum(axis=1)
        # I - L / (2 max degree) is a lazy walk with eigenvalues in [0, 1]: its gap is lambda_2's.
        scale = 2.0 * degrees.max()
        return float(scale * _gap((sp.diags_array(1.0 - degrees / scale) + graph / scale).tocsr()))

    @cached_property
    def is_connected(self) -> bool:
        """Whether every rank that is not absent can reach every other."""
        if self._by_rule:
            return True
        parts = connected_components(self._without_removed(self._adjacency()), return_labels=False)
        return bool(parts == 1)

    @property
    def is_bipartite(self) -> bool:
        """Whether the ranks split into two sets with all edges between them."""
        return self.bipartition is not None

    @cached_property
    def bipartition(self) -> NDArray[np.int8] | None:
        """Which of two sets each rank is in, 0 or 1, so that all edges are between them; rank 0 is in 0.

        None if there are no two such sets.
        """
        colour = np.full(self.size, -1, dtype=np.int8)
        for start in range(self.size):
            if colour[start] >= 0:
                continue
            colour[start] = 0
            frontier = [start]
            while frontier:
                rank = frontier.pop()
                near = self._neighbour_array(rank)
                seen = colour[near]
                if (seen == colour[rank]).any():
                    return None
                fresh = near[seen < 0]
                colour[fresh] = 1 - colour[rank]
                frontier.extend(fresh.tolist())
        return colour

    @cached_property
    def is_complete(self) -> bool:
        """Whether every rank may talk to every other."""
        return bool((self._degrees == self.size - 1).all())

    def tree_branches(self, rank: int) -> dict[int, int]:
        """Return the neighbours of `rank` in the breadth-first spanning tree from rank 0.

        With each of them: how many ranks lie behind it, itself included. All ranks build the same tree.
        """
        parents, below = self._tree
        branches = {int(k): int(below[k]) for k in np.flatnonzero(parents == rank)}
        if parents[rank] >= 0:
            branches[int(parents[rank])] = self.size - int(below[rank])
        return branches

    @cached_property
    def _tree(self) -> tuple[Ints, Ints]:
        """Parent of each rank in the spanning tree, negative for rank 0, and the size of its subtree."""
        order, parents = breadth_first_order(self._adjacency(), 0)
        below = np.ones(self.size, dtype=np.int64)
        for rank in order[:0:-1]:
            below[parents[rank]] += below[rank]
        return parents.astype(np.int64), below

    def without(self, ranks: Iterable[int]) -> Topology:
        """Return the graph without `ranks`: neighbours and weights renewed, connected or not.

        The numbering and `size` stay; weight that went to a dropped rank returns to the sender.
        """
        return replace(self, removed=self.removed | frozenset(ranks), _tuples={})

    @property
    def _by_rule(self) -> bool:
        return isinstance(self._graph, Cayley) and not self.removed

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
        near = self._all_neighbours(rank)
        return near[self._alive[near]] if self.removed else near

    def _adjacency(self) -> Any:
        graph = self._graph.adjacency() if isinstance(self._graph, Cayley) else self._graph
        if self.removed:
            keep = sp.diags_array(self._alive.astype(float))
            graph = (keep @ graph @ keep).tocsr()
            graph.eliminate_zeros()
        return graph

    def _without_removed(self, matrix: Any) -> Any:
        return matrix[self._alive][:, self._alive]


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
        file: edge file, for `edges`: one "i j" or "i j weight" a line, # starts a comment.
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
    if file is not None and name != "edges":
        raise UserError(f"topology {name} takes no edge file (got {file}); the topology edges does")
    if name == "edges":
        if file is None:
            raise UserError("topology edges needs an edge file: give its path as file")
        graph, weighted = read_edges(Path(file), size)
        return Topology(name, size, graph, weighted)
    if size == 1:
        return Topology(name, size, Cayley.undirected((1,), []))
    if name == "random_regular":
        return Topology(name, size, random_regular(size, degree, seed))
    return Topology(name, size, cayley_graph(name, size))


def _gap(matrix: Any) -> float:
    """Return 1 - max(|lambda_2|, |lambda_n|) of a connected doubly stochastic matrix."""
    size = matrix.shape[0]
    if size <= DENSE_RANKS:
        values = np.linalg.eigvalsh(matrix.toarray())
        return float(1.0 - max(-values[0], values[-2]))
    rest = LinearOperator((size, size), matvec=lambda x: matrix @ x - x.mean(), dtype=float)
    start = np.random.default_rng(0).standard_normal(size)
    kind = {"return_eigenvectors": False, "v0": start}
    try:
        values = eigsh(rest, k=1, which="LM", ncv=50, maxiter=LANCZOS_RESTARTS, tol=1e-8, **kind)
        return float(1.0 - abs(values[0]))
    except ArpackNoConvergence:
        # Lanczos fails on graphs that mix slowly; most have small separators, so that a sparse
        # factorization at each end of the spectrum is cheap.
        top = eigsh(matrix.tocsc(), k=2, sigma=1.0 + 1e-6, **kind).min()
        bottom = eigsh(matrix.tocsc(), k=1, sigma=-1.0 - 1e-6, tol=1e-4, **kind).min()
        return float(1.0 - max(top, -bottom))
