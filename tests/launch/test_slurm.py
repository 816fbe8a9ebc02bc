"""The job script on a real Slurm cluster of two nodes that share files but no memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.support.fake_hosts import Hosts
from tests.support.fake_slurm import Cluster, slurm_cluster
from tests.support.mpi_ranks import ROOT, missing, mpi_library

SCRIPT = str(ROOT / "jobs" / "train.sbatch")
CONFIG = str(ROOT / "jobs" / "train.toml")
RANKS = ("--ntasks-per-node=2", "--cpus-per-task=1")
TRAIN = (SCRIPT, CONFIG, "run.directory=runs", "run.name=run")
TWO_NODES = ("--nodes=2", *RANKS, *TRAIN)
ONE_NODE = ("--nodes=1", *RANKS, *TRAIN)


@pytest.fixture(scope="module")
def cluster(two_hosts: Hosts) -> Iterator[Cluster]:
    """Two nodes with two cores each."""
    with slurm_cluster(two_hosts, cpus=2) as cluster:
        yield cluster


@pytest.fixture
def user(cluster: Cluster) -> Cluster:
    """The cluster, with the environment variables that the job script asks for."""
    library = mpi_library("mpich")
    if library is None:
        missing("no library of mpich: `make test` installs it")
    return cluster.with_variables(
        MPI_DASGD_PYTHON=sys.executable,
        MPI_DASGD_SRUN_MPI="pmi2",
        MPI4PY_LIBMPI=str(library),
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )


def _results(directory: Path) -> dict[str, Any]:
    """Attributes of the run and columns of the ranks in the results file."""
    with h5py.File(directory / "runs" / "run" / "results.h5") as file:
        return {
            **file.attrs,
            "of_ranks": {name: column[:].tolist() for name, column in file["ranks"].items()},
            "exchanges": file["exchange"]["records"][:].tolist(),
        }


def _kill_rank(cluster: Cluster, rank: int) -> None:
    """Kill a rank of the running job."""
    conf = cluster.environment["SLURM_CONF"]
    variables = {f"SLURM_PROCID={rank}".encode(), f"SLURM_CONF={conf}".encode()}
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variables <= set((process / "environ").read_bytes().split(b"\0")):
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
    assert killed == 1


def test_job_trains_on_two_nodes(user: Cluster, tmp_path: Path) -> None:
    job = user.wait(user.submit(tmp_path, *TWO_NODES, "budget.epochs=3"))
    assert (job.state, job.code) == ("COMPLETED", 0), job.output
    results = _results(tmp_path)
    assert results["status"] == "finished"
    assert results["world_size"] == 4
    assert results["nodes"] == 2
    assert results["transport"] == "in place within a node, Get and Put between nodes"
    assert results["of_ranks"]["local_rank"] == [0, 1, 0, 1]
    assert results["of_ranks"]["host"] == [
        name.encode() for name in user.hosts.names for _ in range(2)
    ]
    assert min(results["exchanges"]) > 0
    assert results["slurm_job_id"] == str(job.number)
    assert results["slurm_job_num_nodes"] == "2"
    assert results["slurm_ntasks"] == "4"
    assert results["slurm_submit_dir"] == str(tmp_path)


def test_bad_key_fails_the_job_with_a_message(user: Cluster, tmp_path: Path) -> None:
    job = user.wait(user.submit(tmp_path, *TWO_NODES, "budget.epoch=6"))
    assert (job.state, job.code) == ("FAILED", 2), job.output
    assert job.output.count("budget.epoch") == 1  # only rank 0 prints it
    assert "did you mean 'epochs'" in job.output
    assert not (tmp_path / "runs").exists()


def test_srun_of_another_mpi_is_detected(user: Cluster, tmp_path: Path) -> None:
    """Started without PMI, each rank would train alone."""
    alone = user.with_variables(MPI_DASGD_SRUN_MPI="none")
    job = alone.wait(alone.submit(tmp_path, *TWO_NODES, "budget.epochs=6"))
    assert (job.state, job.code) == ("FAILED", 2), job.output
    assert job.output.count("the launcher started 4 ranks, but this process sees 1") == 1
    assert "srun --mpi=pmi2" in job.output


def test_each_rank_takes_a_gpu(user: Cluster, tmp_path: Path) -> None:
    """As many as the job has for a node; files play the GPUs, and the program plays a cgroup."""
    python = tmp_path / "python"
    program = ROOT / "tests" / "programs" / "visible_gpus.py"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {program}\n")
    python.chmod(0o755)
    own = [["0", "cuda:0"], ["1", "cuda:0"]]
    expected = {
        ("--gpus-per-node=2",): ([["0", "cuda:0"], ["1", "cuda:1"]], ""),
        ("--gpus-per-task=1",): (own, ""),
        ("--gpus-per-task=1", "--export=ALL,FAKE_CGROUP=1"): (own, "a cgroup of Slurm"),
        ("--gpus-per-node=1",): ([["0", "cuda:0"]] * 2, "have their models on one GPU"),
    }
    cluster = user.with_variables(MPI_DASGD_PYTHON=str(python))
    numbers = [cluster.submit(tmp_path, *options, *ONE_NODE) for options in expected]
    for number, (gpus, message) in zip(numbers, expected.values(), strict=True):
        job = cluster.wait(number)
        ends = ("FAILED", 2) if "one GPU" in message else ("COMPLETED", 0)
        assert (job.state, job.code) == ends, job.output
        assert json.dumps(gpus) in job.output
        for text in ("a cgroup of Slurm", "have their models on one GPU"):
            assert job.output.count(text) == (text == message), job.output


def test_job_that_loses_a_rank_finishes_and_counts_as_failed(user: Cluster, tmp_path: Path) -> None:
    number = user.submit(tmp_path, *ONE_NODE, "budget.seconds=5", "transport.heartbeat_timeout=2")
    output = tmp_path / f"mpi-dasgd-{number}.out"
    deadline = time.monotonic() + 60
    while not (output.exists() and "samples/s" in output.read_text()):
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.1)
    _kill_rank(user, 1)
    job = user.wait(number)
    assert (job.state, job.code) == ("FAILED", 137), job.output
    results = _results(tmp_path)
    assert results["status"] == "degraded"
    assert results["of_ranks"]["status"] == [b"finished", b"killed"]
    assert "ranks [1] were lost; the others finished the run" in job.output
