"""Graphs, mixing weights and spectra against networkx, closed forms and dense linear algebra."""

from __future__ import annotations

import math
import random
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from mpi_dasgd import topology
from mpi_dasgd.errors import UserError
from mpi_dasgd.topology import spectrum
from mpi_dasgd.topology.spectrum import spectral_gap
from mpi_dasgd.topology.topology import NAMES, AllButOne, Topology, build

RULES = [name for name in NAMES if name not in ("edge_list", "random_regular")]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24, 30, 32]


def possible(name: str, size: int) -> bool:
    if size == 1:
        return True
    if name == "hypercube":
        return size & (size - 1) == 0
    if name == "torus":
        return any(size % a == 0 for a in range(2, size))
    return name != "bipartite_exponential" or size % 2 == 0


def all_graphs() -> list[Topology]:
    graphs = [build(n, s) for n in RULES for s in SIZES if possible(n, s)]
    regular = [(2, 9), (3, 8), (4, 9), (5, 16), (13, 16), (15, 16), (20, 64), (60, 64), (1, 2)]
    return graphs + [build("random_regular", s, degree=d, seed=3) for d, s in regular]


def as_networkx(graph: Topology) -> nx.Graph:
    result = nx.Graph()
    result.add_nodes_from(set(range(graph.size)) - graph.removed)
    result.add_edges_from(graph.edges.tolist())
    return result


def gap_by_definition(graph: Topology) -> float:
    alive = sorted(set(range(graph.size)) - graph.removed)
    values = np.linalg.eigvalsh(graph.mixing_matrix().toarray()[np.ix_(alive, alive)])
    return float(1.0 - max(abs(values[0]), abs(values[-2])))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "graph.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("graph", all_graphs(), ids=lambda g: f"{g.name}-{g.size}")
def test_graphs_weights_and_gaps_agree_with_networkx(graph: Topology) -> None:
    size = graph.size
    reference = as_networkx(graph)
    for rank in range(size):
        near = graph.neighbours(rank)
        assert list(near) == sorted(reference.neighbors(rank))
        assert rank not in near
        assert graph.degree(rank) == len(near)
        assert all(rank in graph.neighbours(other) for other in near)
    assert nx.is_connected(reference) and graph.is_connected
    assert graph.is_bipartite == nx.is_bipartite(reference)

    mixing = graph.mixing_matrix().toarray()
    assert (mixing == mixing.T).all()
    assert (mixing >= 0.0).all()
    np.testing.assert_allclose(mixing.sum(axis=0), 1.0, atol=1e-14)
    for rank in range(size):
        others = list(graph.neighbours(rank))
        np.testing.assert_array_equal(mixing[rank, others], graph.weights(rank))
        expected = [1 / (1 + max(graph.degree(rank), graph.degree(other))) for other in others]
        np.testing.assert_allclose(mixing[rank, others], expected)
        assert np.count_nonzero(mixing[rank]) <= len(others) + 1
    if size > 1:
        assert spectral_gap(graph) == pytest.approx(gap_by_definition(graph), abs=1e-12)


@pytest.mark.parametrize("size", [3, 4, 8, 12, 64])
def test_edges_are_those_of_networkx(size: int) -> None:
    def pairs(graph: nx.Graph) -> set[frozenset[int]]:
        return {frozenset(edge) for edge in graph.edges}

    def mine(name: str) -> set[frozenset[int]]:
        return {frozenset(edge) for edge in build(name, size).edges.tolist()}

    assert mine("ring") == pairs(nx.cycle_graph(size))
    assert mine("complete") == pairs(nx.complete_graph(size))
    hops = [1 << m for m in range(10) if 1 << m < size]
    assert mine("exponential") == pairs(nx.circulant_graph(size, hops))
    if size in (4, 8, 64):
        cube = nx.hypercube_graph(size.bit_length() - 1)
        number = {node: int("".join(map(str, node)), 2) for node in cube}
        assert mine("hypercube") == pairs(nx.relabel_nodes(cube, number))
    if size in (4, 12, 64):
        rows = {4: 2, 12: 3, 64: 8}[size]
        columns = size // rows
        grid = nx.grid_2d_graph(rows, columns, periodic=True)
        number = {(r, c): r * columns + c for r, c in grid}
        grid = nx.relabel_nodes(grid, number)
        assert mine("torus") == pairs(grid)


def test_bipartite_exponential_has_the_hops_of_sgp() -> None:
    graph = build("bipartite_exponential", 16)
    assert graph.neighbours(0) == (1, 3, 5, 7, 9, 11, 13, 15)
    assert build("bipartite_exponential", 32).neighbours(0) == (
        *(1, 3, 5, 9, 15, 17),
        *(23, 27, 29, 31),
    )
    assert all((i + j) % 2 == 1 for i, j in graph.edges.tolist())
    assert graph.is_bipartite


@pytest.mark.parametrize("size", [3, 5, 16, 101, 1000, 65_536])
def test_gap_of_the_ring(size: int) -> None:
    graph = build("ring", size)
    slowest = 2.0 * math.sin(math.pi / size) ** 2  # 1 - cos(2 pi / n), without cancellation
    fastest = (1 + 2 * math.cos(2 * math.pi * (size // 2) / size)) / 3
    assert spectral_gap(graph) == pytest.approx(
        min(2 * slowest / 3, 1 - abs(fastest)), rel=1e-6, abs=1e-14
    )


def test_gaps_with_closed_forms() -> None:
    for size in (2, 3, 10, 100):
        complete = build("complete", size)
        np.testing.assert_allclose(complete.mixing_matrix().toarray(), 1.0 / size, atol=1e-15)
        assert spectral_gap(complete) == pytest.approx(1.0)
    for digits in (2, 3, 6, 10):
        cube = build("hypercube", 2**digits)
        assert spectral_gap(cube) == pytest.approx(2 / (digits + 1))
    assert spectral_gap(build("ring", 1)) == 1.0


def test_size_1_and_2() -> None:
    for name in RULES:
        assert build(name, 1).neighbours(0) == ()
        assert build(name, 1).edges.shape == (0, 2)
        if name != "torus":
            assert build(name, 2).neighbours(1) == (0,)
    assert build("random_regular", 1, degree=4).neighbours(0) == ()


def test_large_graphs_take_no_memory_of_a_rank() -> None:
    ring = build("ring", 65_536)
    assert ring.neighbours(0) == (1, 65_535)
    assert ring.weights(7) == pytest.approx((1 / 3, 1 / 3))
    complete = build("complete", 4096)
    assert len(complete.neighbours(17)) == 4095
    assert not complete._tuples
    assert not complete.is_bipartite
    assert spectral_gap(complete) == pytest.approx(1.0)
    assert len(complete.without([3]).neighbours(17)) == 4094


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_but_one_is_a_tuple_without_its_memory(size: int) -> None:
    for rank in range(size):
        others, listed = AllButOne(size, rank), tuple(i for i in range(size) if i != rank)
        assert tuple(others) == listed and len(others) == len(listed)
        for i in range(-len(listed), len(listed)):
            assert others[i] == listed[i]
            assert others[i:] == listed[i:] and others[i::-1] == listed[i::-1]
        for outside in (len(listed), -len(listed) - 1):
            with pytest.raises(IndexError):
                others[outside]
        assert [i in others for i in range(-1, size + 1)] == [
            i in listed for i in range(-1, size + 1)
        ]
    large = build("complete", 200)
    listed = tuple(i for i in range(200) if i != 17)
    assert tuple(large.neighbours(17)) == listed
    assert random.Random(1).sample(large.neighbours(17), 9) == random.Random(1).sample(listed, 9)


def test_random_regular_comes_from_its_seed() -> None:
    def edges(seed: int, degree: int) -> bytes:
        return build("random_regular", 24, degree=degree, seed=seed).edges.tobytes()

    for degree in (2, 3, 4, 15):
        assert edges(1, degree) == edges(1, degree)
        assert edges(1, degree) != edges(2, degree)


def test_random_regular_is_always_connected() -> None:
    # One 3-regular graph of 8 ranks in a few dozen falls into two of 4.
    for seed in range(150):
        graph = build("random_regular", 8, degree=3, seed=seed)
        assert nx.is_connected(as_networkx(graph))
        assert {graph.degree(rank) for rank in range(8)} == {3}


def test_edge_file(tmp_path: Path) -> None:
    file = write(tmp_path, "# a path with a chord\n0 1\n1 2  # inline\n\n2 1\n3 2\n1 3\n")
    graph = build("edge_list", 4, file=file)
    assert graph.edges.tolist() == [[0, 1], [1, 2], [1, 3], [2, 3]]
    assert graph.neighbours(1) == (0, 2, 3)
    mixing = graph.mixing_matrix().toarray()
    assert mixing[0, 1] == 1 / 4 and mixing[2, 3] == 1 / 3 and mixing[0, 0] == 3 / 4
    assert not graph.is_bipartite
    assert spectral_gap(graph) == pytest.approx(gap_by_definition(graph))


def test_edge_file_weights_are_the_mixing_weights(tmp_path: Path) -> None:
    graph = build("edge_list", 3, file=write(tmp_path, "2 1 0.7\n1 0 0.3\n"))
    expected = [[0.7, 0.3, 0.0], [0.3, 0.0, 0.7], [0.0, 0.7, 0.3]]
    np.testing.assert_allclose(graph.mixing_matrix().toarray(), expected, atol=1e-15)
    assert graph.weights(1) == (0.3, 0.7)

    rest = graph.without([2])
    np.testing.assert_allclose(
        rest.mixing_matrix().toarray(),
        [[0.7, 0.3, 0.0], [0.3, 0.7, 0.0], [0.0, 0.0, 1.0]],
        atol=1e-15,
    )
    assert rest.weights(1) == (0.3,) and rest.weights(2) == ()


def test_two_ranks_that_swap_models_never_agree(tmp_path: Path) -> None:
    graph = build("edge_list", 2, file=write(tmp_path, "0 1 1.0\n"))
    assert spectral_gap(graph) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 1\n1\n", ["line 2", "'1'", "i j"]),
        ("0 1 2 3\n", ["line 1", "i j weight"]),
        ("0 one\n", ["line 1", "'0 one'"]),
        ("# c\n0 1\n1 1\n", ["line 3", "itself"]),
        ("0 1\n1 3\n", ["line 2", "rank 3", "0..2"]),
        ("0 -1\n", ["line 1", "rank -1"]),
        ("0 1 0.5\n1 2\n", ["line 2", "every edge or to none"]),
        ("0 1 0.5\n1 2 0\n", ["line 2", "above 0"]),
        ("0 1 nan\n", ["line 1", "above 0"]),
        ("0 1 0.5\n1 0 0.25\n", ["line 2", "0.25", "0.5"]),
        ("0 1 0.6\n1 2 0.6\n", ["rank 1", "1.2", "at most 1"]),
        ("0 1\n", ["2 unconnected parts", "rank 2"]),
        ("", ["3 unconnected parts"]),
    ],
)
def test_edge_file_errors_name_file_and_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build("edge_list", 3, file=write(tmp_path, text))
    for word in ["graph.txt", *words]:
        assert word in str(caught.value)


def test_missing_edge_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt cannot be read"):
        build("edge_list", 3, file=tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("name", "size", "degree", "message"),
    [
        ("rign", 4, None, r"did you mean 'ring'"),
        ("ring", 0, None, r"at least 1"),
        ("ring", 4, 2, r"takes no degree"),
        ("hypercube", 6, None, r"use 4 or 8 ranks"),
        ("torus", 7, None, r"7 is prime"),
        ("torus", 2, None, r"2 is prime"),
        ("bipartite_exponential", 9, None, r"even number of ranks, got 9"),
        ("random_regular", 9, 3, r"odd number 27"),
        ("random_regular", 8, 8, r"1 to 7, got 8"),
        ("random_regular", 8, 0, r"1 to 7, got 0"),
        ("random_regular", 8, 1, r"2 or more"),
        ("random_regular", 8, None, r"needs a degree"),
        ("edge_list", 8, None, r"needs an edge file"),
    ],
)
def test_graphs_that_cannot_exist_are_refused(
    name: str, size: int, degree: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(name, size, degree=degree)


def test_file_without_edges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes no edge file"):
        build("ring", 2, file=tmp_path)


@pytest.mark.parametrize("name", ["ring", "exponential", "torus", "hypercube"])
def test_without(name: str) -> None:
    graph = build(name, 16)
    before = graph.neighbours(2)
    rest = graph.without([3]).without([9, 3])
    assert rest.removed == {3, 9} and rest.size == 16
    assert rest.neighbours(3) == () and rest.degree(9) == 0 and rest.weights(3) == ()
    for rank in set(range(16)) - {3, 9}:
        expected = tuple(r for r in graph.neighbours(rank) if r not in (3, 9))
        assert rest.neighbours(rank) == expected
        assert rest.degree(rank) == len(expected)
    mixing = rest.mixing_matrix().toarray()
    np.testing.assert_allclose(mixing.sum(axis=1), 1.0)
    assert (mixing == mixing.T).all() and mixing[3, 3] == mixing[9, 9] == 1.0
    for rank in range(16):
        np.testing.assert_array_equal(mixing[rank, list(rest.neighbours(rank))], rest.weights(rank))
    reference = as_networkx(rest)
    assert rest.is_connected == nx.is_connected(reference)
    assert rest.is_bipartite == nx.is_bipartite(reference)
    if rest.is_connected:
        assert spectral_gap(rest) == pytest.approx(gap_by_definition(rest), abs=1e-12)
    else:
        assert name == "ring"
        assert spectral_gap(rest) == 0.0
    assert graph.neighbours(2) == before and graph.removed == frozenset()


@pytest.mark.parametrize("restarts", [200, 1])
def test_sparse_solvers_agree_with_the_dense_one(
    restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An even ring without self-weights swaps its two sides endlessly; one lighter edge ends that,
    # but more slowly than the ring mixes otherwise: lambda_n decides.
    weights = [0.499] + [0.5] * 299
    lines = "".join(f"{i} {(i + 1) % 300} {weight}\n" for i, weight in enumerate(weights))
    graphs = [
        build("random_regular", 300, degree=4),
        build("torus", 300).without([0, 17]),
        build("ring", 400).without([5]),
        build("edge_list", 300, file=write(tmp_path, lines)),
    ]
    dense = [spectral_gap(graph) for graph in graphs]
    monkeypatch.setattr(spectrum, "DENSE_RANKS", 0)
    monkeypatch.setattr(spectrum, "LANCZOS_RESTARTS", restarts)  # 1: on to the factorization
    for graph, expected in zip(graphs, dense, strict=True):
        assert spectral_gap(graph) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_gap_of_a_long_path() -> None:
    size = 4000
    path = build("ring", size).without([0])
    lambda2 = 4 * math.sin(math.pi / (2 * (size - 1))) ** 2
    assert spectral_gap(path) == pytest.approx(lambda2 / 3, rel=1e-5)


def test_eccentricity() -> None:
    assert topology.build("complete", 7).eccentricity(0) == 1
    assert topology.build("ring", 7).eccentricity(3) == 3
    assert topology.build("hypercube", 16).eccentricity(5) == 4
