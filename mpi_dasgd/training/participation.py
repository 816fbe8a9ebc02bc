"""Participation of this rank in a training, from its begin to its end, however that comes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpi_dasgd import launch
from mpi_dasgd.errors import MpiDasgdError, PeerFailed, PeerLost
from mpi_dasgd.process_end import process_end
from mpi_dasgd.transport.membership import FAILED

if TYPE_CHECKING:
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["Participation"]

_log = logging.getLogger("mpi_dasgd")


class Participation:
    """Participation of this rank in a training: an `OpenTraining` until it has ended.

    Args:
        endpoint: transport of this rank.
        close: closes the training; called if the program ends without having done so.
    """

    def __init__(self, endpoint: RmaEndpoint, close: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._close = close
        self._error: BaseException | None = None  # that has ended the training of this rank
        process_end.enter(self)

    def close(self) -> None:
        """Finish, together with the other ranks."""
        self._close()

    def fail(self, exit_code: int, error: BaseException | None = None) -> None:
        """Tell the other ranks that this one ends with `exit_code`, not 0.

        Args:
            exit_code: 1 to 255.
            error: what ends it; if that is the failure of another rank, the others learn which.
        """
        cause = error.rank if isinstance(error, PeerFailed) else None
        self._endpoint.membership.publish_status(FAILED, exit_code, cause)

    def claim_report(self) -> bool:
        """Return True for the first rank that calls: it alone reports why the run failed."""
        return self._endpoint.membership.claim_error_report()

    def fail_by(self, error: BaseException) -> None:
        """Tell the other ranks that an error has ended the training of this one.

        Not if the program exits: it may do so with exit code 0.
        """
        if not isinstance(error, (SystemExit, GeneratorExit)):
            self._error = error
            self.fail(error.exit_code if isinstance(error, MpiDasgdError) else 1, error)

    def refuse_if_failed(self) -> None:
        """Raise if the training of this rank has ended by an error, whoever has caught it.

        Raises:
            PeerFailed: it has; the error is its cause.
        """
        if self._error is not None:
            membership = self._endpoint.membership
            rank = self._endpoint.rank
            raise PeerFailed(rank, membership.exit_codes[rank]) from self._error

    def end(self) -> None:
        """Free the windows. If a rank has died they stay, and the process will end without MPI.

        Raises:
            PeerFailed: a rank has failed.
        """
        membership = self._endpoint.membership
        try:
            self._endpoint.close()
        except PeerFailed:
            raise
        except PeerLost as error:
            dead = tuple(sorted(membership.dead))
            process_end.skip_finalize()
            living = [rank for rank in range(self._endpoint.size) if rank not in membership.dead]
            if not dead:
                what = str(error).partition(" (")[0]  # without what may differ from rank to rank
                if process_end.is_first_to_say(what):
                    _log.warning("rank %d: %s", self._endpoint.rank, error)
            elif self._endpoint.rank == living[0]:
                _log.warning("ranks %s were lost; the others finished the training", list(dead))
        process_end.leave(self)
        if not process_end.is_open:
            launch.closed()
