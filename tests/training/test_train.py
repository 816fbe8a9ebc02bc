"""Training as a user starts it: it trains, resumes, survives deaths, and refuses clearly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray
from torch.nn.functional import cross_entropy

from mpi_dasgd import codecs, load_model
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.storage.runfile import read_run_file
from mpi_dasgd.tasks import data, models
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import ROOT, Completed, missing, mpi_library, rank_counts, run_ranks
from tests.support.rank_pool import run_pooled
from tests.support.training import JOB, train

pytestmark = pytest.mark.mpi


def _command(ranks: int, directory: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "mpi_dasgd", "launch", "-n", str(ranks), "--timeout", "120",
        "train", str(JOB), f"run.directory={directory}", "run.name=run", *overrides,
    ]  # fmt: skip


def _environment(mpi: str) -> dict[str, str]:
    library = mpi_library(mpi)
    if library is None:
        missing(f"no library of {mpi}: `make test` installs it")
    return {
        **os.environ,
        "MPI4PY_LIBMPI": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def _launch(
    ranks: int, directory: Path, *overrides: str, mpi: str = "mpich", code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Train as a user does, by the command `launch`."""
    done = subprocess.run(
        _command(ranks, directory, *overrides),
        capture_output=True,
        text=True,
        timeout=180,
        env=_environment(mpi),
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _consensus(directory: Path) -> Any:
    return xarray.open_dataset(
        directory / "run" / "results.h5", engine="h5netcdf", group="consensus"
    )


@pytest.mark.parametrize(
    ("algorithm", "mpi", "overrides", "accuracy"),
    [
        ("adpsgd", "mpich", [], 0.97),  # the job as it is
        ("adpsgd", "openmpi", ["budget.epochs=12"], 0.9),
        ("allreduce", "openmpi", ["budget.epochs=5"], 0.8),
    ],
)
def test_four_ranks_learn_the_digits(
    tmp_path: Path, algorithm: str, mpi: str, overrides: list[str], accuracy: float
) -> None:
    run = train if overrides else _launch
    done = run(4, tmp_path, f"algorithm.name={algorithm}", *overrides, mpi=mpi)
    assert float(_consensus(tmp_path)["mean_test_accuracy"][-1]) >= accuracy
    assert "samples/s" in done.stdout
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file.attrs["status"] == "finished"
        assert file.attrs["world_size"] == 4
        config = json.loads(file.attrs["config_json"])
        samples = file["ranks/samples"][:].sum()
    # the budget of all ranks together is kept to a few batches
    assert samples == pytest.approx(config["budget"]["samples"], rel=0.02)
    task = data.load("digits", "cnn", 0)
    model = models.build("cnn", task.features, task.classes)
    model.load_state_dict(load_model(tmp_path / "run" / "model.h5"))
    accuracy = (model(task.test_x).argmax(1) == task.test_y).float().mean().item()
    assert accuracy == pytest.approx(
        float(_consensus(tmp_path)["mean_test_accuracy"][-1]), abs=0.003
    )


@pytest.mark.parametrize("ranks", rank_counts(2, 3))
@pytest.mark.parametrize("path", ["shared_memory", "rma"])
def test_exchanges_are_recorded_and_counted(tmp_path: Path, ranks: int, path: str) -> None:
    settings = [f"transport.mode={path}", "budget.epochs=6", "evaluation.live=false"]
    train(ranks, tmp_path, *settings, together=True)
    exchange = xarray.open_dataset(
        tmp_path / "run" / "results.h5", engine="h5netcdf", group="exchange"
    ).to_dataframe()
    rows = xarray.open_dataset(tmp_path / "run" / "results.h5", engine="h5netcdf", group="ranks")
    initiated = exchange[exchange["kind"] == 0]
    absorbed = exchange[exchange["kind"] == 1]
    assert len(initiated) > 50
    # every message that was sent was absorbed, and moved as many bytes as were counted
    assert len(initiated) == int(rows["messages"].sum()) == int(rows["absorbed"].sum())
    assert len(absorbed) == len(initiated)
    moved = int(rows["bytes_sent"].sum() + rows["bytes_received"].sum())
    given_back = (
        int(rows["bytes_received"].sum()) - len(initiated) * int(initiated["bytes"].iloc[0]) // 2
    )
    assert initiated["bytes"].sum() == moved - given_back
    assert (initiated["partner"] >= 0).all()
    assert (exchange["age_s"].dropna() >= 0).all()


@pytest.mark.parametrize("codec", ["lattice4", "bf16"])  # lattice8 is the default
def test_the_digits_are_learned_with_codecs(tmp_path: Path, codec: str) -> None:
    done = train(2, tmp_path, f"codec.name={codec}", "budget.epochs=20", "evaluation.live=false")
    assert float(_consensus(tmp_path)["mean_test_accuracy"][-1]) >= 0.94
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file.attrs["codec"] == codec
        ranks, exchange = file["ranks"], file["exchange"]
        layout = codecs.make(
            CodecConfig(name=codec), 10 * 1024, np.dtype(np.float32), seed=0, rank=0
        ).layout
        messages = ranks["messages"][:]
        np.testing.assert_array_equal(ranks["bytes_sent"][:], messages * layout.nbytes)
        initiated = exchange["kind"][:] == 0
        assert np.isfinite(exchange["distance"][:][initiated]).all()
        if codec.startswith("lattice"):
            decoded, rejected = ranks["buckets_decoded"][:], ranks["buckets_rejected"][:]
            assert (decoded + rejected).sum() == 10 * initiated.sum()
            assert exchange["rejected"][:][initiated].sum() == rejected.sum()
            assert not ranks["buckets_corrupt"][:].any()
            assert rejected.sum() == 0 or "not decoded" in done.stdout


def test_an_asynchronous_run_resumes_with_the_scales_of_its_codec(tmp_path: Path) -> None:
    settings = ["codec.name=lattice8", "checkpoint.count=3", "evaluation.count=2"]
    train(2, tmp_path, *settings, "budget.epochs=8", together=True)
    saved = sorted((tmp_path / "run" / "checkpoints").glob("*rank00000*"))[-1]
    with h5py.File(saved) as file:
        assert file["arrays/codec/estimate"].shape == (10,)
        assert file["arrays/codec/messages"][0] > 100
    before = float(_consensus(tmp_path)["mean_test_accuracy"][-1])
    train(2, tmp_path, *settings, "budget.epochs=12", "run.resume=true")
    assert float(_consensus(tmp_path)["mean_test_accuracy"][-1]) >= before - 0.02


def _models_after(directory: Path, ranks: int) -> dict[str, torch.Tensor]:
    return load_model(directory / "run" / "model.h5")


def test_allreduce_equals_one_process_with_the_large_batch(tmp_path: Path) -> None:
    ranks, steps, size = 4, 40, 8
    train(
        ranks, tmp_path, "algorithm.name=allreduce", f"task.batch_size={size}",
        f"budget.samples={ranks * steps * size}", "schedule.name=constant", "schedule.warmup=0",
    )  # fmt: skip
    torch.manual_seed(1000003)  # rank 0's, whose weights all ranks start from
    task = data.load("digits", "cnn", 1)
    model = models.build("cnn", task.features, task.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = [
        data.Batches(task, size, seed=1, rank=rank, ranks=ranks, sharded=False)
        for rank in range(ranks)
    ]
    for step in range(steps):
        batches = [batches.batch(step) for batches in order]
        optimizer.zero_grad()
        cross_entropy(
            model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])
        ).backward()
        optimizer.step()
    for name, expected in model.state_dict().items():
        trained = _models_after(tmp_path, ranks)[name]
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


def test_a_synchronous_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = [
        "algorithm.name=allreduce", "budget.epochs=3", "checkpoint.count=4", "evaluation.count=2",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(2, whole, *settings)
    shutil.copytree(whole, parts)
    newest = sorted((parts / "run" / "checkpoints").glob("checkpoint*.json"))[-1]
    newest.unlink()  # as if the run had been cut off before its last checkpoint
    (parts / "run" / "model.h5").unlink()
    done = train(2, parts, *settings, "run.resume=true")
    assert "error" not in done.stderr
    for name, value in _models_after(whole, 2).items():
        assert torch.equal(value, _models_after(parts, 2)[name])
    resumed = read_run_file(parts / "run" / "ranks" / "rank00000.h5").tables["train"]
    assert 0 < resumed["step"][0] - 1 < resumed["step"][-1]


@pytest.mark.parametrize("algorithm", ["adpsgd", "allreduce"])
def test_a_diverging_run_stops_saves_and_says_who_and_when(tmp_path: Path, algorithm: str) -> None:
    done = _launch(3, tmp_path, f"algorithm.name={algorithm}", "optimizer.lr=1e30", code=3)
    assert done.stderr.count("error: loss of rank") == 1
    assert "step" in done.stderr and "Traceback" not in done.stderr
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file.attrs["status"] == "failed"


REFUSED = {
    "an unknown key": (["algorithm.triez=2"], ["algorithm.triez", "max_attempts"]),
    "a word for a number": (["optimizer.lr=high"], ["optimizer.lr", "'high'"]),
    "no such graph": (["topology.graph=hypercube"], ["hypercube", "power of two"]),
    "an odd sum of degrees": (
        ["topology.graph=random_regular", "topology.degree=1"],
        ["degree", "3"],
    ),
    "no edge file": (["topology.graph=edge_list", "topology.file=/nowhere"], ["/nowhere"]),
    "a task of simulate": (["task.name=quadratic"], ["task.name", "simulate"]),
    "batches larger than the data": (["task.batch_size=100000"], ["task.batch_size", "1438"]),
    "a model for other data": (
        ["task.model=cnn", "task.name=breast_cancer"],
        ["task.model", "square"],
    ),
    "no such optimizer": (["optimizer.name=Sdg"], ["optimizer.name", "'Sdg'"]),
    "no such option of it": (["optimizer.options={mom=1}"], ["optimizer.options", "mom"]),
    "local steps of allreduce": (
        ["algorithm.name=allreduce", "algorithm.local_steps=4"],
        ["local_steps", "allreduce"],
    ),
    "nothing to resume": (["run.resume=true"], ["run.resume", "checkpoints"]),
    "no such codec": (["codec.name=latice8"], ["codec.name", "did you mean 'lattice8'"]),
    "a codec out of its range": (
        ["codec.name=lattice4", "codec.scale_margin=4"],
        ["codec.scale_margin", "2.1"],
    ),
    "an unknown key on one rank": (["1:algorithm.triez=2"], ["algorithm.triez", "(rank 1)"]),
    "another graph on one rank": (
        ["1:topology.graph=ring"],
        ['topology.graph is "complete" on ranks 0, 2, "ring" on rank 1'],
    ),
    "another task on one rank": (
        ["1:task.name=breast_cancer", "1:task.model=mlp"],
        ['task.name is "digits" on ranks 0, 2, "breast_cancer" on rank 1'],
    ),
    "a straggler that is not there": (
        ["straggler.distribution=constant", "straggler.ranks=[9]"],
        ["straggler", "9"],
    ),
}
"""Overrides of the job that 3 ranks refuse (1: of rank 1), and words of what they say."""

REFUSALS = """
import contextlib, io, json, sys
from mpi4py import MPI
from mpi_dasgd.cli import main

answers = {}
for name, given in json.loads(sys.argv[1]).items():
    own = MPI.COMM_WORLD.rank == 1
    arguments = [text.removeprefix("1:") for text in given if own or text[:2] != "1:"]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["train", *arguments])
    answers[name] = MPI.COMM_WORLD.gather((code, said.getvalue()))
if MPI.COMM_WORLD.rank == 0:
    print("answers", json.dumps(answers))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Exit code and stderr of each rank, by key of `REFUSED`: all from the same three processes."""
    directory = tmp_path_factory.mktemp("refused")
    arguments = {
        name: [str(JOB), f"run.directory={directory}", "run.name=run", *overrides]
        for name, (overrides, _) in REFUSED.items()
    }
    done = run_pooled(3, REFUSALS, json.dumps(arguments), timeout=100)
    answers: dict[str, list[tuple[int, str]]] = json.loads(done.stdout.split("answers ")[1])
    return answers


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_once(refusals: dict[str, list[tuple[int, str]]], name: str) -> None:
    words = REFUSED[name][1]
    codes, said = zip(*refusals[name], strict=True)
    assert codes == (2, 2, 2)
    assert said[1:] == ("", ""), "rank 0 speaks for all"
    assert said[0].count("error:") == 1 and "Traceback" not in said[0]
    assert [word for word in words if word not in said[0]] == []


@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (1, [], ["adpsgd", "at least 2 ranks", "launch -n"]),
        (2, ["run.directory=/proc/nowhere"], ["/proc/nowhere"]),
    ],
)
def test_a_job_that_is_refused_ends_with_exit_code_two(
    tmp_path: Path, ranks: int, overrides: list[str], words: list[str]
) -> None:
    done = _launch(ranks, tmp_path, *overrides, code=2)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert [word for word in words if word not in errors[0]] == []
    assert "Traceback" not in done.stderr


def test_a_result_is_never_overwritten_silently(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    done = train(2, tmp_path, code=2)
    assert "exists" in done.stderr and "run.overwrite=true" in done.stderr
    assert (tmp_path / "run" / "precious").exists()


def test_resuming_from_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    settings = ["checkpoint.count=2", "budget.epochs=4"]
    train(2, tmp_path, *settings)
    for file in (tmp_path / "run" / "checkpoints").glob("*.h5"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    done = train(2, tmp_path, *settings, "run.resume=true", code=2)
    assert done.stderr.count("error:") == 1 and "checkpoint" in done.stderr


def _rank_processes(launcher: int) -> dict[int, int]:
    """Processes of the ranks under a launcher, by rank."""
    processes = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"mpi_dasgd" in words and b"train" in words and b"launch" not in words:
            for variable in environment.split(b"\0"):
                name, _, value = variable.partition(b"=")
                if name == b"PMI_RANK" and f"TEST_OF={launcher}".encode() in environment:
                    processes[int(value)] = int(entry.name)
    return processes


@pytest.mark.parametrize("victim", [0, 2])
def test_the_others_finish_when_a_rank_is_killed(tmp_path: Path, victim: int) -> None:
    mark = f"{os.getpid()}{victim}"
    process = subprocess.Popen(
        _command(
            3, tmp_path, "budget.seconds=6", "transport.heartbeat_timeout=2", "schedule.warmup=0"
        ),
        env={**_environment("mpich"), "TEST_OF": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = tmp_path / "run" / "ranks" / f"rank{victim:05d}.h5"
    deadline = time.monotonic() + 60
    while not run.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    os.kill(_rank_processes(int(mark))[victim], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"ranks [{victim}] were lost" in output
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file.attrs["status"] == "degraded"
        status = file["ranks/status"].asstr()[:].tolist()
        samples = file["ranks/samples"][:]
    assert status.count("finished") == 2
    assert status[victim] == "killed"
    assert np.delete(samples, victim).min() > 0


DIES_AT_THE_END = """
import os, signal, sys
from mpi_dasgd.cli import main
from mpi_dasgd.training import run_end, trainer

where, victims, *arguments = sys.argv[1:]
owner, method = {
    "writing the results": (run_end.RunEnd, "_write_results"),
    "passing the last milestone": (trainer.Trainer, "_pass_milestone"),
}[where]
function = getattr(owner, method)

def dies(self, *rest):
    from mpi4py import MPI  # not before `main` starts it
    last = not rest or rest[0] == 2  # of two milestones
    if last and str(MPI.COMM_WORLD.rank) in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    function(self, *rest)

setattr(owner, method, dies)
sys.exit(main(["train", *arguments]))
"""
"""Trains, and kills ranks at the end of it."""


def _train_with_deaths(
    ranks: int, where: str, victims: str, directory: Path, *overrides: str
) -> Completed:
    return run_ranks(
        ranks, DIES_AT_THE_END, where, victims, str(JOB), f"run.directory={directory}",
        "run.name=run", "budget.epochs=2", "evaluation.count=2",
        "transport.heartbeat_timeout=2", *overrides, check=False,
    )  # fmt: skip


def test_the_next_rank_writes_the_results_when_one_dies_over_them(tmp_path: Path) -> None:
    done = _train_with_deaths(3, "writing the results", "01", tmp_path)
    assert done.code == 0 and done.codes == [137, 137, 0], done.report()
    assert "ranks [0, 1] were lost" in done.stderr
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file["consensus/mean_test_accuracy"].shape == (2,)
        # They had finished: their models are part of the mean.
        assert file["ranks/status"].asstr()[:].tolist() == ["finished"] * 3
    model = load_model(tmp_path / "run" / "model.h5")
    assert all(torch.isfinite(value).all() for value in model.values())


def test_a_model_that_is_lost_is_no_success(tmp_path: Path) -> None:
    server = ["algorithm.name=easgd", "codec.name=none"]
    done = _train_with_deaths(3, "passing the last milestone", "0", tmp_path, *server)
    assert done.code == 4 and done.codes == [137, 4, 4], done.report()
    assert done.stderr.count("error:") == 1
    assert "model.h5" in done.stderr and "ranks [0] were lost" in done.stderr
    assert not (tmp_path / "run" / "model.h5").exists()
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file["ranks/status"].asstr()[:].tolist() == ["killed", "finished", "finished"]


@pytest.mark.parametrize("victim", [1, 3])
def test_the_others_finish_when_a_rank_of_another_host_is_killed(
    two_hosts: Hosts, victim: int
) -> None:
    done = run_ranks(
        4,
        """
        import os, signal, sys, torch, mpi_dasgd
        from mpi_dasgd import config
        settings = config.load(None, ["budget.seconds=6", "transport.heartbeat_timeout=2"])
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        training = mpi_dasgd.Decentralized(model, optimizer, config=settings)
        while not training.finished:
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            training.step(8)
            if training.rank == int(sys.argv[1]) and training.elapsed > 2:
                os.kill(os.getpid(), signal.SIGKILL)
        training.finish()
        assert int(sys.argv[1]) in training.endpoint.membership.dead
        os._exit(0)
        """,
        str(victim),
        hosts=two_hosts,
        check=False,
    )
    # A stalled network may cost more than the victim its place in the graph, but no rank hangs.
    assert done.codes.count(0) == 3 and done.code == 0, done.report()
