"""The quick start's job on a few ranks, for tests of what a finished run has left."""

from __future__ import annotations

from pathlib import Path

from tests.support.mpi_ranks import ROOT, Completed
from tests.support.rank_pool import run_pooled

JOB = ROOT / "jobs" / "train.toml"
MAIN = "import sys; from mpi_dasgd.cli import main; sys.exit(main(sys.argv[1:]))"
IN_PACE = """
import sys
from mpi_dasgd.cli import main
from tests.support.pace import in_pace
with in_pace():
    code = main(sys.argv[1:])
sys.exit(code)
"""


def train(
    ranks: int,
    directory: Path,
    *overrides: str,
    mpi: str = "mpich",
    code: int = 0,
    together: bool = False,
) -> Completed:
    """Train as `JOB` says, on ranks that stay; the results come into ``directory/run``.

    Args:
        ranks: number of ranks.
        directory: where the run's directory is made.
        overrides: of the job.
        mpi: one of `MPIS`.
        code: expected exit code of every rank.
        together: whether no rank may be some steps ahead of another (`tests.support.pace`).
    """
    done = run_pooled(
        ranks, IN_PACE if together else MAIN, "train", str(JOB), f"run.directory={directory}",
        "run.name=run", *overrides, mpi=mpi, timeout=120, check=False,
    )  # fmt: skip
    assert done.codes == [code] * ranks, done.report()
    return done
