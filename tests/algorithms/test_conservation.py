"""The sum of all models and deltas in flight changes only by the ranks' own steps."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import codecs, topology
from mpi_dasgd.algorithms.adpsgd import ADPSGD
from mpi_dasgd.codecs import ExchangeBuffers, ExchangeOutcome, NoCodec
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import ROOT, rank_counts, run_ranks

pytestmark = pytest.mark.mpi

PROGRAM = ROOT / "tests" / "programs" / "conservation.py"


def assert_exchanged(report: Any, exchanges: int) -> None:
    assert report["enough"] and report["exchanges"] >= exchanges
    assert report["absorbed"] == report["exchanges"], "a delta was lost, or used twice"
    assert report["waits"] == 0, "an asynchronous algorithm has waited"
    assert report["size"] > 0.3, "the models agree: a lost delta would not be seen"


@pytest.mark.parametrize("path", ["auto", "rma"])
def test_sum_of_models_is_conserved(mpi: str, path: str) -> None:
    """Exactly where no addition rounds, else up to rounding; and a lost delta is seen.

    Each exchange rounds two additions: its error is below 2 * eps / 2 * max|x|.
    """
    (n,) = rank_counts(3)
    exchanges = 10_000 if (mpi, path) == ("mpich", "auto") else 3000
    args = ["--path", path, "--exchanges", str(exchanges)]
    done = run_ranks(n, PROGRAM, *args, "exact", "float", mpi=mpi, timeout=270)
    reports = json.loads(done.stdout)
    for report in reports.values():
        assert_exchanged(report, exchanges)
        assert report["path"] == {"auto": "in place", "rma": "Get and Put"}[path]
    is_native = path == "auto" and native.load() is not None
    assert (reports["exact"]["native"], reports["float"]["native"]) == (False, is_native)
    assert reports["exact"]["error"] == 0.0
    assert 0.0 < reports["float"]["error"] < reports["float"]["tolerance"] < 0.1


@pytest.mark.parametrize("path", ["auto", "rma"])
def test_sum_of_models_is_conserved_by_every_codec(path: str) -> None:
    """With any codes, also undecodable buckets; bytes counted are those of the codec."""
    (n,) = rank_counts(3)
    names = [name for name in codecs.CODECS if name != "none"]
    args = ["--path", path, "--exchanges", "800", "--limit", "35", *names]
    reports = json.loads(run_ranks(n, PROGRAM, *args, timeout=270).stdout)
    for name, report in reports.items():
        assert_exchanged(report, 800)
        assert report["error"] < report["tolerance"] < 0.1, name
        assert report["corrupt"] == 0
        assert report["nbytes"] == report["exchanges"] * report["message"]
    assert sum(report["rejected"] for report in reports.values()) > 0, "rejection was not tested"


def test_a_lost_delta_is_seen() -> None:
    """That the test above can fail."""
    done = run_ranks(2, PROGRAM, "--exchanges", "1000", "drops", timeout=150)
    report = json.loads(done.stdout)["drops"]
    assert_exchanged(report, 1000)
    assert report["error"] > 0.1 > report["tolerance"]


def test_sum_is_conserved_between_hosts(mpi: str, two_hosts: Hosts) -> None:
    count = {"mpich": 1000, "openmpi": 100}[mpi]
    args = ["--exchanges", str(count), "exact"]
    done = run_ranks(2, PROGRAM, *args, mpi=mpi, hosts=two_hosts, timeout=150)
    report = json.loads(done.stdout)["exact"]
    assert_exchanged(report, count)
    assert report["error"] == 0.0


class Meanwhile(NoCodec):
    """Lets time pass while a step computes."""

    clock: Clock

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> ExchangeOutcome:
        outcome = super().average_pair(x, buffers)
        while self.clock.advance():
            pass
        return outcome


class Local:
    """Training without gradients."""

    local_step = 0
    gradient = np.zeros(0)

    def fused_update(self, lr_scale: float = 1.0) -> None:
        """Return None: steps are made by `apply`."""

    def apply(self, lr_scale: float = 1.0) -> None:
        pass


def test_an_answer_in_the_middle_of_a_step_waits_for_the_next() -> None:
    """The progress thread may settle a request at any moment; a step sees it settled, or not."""
    clock = Clock()
    codec = Meanwhile(4, np.dtype(np.float32))
    codec.clock = clock
    memory = SharedMemory(codec.layout, 2)
    network = Network(clock, memory, topology.build("complete", 2), latency=1.0)
    models = [np.full(4, value, np.float32) for value in (0.0, 1024.0)]
    records: list[Any] = []
    algorithms = [
        ADPSGD(
            VirtualEndpoint(network, rank),
            codec,
            x,
            AlgorithmConfig(),
            random.Random(0),
            records.append,
        )
        for rank, x in enumerate(models)
    ]
    for algorithm in algorithms:
        algorithm.start()
    local = Local()
    for step in range(1, 4):
        local.local_step = step
        for _ in algorithms[0].step(local):
            raise AssertionError("an asynchronous algorithm has waited")
    for _ in algorithms[0].finalize():
        assert clock.advance()
    while clock.advance():
        pass
    algorithms[1].absorb(0)
    assert any(record.partner == 1 for record in records), "no exchange"
    assert (models[0] + models[1] == 1024.0).all()
    assert (models[0] != 0.0).all()
