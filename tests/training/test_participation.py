"""Own loops of which a rank dies or leaves: what the others do, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_process_end import launch_script

pytestmark = pytest.mark.concurrent

SCRIPT = """
import os, signal, sys, torch, mpi_dasgd
algorithm, how = sys.argv[1:]
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
config = {"algorithm.name": algorithm, "transport.heartbeat_timeout": 2.0}
if how == "alone": config["transport.stall_timeout"] = 2.0
training = mpi_dasgd.Decentralized(model, optimizer, config=config)
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if how == "killed in pause":
    if training.rank == 1: type(training.parameters).digest = die
    with training.paused(): pass
if how == "killed in close" and training.rank == 1:
    from mpi_dasgd.transport.rma.progress_engine import ProgressEngine
    ProgressEngine.close = die  # when all ranks have come, and before the windows are freed
while training.samples < 8 * 400:
    optimizer.zero_grad()
    model(torch.randn(8, 4)).pow(2).mean().backward()
    training.step(8)
    if training.samples == 8 * 50 and training.rank == 1:
        if how == "exit 0": sys.exit(0)
        if how == "caught":
            try:
                with training: raise KeyError("caught")
            except KeyError: sys.exit(0)
        if how == "killed": die()
    if training.samples == 8 * 100 and how == "killed":
        training.average()
        middle = model.weight.detach().sum().item()
training.close()
if how == "killed in close": os.write(1, b"goes on\\n")
if how in ("exit 0", "killed in close") or how == "alone" and training.rank == 1: sys.exit(0)
training.average()  # also of those that are left, at the end
os.write(1, f"{middle if how == 'killed' else ''} {model.weight.detach().sum()}\\n".encode())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_others_train_average_and_close_without_a_killed_rank(mpi: str, script: Path) -> None:
    job = launch_script(script, 3, "adpsgd", "killed", mpi=mpi)
    assert job.code == 0, job.err
    assert job.err.count("ranks [1] were lost; the others finished the training") == 1
    assert "mpi-dasgd launch: warning: rank 1 killed by SIGKILL" in job.err
    first, second = job.out.splitlines()
    assert first == second


def test_a_synchronous_algorithm_ends_with_one_message_when_a_rank_is_killed(script: Path) -> None:
    job = launch_script(script, 3, "allreduce", "killed")
    assert job.code == 4, job.err
    assert job.err.count("rank 1 is gone, and allreduce needs it") == 1
    assert job.err.count("mpi-dasgd: ") == 1
    assert job.seconds < 60


def test_a_collective_call_ends_if_a_rank_is_killed_inside(script: Path) -> None:
    job = launch_script(script, 3, "allreduce", "killed in pause")
    assert job.code == 4, job.err
    assert job.err.count("rank 1 is gone, and allreduce needs it") == 1
    assert job.seconds < 60


def test_a_rank_that_is_killed_inside_close_is_not_waited_for(script: Path) -> None:
    job = launch_script(script, 3, "adpsgd", "killed in close")
    assert job.code == 0, job.err
    assert job.out == "goes on\n" * 2
    assert job.err.count("a rank has ended inside close()") == 1
    assert "mpi-dasgd launch: warning: rank 1 killed by SIGKILL" in job.err
    assert job.seconds < 90


def test_a_rank_that_exits_with_code_0_is_no_failure(script: Path) -> None:
    job = launch_script(script, 2, "allreduce", "exit 0")
    assert (job.code, job.err) == (0, "")


def test_an_average_after_the_end_to_which_a_rank_does_not_come_ends(script: Path) -> None:
    job = launch_script(script, 2, "adpsgd", "alone")
    assert job.code == 4, job.err
    assert job.err.count("(average, mean_model) for ranks [1] for 2 s") == 1


def test_an_exception_that_leaves_a_with_block_ends_the_others_even_if_it_is_caught(
    script: Path,
) -> None:
    job = launch_script(script, 2, "adpsgd", "caught")
    assert job.code == 1, job.err
    assert job.err.count("rank 1 failed and ends the job:\nTraceback") == 1
    assert job.err.count("KeyError: 'caught'") == 1
    assert "rank 0 has failed" not in job.err
