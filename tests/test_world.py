"""MPI start-up: launchers of another MPI, and the failure of one rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpi_dasgd.world import expected_ranks
from tests.support.mpi_ranks import ROOT, mpi_library, rank_counts, run_ranks


def test_number_of_ranks_that_the_launcher_started() -> None:
    assert expected_ranks({}) == (1, 0)
    assert expected_ranks({"PMI_SIZE": "4", "PMI_RANK": "2"}) == (4, 2)
    assert expected_ranks({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}) == (3, 1)
    assert expected_ranks({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"}) == (8, 7)
    assert expected_ranks({"SLURM_NTASKS": "8"}) == (1, 0)  # sbatch, not srun


@pytest.mark.concurrent
@pytest.mark.parametrize("n", rank_counts(2, 4))
def test_ranks_find_each_other(n: int) -> None:
    run_ranks(
        n,
        f"""
        from mpi_dasgd import world
        w = world.start()
        assert (w.size, w.node_size, w.nodes, w.node_rank) == ({n}, {n}, 1, w.rank)
        from mpi4py import MPI
        assert w.comm != MPI.COMM_WORLD
        assert sorted(w.comm.allgather(w.rank)) == list(range({n}))
        """,
    )


@pytest.mark.concurrent
def test_separate_one_rank_jobs_are_refused_once() -> None:
    """Under the launcher of another MPI every process is a job of one rank."""
    program = "from mpi_dasgd.cli import main; import sys; sys.exit(main(['train', sys.argv[1]]))"
    errors = []
    for rank in range(2):
        environment = {
            **os.environ,
            "MPI_DASGD_RANKS": "2",
            "OMPI_COMM_WORLD_RANK": str(rank),
            "PYTHONPATH": str(ROOT),
            "MPI4PY_LIBMPI": str(mpi_library("mpich")),
        }
        done = subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "jobs" / "train.toml")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2
        errors.append(done.stderr)
    assert "started 2 ranks, but this process sees 1" in errors[0]
    assert "MPICH" in errors[0] and "Traceback" not in errors[0]
    assert errors[1] == ""


@pytest.mark.concurrent
@pytest.mark.parametrize("where", ["main", "thread"])
def test_an_uncaught_exception_ends_all_ranks_and_is_printed_once(where: str) -> None:
    done = run_ranks(
        3,
        """
        import sys, threading, time
        from mpi_dasgd import world
        w = world.start()
        w.abort_on_exception()
        w.comm.Barrier()

        def fail():
            raise ZeroDivisionError("on purpose")

        def body():
            if w.rank == 1:
                if sys.argv[1] == "main":
                    fail()
                threading.Thread(target=fail).start()
            time.sleep(50)
            return 0

        sys.exit(w.run(body))
        """,
        where,
        check=False,
    )
    assert done.code == 1
    assert done.seconds < 40
    assert done.stderr.count("ZeroDivisionError: on purpose") == 1
    assert "rank 1 failed and ends the job" in done.stderr


@pytest.mark.concurrent
def test_bad_input_of_one_rank_ends_all_with_one_message() -> None:
    done = run_ranks(
        3,
        """
        import sys
        from mpi_dasgd import world
        from mpi_dasgd.errors import UserError
        w = world.start()

        def body():
            with w.collective_errors():
                if w.rank == 2:
                    raise UserError("file x: expected y")
            return 0

        sys.exit(w.run(body))
        """,
        check=False,
    )
    assert done.code == 2
    assert done.codes == [2, 2, 2]
    assert done.stderr.count("error: file x: expected y (rank 2)") == 1


@pytest.mark.concurrent
def test_own_scripts_refuse_different_models_with_one_message() -> None:
    done = run_ranks(
        2,
        """
        import torch, mpi_dasgd
        from mpi_dasgd import world
        w = world.start()
        w.abort_on_exception()
        model = torch.nn.Linear(2, 2 + w.rank)
        import sys
        try:
            mpi_dasgd.Decentralized(model, torch.optim.SGD(model.parameters(), lr=1), environment=w)
        except Exception:
            sys.excepthook(*sys.exc_info())
        """,
        check=False,
    )
    assert done.code == 2
    assert done.stderr.count("the ranks do not agree") == 1
    assert "Traceback" not in done.stderr
