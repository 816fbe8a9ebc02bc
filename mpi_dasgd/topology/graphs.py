"""Construction of graphs over the ranks: by rule, at random, or from an edge file."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from mpi_dasgd.errors import UserError

__all__ = ["Cayley", "cayley_graph", "random_regular", "read_edges"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cayley:
    """A Cayley graph: ranks are digits in the mixed base `shape`, neighbours differ by a generator.

    Attributes:
        shape: base of each digit of a rank; their product is the number of ranks.
        generators: (degree, digits), distinct, none zero, each with its negative.
    """

    shape: tuple[int, ...]
    generators: Ints

    @classmethod
    def undirected(cls, shape: tuple[int, ...], generators: Iterable[tuple[int, ...]]) -> Cayley:
        """Make the graph from generators, to each of which its negative is added."""
        one_way = np.array(list(generators), dtype=np.int64).reshape(-1, len(shape))
        both = np.unique(np.concatenate([one_way, -one_way]) % np.array(shape), axis=0)
        return cls(shape, both[both.any(axis=1)])

    def neighbours(self, ranks: Ints) -> Ints:
        """Return the neighbours of `ranks`, (len(ranks), degree), unsorted."""
        digits = np.stack(np.unravel_index(ranks, self.shape), axis=-1)
        moved = (digits[:, None, :] + self.generators) % np.array(self.shape)
        neighbours: Ints = np.ravel_multi_index(tuple(np.moveaxis(moved, -1, 0)), self.shape)
        return neighbours

    def adjacency(self) -> Any:
        """Return the (size, size) 0/1 matrix as a csr_array."""
        neighbours = self.neighbours(np.arange(math.prod(self.shape)))
        size, degree = neighbours.shape
        starts = np.arange(size + 1) * degree
        ones = np.ones(neighbours.size)
        return sp.csr_array((ones, neighbours.ravel(), starts), shape=(size, size))

    def eigenvalues(self) -> NDArray[np.float64]:
        """Return the (size - 1,) eigenvalues of the adjacency matrix other than the degree.

        The characters of the group are the eigenvectors, so a Fourier transform gives them exactly.
        """
        row = np.zeros(self.shape)
        row[tuple(self.generators.T)] = 1.0
        return np.fft.fftn(row).real.ravel()[1:]


def cayley_graph(name: str, size: int) -> Cayley:
    """Return the graph `name` over `size` >= 2 ranks; see `mpi_dasgd.topology.build`.

    Raises:
        UserError: there is no such graph of this size.
    """
    if name == "hypercube":
        if size & (size - 1):
            lower = 1 << (size.bit_length() - 1)
            raise UserError(
                f"topology hypercube needs a power of two of ranks, got {size}: use {lower} or "
                f"{2 * lower} ranks, or the topology exponential, which takes any number"
            )
        digits = size.bit_length() - 1
        return Cayley.undirected((2,) * digits, (tuple(row) for row in np.eye(digits, dtype=int)))
    if name == "torus":
        rows = max(a for a in range(1, math.isqrt(size) + 1) if size % a == 0)
        if rows == 1:
            raise UserError(
                f"topology torus needs a size a*b with a, b >= 2, and {size} is prime: use another "
                "number of ranks, or the topology ring or exponential"
            )
        return Cayley.undirected((rows, size // rows), [(0, 1), (1, 0)])
    if name == "bipartite_exponential" and size % 2:
        raise UserError(
            f"topology bipartite_exponential needs an even number of ranks, got {size}: use "
            f"{size + 1} ranks, or the topology exponential"
        )
    powers = [1 << m for m in range((size - 1).bit_length())]
    hops = {
        "ring": [1],
        "complete": list(range(1, size // 2 + 1)),
        "exponential": powers,
        # 1 + 2^0 is even and would join ranks of the same side.
        "bipartite_exponential": [1, *(1 + p for p in powers[1:] if 1 + p < size)],
    }[name]
    return Cayley.undirected((size,), ((hop,) for hop in hops))


def random_regular(size: int, degree: int | None, seed: int) -> Any:
    """Return a connected graph with `degree` neighbours per rank as a (size, size) 0/1 csr_array.

    The configuration model of networkx, drawn until connected; reproducible by its seed.

    Raises:
        UserError: there is no such graph.
    """
    import networkx as nx  # only here: it takes 0.07 s to import

    what = f"topology random_regular of {size} ranks"
    if degree is None:
        raise UserError(f"{what} needs a degree, 1 to {size - 1}")
    if not 1 <= degree < size:
        raise UserError(f"{what}: degree must be 1 to {size - 1}, got {degree}")
    if size * degree % 2:
        raise UserError(
            f"{what}: degree {degree} is impossible, as the degrees would sum to the odd number "
            f"{size * degree}: use an even degree or an even number of ranks"
        )
    if degree == 1 and size > 2:
        raise UserError(f"{what}: degree 1 only pairs ranks up; use 2 or more to connect them")
    rng = random.Random(seed)
    if degree == 2:
        # Random pairs would nearly always give several rings; a shuffled ring is connected.
        ranks = rng.sample(range(size), size)
        return _adjacency(nx.cycle_graph(ranks))
    if degree >= size / 2:
        # Drawing random pairs does not end for dense graphs; the complement is sparse, and a graph
        # of such a degree is always connected.
        missing = nx.random_regular_graph(size - 1 - degree, size, seed=rng)
        return _adjacency(nx.complement(missing))
    while True:
        graph = nx.random_regular_graph(degree, size, seed=rng)
        if nx.is_connected(graph):
            return _adjacency(graph)


def _adjacency(graph: Any) -> Any:
    """Turn a networkx graph over 0..n-1 into a csr_array with sorted indices."""
    import networkx as nx

    matrix = nx.to_scipy_sparse_array(graph, nodelist=range(len(graph)), dtype=float, format="csr")
    matrix.sort_indices()
    return matrix


def read_edges(path: Path, size: int) -> tuple[Any, bool]:
    """Read a connected graph from a file with "i j" or "i j weight" per line; # starts a comment.

    Returns:
        The (size, size) adjacency, or the weights, as a csr_array; and whether it has weights.

    Raises:
        UserError: the file cannot be read, a line is wrong, or the ranks are not all connected.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"edge file {path} cannot be read ({error}); expected a text file with one "
            "'i j [weight]' a line"
        ) from error
    edges: dict[tuple[int, int], float] = {}
    columns = 0
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"edge file {path}, line {number}"
        edge, weight = _parse_edge(words, size, where)
        columns = columns or len(words)
        if len(words) != columns:
            raise UserError(f"{where}: give a weight to every edge or to none")
        if edges.setdefault(edge, weight) != weight:
            raise UserError(
                f"{where}: edge {edge[0]} {edge[1]} has weight {weight:g} here and "
                f"{edges[edge]:g} before; give it once"
            )
    pairs = np.array(list(edges), dtype=np.int64).reshape(-1, 2)
    weights = np.array(list(edges.values()), dtype=float)
    ends = (np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([pairs[:, 1], pairs[:, 0]]))
    graph = sp.csr_array((np.concatenate([weights, weights]), ends), shape=(size, size))
    graph.sort_indices()

    parts, label = connected_components(graph)
    if parts > 1:
        outside = int(np.argmax(label != label[0]))
        raise UserError(
            f"edge file {path}: the graph of {size} ranks falls into {parts} unconnected parts; "
            f"add an edge that leads from rank 0 to rank {outside}"
        )
    sums = graph.sum(axis=1)
    heaviest = int(np.argmax(sums))
    if columns == 3 and sums[heaviest] > 1.0 + 1e-12:
        raise UserError(
            f"edge file {path}: the weights at rank {heaviest} sum to {sums[heaviest]:g} and leave "
            "less than nothing for its own model; make them sum to at most 1"
        )
    return graph, columns == 3


def _parse_edge(words: list[str], size: int, where: str) -> tuple[tuple[int, int], float]:
    try:
        i, j = map(int, words[:2])
        (weight,) = map(float, words[2:] or ["1"])
    except ValueError:
        got = " ".join(words)
        raise UserError(f"{where}: expected 'i j' or 'i j weight', got {got!r}") from None
    for rank in (i, j):
        if not 0 <= rank < size:
            raise UserError(f"{where}: rank {rank} is not in 0..{size - 1} of this run's {size}")
    if i == j:
        raise UserError(f"{where}: rank {i} is joined to itself; remove the line")
    if not 0.0 < weight <= 1.0:
        raise UserError(f"{where}: the weight must be above 0 and at most 1, got {weight:g}")
    return (min(i, j), max(i, j)), weight
