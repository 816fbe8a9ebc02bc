"""End of a run on one rank: results from a rank that lives, and an exit that nothing delays."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from mpi_dasgd.errors import DeviceFailed, Diverged, PeerFailed, PeerLost
from mpi_dasgd.storage.checkpoint import Checkpoints
from mpi_dasgd.storage.results import consolidate
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.evaluator import Evaluator
from mpi_dasgd.training.finalize import RankRoles, RunOutputs, write_results
from mpi_dasgd.training.recorder import Recorder
from mpi_dasgd.transport.membership import DEPARTED, FAILED

__all__ = ["RunEnd"]

_log = logging.getLogger("mpi_dasgd")

_CHECKPOINT_SECONDS = 60.0  # longest wait for the last checkpoint of the other ranks
# Less than the 5 s after which `launch` ends the ranks that are left, once the others are gone.
_CONSOLIDATE_SECONDS = 4.0
_REPORT_SECONDS = 1.0  # in which a rank that fails claims the report, before another one does
_DEPARTURE_SECONDS = 0.3  # in which other nodes read that this rank departs, before it is gone


class RunEnd:
    """End of a run on one rank: make it as soon as the run's directory is prepared.

    Args:
        training: training of this rank.
        evaluator: evaluates the mean models, if this rank writes the results.
        directory: run directory.
        milestones: number of milestones.
        checkpoints: checkpoints to complete before, if the run saves any.
    """

    def __init__(
        self,
        training: Decentralized,
        evaluator: Evaluator,
        directory: Path,
        milestones: int,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._training = training
        self._evaluator = evaluator
        self._directory = directory
        self._milestones = milestones
        self._checkpoints = checkpoints
        self._outputs = RunOutputs(directory)

    def finish(self) -> None:
        """Have the lowest rank that lives evaluate the mean models and write the results.

        The others stay until it has: if it dies, the next one does it, from the files of all.
        Call it when all exchanges have ended and the run file is closed.

        Raises:
            PeerLost: these files do not suffice.
        """
        membership = self._training.endpoint.membership
        if self._checkpoints:
            self._checkpoints.close(_CHECKPOINT_SECONDS, dead=lambda: tuple(membership.dead))
        pause = 0.05
        # Not a barrier: MPICH may crash in one if a rank of another host dies meanwhile.
        while not self._outputs.complete:
            living = (rank for rank in range(self._training.size) if rank not in membership.dead)
            first = next(living)
            if self._training.rank == first:
                self._write_results()
            elif membership.status[first] == DEPARTED:
                return
            elif FAILED in membership.status:
                failed = membership.status.index(FAILED)
                raise PeerLost(f"rank {failed} could not write the results")
            else:
                time.sleep(pause)
                pause = min(1.0, 1.25 * pause)
                self._training.endpoint.refresh_membership()

    def _write_results(self) -> None:
        training, directory = self._training, self._directory
        dead = sorted(training.endpoint.membership.dead)
        roles = RankRoles(
            range(training.size),
            training.algorithm.model_ranks(training.size),
            training.algorithm.workers(training.size, training.algorithm.settings),
            dead,
        )
        write_results(directory, roles, self._milestones, self._evaluator)
        print(f"results: {directory}/results.h5, mean model: model.h5 beside it", flush=True)
        if dead:
            _log.warning("ranks %s were lost; the others finished the run", dead)

    def leave(self) -> None:
        """Free the windows; if a rank is dead, end the process instead."""
        membership = self._training.endpoint.membership
        if not membership.dead:
            try:
                self._training.close()
            except PeerLost:
                pass
            else:
                return
        membership.publish_status(DEPARTED)
        sys.stdout.flush()
        time.sleep(_DEPARTURE_SECONDS)
        os._exit(0)  # MPI cannot be finalized without the dead

    def fail(self, error: Diverged | PeerLost, recorder: Recorder) -> NoReturn:
        """Close the record and end the process; the first rank that failed reports the error.

        That rank also writes the results of what all ranks have recorded.
        """
        knows_why = not isinstance(error, PeerFailed)
        is_first = knows_why and self._training.claim_report()
        self._training.fail(error.exit_code, error)
        with contextlib.suppress(DeviceFailed):  # then its last exchanges are not counted
            self._training.algorithm.settle()
        recorder.close("failed" if isinstance(error, Diverged) else "stopped")
        if not knows_why:
            time.sleep(_REPORT_SECONDS)
            is_first = self._training.claim_report()
        if is_first:
            _log.error("%s; the record so far is in %s", error, self._directory)
            dead = tuple(self._training.endpoint.membership.dead)
            consolidate(self._directory, timeout=_CONSOLIDATE_SECONDS, dead=dead)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)  # others may be gone already: nothing collective any more
