"""Table of the algorithms: formulas, bytes as the simulator counts them, the README's copy."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest

from mpi_dasgd import cli, config
from mpi_dasgd.algorithms import ALGORITHMS, catalogue
from mpi_dasgd.algorithms.catalogue import Sizes, evaluate
from mpi_dasgd.config import schema
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator
from tests.support.mpi_ranks import ROOT

SYMBOLS = {"M": 100.0, "P": 400.0, "n": 8.0, "H": 2.0, "r": 3.0}
RANKS = 8


def test_the_table_has_every_algorithm_that_a_configuration_can_name() -> None:
    names = get_args(schema.AlgorithmConfig.model_fields["name"].annotation)
    assert {row["name"] for row in catalogue.rows()} == set(names) == set(ALGORITHMS)
    assert len({row["algorithm"] for row in catalogue.rows()}) == len(catalogue.rows())


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("0", {"": 0}),
        ("2 M / H", {"": 100}),
        ("2 M (n-1)/n / H", {"": 87.5}),
        ("(n-1) M; tree, about: 2 M", {"": 700, "tree, about": 200}),
        ("8 M + 2 (r+1) P", {"": 4000}),
        ("1.5 M / H", {"": 75}),
    ],
)
def test_a_formula_is_evaluated(formula: str, expected: dict[str, float]) -> None:
    assert evaluate(formula, SYMBOLS) == pytest.approx(expected)


@pytest.mark.parametrize(
    "formula", ["", "8 M + early ones", "Q", "2 M /", "M ** 2", "abs(M)", "M.x"]
)
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(ValueError, match="is no formula"):
        evaluate(formula, SYMBOLS)


def test_every_formula_of_every_algorithm_has_a_usual_case() -> None:
    for row in catalogue.rows(Sizes(10**6)):
        for key in ("traffic_bytes", "memory_bytes"):
            assert row[key][""] >= 0, row["algorithm"]


def test_bytes_follow_parameters_ranks_codec_and_local_steps() -> None:
    def rows(**sizes: int | str) -> dict[str, dict[str, object]]:
        return {row["algorithm"]: row for row in catalogue.rows(Sizes(10**6, **sizes))}  # type: ignore[arg-type]

    plain, coded = rows(codec="none"), rows(codec="lattice8", local_steps=4, ranks=4)
    assert plain["adpsgd"]["traffic_bytes"] == {"": pytest.approx(8e6, rel=1e-3)}
    assert coded["adpsgd"]["traffic_bytes"] == {"": pytest.approx(2e6 / 4, rel=0.02)}
    assert plain["adpsgd"]["memory_bytes"] == {"": pytest.approx(32e6, rel=1e-3)}
    assert plain["allreduce"]["traffic_bytes"] == {"": pytest.approx(8e6 * 15 / 16, rel=1e-3)}
    # an algorithm that cannot use the codec takes its own
    assert coded["dasgd"]["codec"] == "none"
    assert coded["dasgd"]["traffic_bytes"][""] == pytest.approx(3 * 4e6, rel=1e-3)  # type: ignore[index]


@pytest.mark.parametrize("row", catalogue.rows(), ids=lambda row: str(row["algorithm"]))
def test_bytes_are_those_that_the_simulator_counts(row: dict[str, str]) -> None:
    name = row["name"]
    if name in ("allreduce", "local_sgd", "alone"):
        pytest.skip("the library's sum is not counted, or there is nothing to count")
    steps = 1 if name in ("dasgd", "asgd", "minibatch") else 2
    keys = {
        "task": {"name": "quadratic", "batch_size": 1},
        "optimizer": {"options": {}, "lr": 0.01},
        "algorithm": {"name": name, "variant": row["variant"] or None, "local_steps": steps},
        "topology": {"graph": "ring" if row["variant"] == "bipartite" else "complete"},
        "codec": {"name": "none"},
        "transport": {"inbox_slots": 16},
        "simulation": {"ranks": RANKS, "dimension": 256, "dtype": "float32"},
        "budget": {"samples": 400},
    }
    run = Simulator(config.Config.model_validate(keys))
    run.run()
    moved = [
        e.total_counters().bytes_sent + e.total_counters().bytes_received for e in run.endpoints
    ]
    symbols = {"M": run.codecs[0].layout.nbytes, "n": RANKS, "H": steps, "r": RANKS - 1}
    expected = evaluate(row["traffic"], symbols)
    worker = np.sum(moved[1:]) / sum(local.local_step for local in run.locals[1:])
    # A rank that finds no partner, or no free slot, moves less.
    assert 0.75 * expected[""] < worker < 1.05 * expected[""]
    if "server" in expected:
        rounds = run.gradients / (RANKS - 1)
        assert moved[0] / rounds == pytest.approx(expected["server"], rel=0.05)


def test_the_readme_has_the_table() -> None:
    assert "\n".join(catalogue.markdown()) in (ROOT / "README.md").read_text(), (
        "put into README.md what `mpi-dasgd algorithms --markdown` prints"
    )


def test_the_command_prints_words_json_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["algorithms", "--parameters", "25000000"]) == 0
    words = capsys.readouterr().out
    assert "adpsgd  (Lian et al. 2018" in words and "2 M / H = 50.4 MB" in words
    assert cli.main(["algorithms", "--json", "--parameters", "1000", "-n", "4"]) == 0
    table = json.loads(capsys.readouterr().out)["algorithms"]
    assert {"name", "variant", "paper", "traffic_bytes", "memory_bytes", "waits"} <= set(table[0])
    assert cli.main(["algorithms", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == catalogue.markdown()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"parameters": 0}, "--parameters must be at least 1, got 0"),
        ({"parameters": 1, "ranks": 1}, "--ranks must be at least 2"),
        ({"parameters": 1, "local_steps": 0}, "--local-steps must be at least 1"),
        ({"parameters": 1, "codec": "zip"}, "--codec 'zip' is not known.*lattice8"),
    ],
)
def test_bad_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sizes(**sizes)
