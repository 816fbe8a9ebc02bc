"""End of this process as one rank of several: what the others learn of it, and who reports.

Other ranks wait for this one while a training is open. So however the program ends, it tells them:

* at its normal end, and with exit code 0, it closes what is open, so that the others can finish;
* after an uncaught exception, or with another exit code, it publishes that it has failed, and with
  which code. The others end with the same code, and say nothing, as the first has said it all.

A rank that has failed, or whose peers have died, must not finalize MPI, which would wait for them
for ever. The process then ends by ``os._exit``, after the program's own exit handlers and when
Python has cleared all other modules, or (started by another launcher than ours) by ``MPI_Abort``.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from mpi_dasgd import exit_status
from mpi_dasgd.errors import MpiDasgdError, PeerFailed, UserError
from mpi_dasgd.messages import print_message

__all__ = ["OpenTraining", "ProcessEnd", "is_launched", "process_end"]

_REPORT_SECONDS = 2.0  # in which a rank that fails reports, before another one says that it has
_ABORT_SECONDS = 1.0  # in which the rank that reports has done so, before another aborts the job
_DEPARTURE_SECONDS = 0.3  # in which other nodes read that this rank has failed, before it is gone


class OpenTraining(Protocol):
    """A training that has begun and is not closed, in which other ranks take part."""

    def fail(self, exit_code: int, error: BaseException | None = None) -> None:
        """Tell the other ranks that this one ends with `exit_code`, not 0, by `error`."""

    def claim_report(self) -> bool:
        """Return True for the first rank that calls."""

    def close(self) -> None:
        """Finish, together with the other ranks."""


def is_launched() -> bool:
    """Return whether this process is a rank that `mpi-dasgd launch` started, not a child of one."""
    stage = os.environ.get("MPI_DASGD_STAGE")
    if not stage:
        return False
    try:
        return Path(stage).with_suffix(".pid").read_text().split()[-1:] == [str(os.getpid())]
    except OSError:
        return False


class ProcessEnd:
    """End of this process; there is one: `process_end`."""

    def __init__(self) -> None:
        self._finalizes = True  # else MPI would wait for ranks that have died
        self._rank = 0
        self._size = 1
        self._abort: Callable[[int], object] | None = None  # None: nobody waits in MPI, or ours
        self._open: list[OpenTraining] = []
        self._pid: int | None = (
            None  # of the process that the handlers are for; None: not installed
        )
        self._launched = False
        self._failed = 0  # exit code of the error that ends the program
        self._previous_hook = sys.__excepthook__

    # Installation

    def watch(self, rank: int, size: int, abort: Callable[[int], object] | None = None) -> None:
        """From now on, let the end of this process be known to the other ranks.

        Args:
            rank: this rank.
            size: number of ranks.
            abort: ends all ranks with an exit code; None: MPI has not started.
        """
        self._rank, self._size = rank, size
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._launched = is_launched()
            exit_status.watch()
            atexit.register(self._at_exit)
        if not self._launched and size > 1:
            self._abort = abort or self._abort

    def report_exceptions(self) -> None:
        """Let an uncaught exception in any thread of this process end all ranks."""
        if sys.excepthook != self._main_hook:
            self._previous_hook = sys.excepthook
            sys.excepthook = self._main_hook
        threading.excepthook = self._thread_hook

    def enter(self, training: OpenTraining) -> None:
        """Note that a training has begun: other ranks take part in it."""
        self._open.append(training)

    def leave(self, training: OpenTraining) -> None:
        """Note that a training is closed."""
        self._open = [other for other in self._open if other is not training]

    @property
    def is_open(self) -> bool:
        """Whether a training has begun and is not closed."""
        return bool(self._open)

    def is_first_to_say(self, text: str) -> bool:
        """Return whether no other rank has asked so, where ranks can know: under our launcher."""
        return not self._launched or self._mark(f"said-{_digest(text)}")

    def skip_finalize(self) -> None:
        """Note that ranks have died, for which MPI would wait for ever if it were finalized."""
        self._finalizes = False

    # Failure

    def fail(self, error: BaseException) -> int:
        """Tell the others that this rank ends by an error; one rank reports it.

        Returns:
            The exit code.
        """
        code = self._failed = _exit_code(error)
        self._tell(code, error)
        self._report(error)
        return code

    def end_now(self, code: int) -> NoReturn:
        """End this process at once, and (under another launcher than ours) the whole job."""
        _flush()
        if self._abort is not None:
            self._abort(code)
        os._exit(code)

    def _tell(self, code: int, error: BaseException | None = None) -> None:
        for training in self._open:
            with contextlib.suppress(Exception):  # others may be gone
                training.fail(code, error)

    def _report(self, error: BaseException) -> None:
        if isinstance(error, PeerFailed) and error.rank != self._rank:
            if not self._is_reported(error):
                print_message(f"rank {self._rank}: error: {error}")
        elif not self._is_first(_key(error)):
            if self._abort is not None:
                time.sleep(_ABORT_SECONDS)
        elif isinstance(error, UserError) and error.on_all_ranks:
            print_message(f"error: {error}")
        elif isinstance(error, MpiDasgdError) and not _is_caught_error(error):
            print_message(f"rank {self._rank}: error: {error}")
        elif isinstance(error, KeyboardInterrupt):
            print_message(f"rank {self._rank}: interrupted")
        elif self._previous_hook is not sys.__excepthook__:  # of the program: it knows better
            print_message(f"rank {self._rank} failed and ends the job:")
            self._previous_hook(type(error), error, error.__traceback__)
            sys.stderr.flush()
        else:
            text = "".join(traceback.format_exception(error)).rstrip()
            print_message(f"rank {self._rank} failed and ends the job:\n{text}")

    def _is_first(self, key: str) -> bool:
        """Return whether this rank is the first one to report what `key` stands for."""
        if self._launched:
            self._mark("reported")
            return self._mark(f"report-{_digest(key)}")
        if self._open:
            with contextlib.suppress(Exception):
                return self._open[0].claim_report()
        if self._rank != 0 and self._abort is not None:
            time.sleep(_ABORT_SECONDS)  # rank 0 comes first, and ends the job
        return True

    def _mark(self, name: str) -> bool:
        """Create a file in the directory that the ranks of the job share; False: it was there."""
        try:
            Path(os.environ["MPI_DASGD_STAGE"]).with_name(name).open("x").close()
        except FileExistsError:
            return False
        except OSError:
            return True  # better reported twice than not at all
        return True

    def _is_reported(self, error: PeerFailed) -> bool:
        """Return whether another rank has reported, once it has had the time to."""
        if not self._launched:
            time.sleep(_ABORT_SECONDS)
            return bool(self._open) and not self._is_first(_key(error))
        file = Path(os.environ["MPI_DASGD_STAGE"]).with_name("reported")
        deadline = time.monotonic() + _REPORT_SECONDS
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return file.exists() or not self._is_first(_key(error))

    # Hooks

    def _main_hook(
        self, exc_type: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:  # a child of this process
            self._previous_hook(exc_type, error, trace)
            return
        code = self.fail(error)
        if self._abort is not None:
            self.end_now(code)

    def _thread_hook(self, arguments: threading.ExceptHookArgs) -> None:
        error = arguments.exc_value
        if error is None or arguments.exc_type is SystemExit:
            return
        if os.getpid() != self._pid:
            threading.__excepthook__(arguments)
            return
        self.end_now(self.fail(error))

    def _at_exit(self) -> None:
        """Finish together with the others, or tell them that this rank ends; then let it end."""
        if os.getpid() != self._pid:
            return
        code = self._exit_code()
        if code:
            if self._open and not self._failed and self._is_first(f"exit code {code}"):
                print_message(
                    f"rank {self._rank} ends with exit code {code} before training.close(), which "
                    "ends the job"
                )
            self._tell(code)
        else:
            code = self._close_all()
        is_open, self._open = bool(self._open), []
        if self._abort is not None and code and is_open:
            end: Callable[[int], object] = self._abort
        elif is_open or not self._finalizes or (code and (self._launched or self._failed)):
            end = (
                os._exit
            )  # without MPI, where others do not wait for this rank, or it for dead ones
        else:
            if self._launched:
                with contextlib.suppress(OSError):  # the launching process has been killed
                    file = os.open(os.environ["MPI_DASGD_STAGE"], os.O_WRONLY | os.O_CREAT, 0o600)
                    sys.mpi_dasgd_last = _LeavingNote(file, code)  # type: ignore[attr-defined]
            return
        _flush()
        if is_open:
            time.sleep(_DEPARTURE_SECONDS)
        sys.mpi_dasgd_last = _LastObject(end, code)  # type: ignore[attr-defined]

    def _exit_code(self) -> int:
        """Return the exit code with which the program is about to end."""
        code = exit_status.current()
        if code is not None:
            return code
        if self._failed:
            return self._failed
        # Another hook has reported an uncaught exception.
        return int(
            sys.excepthook != self._main_hook
            and hasattr(sys, "last_value")
            and not sys.flags.interactive
        )

    def _close_all(self) -> int:
        """Close what the program has left open; return the exit code."""
        try:
            for training in tuple(self._open):
                training.close()
        except BaseException as error:
            return self.fail(error)
        return 0


class _LastObject:
    """Ends the process when Python drops it: after all exit handlers, and after other modules.

    Then files that the program has left open are written, too. Nothing global is there any more.

    Args:
        end: ends the process with an exit code.
        code: exit code.
    """

    def __init__(self, end: Callable[[int], object], code: int) -> None:
        self._end = end
        self._code = code
        self._collect = gc.collect
        self._streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
        self._error = Exception

    def __del__(self) -> None:
        self._collect()  # open files that a hook of the program, cleared just now, has referred to
        for stream in self._streams:
            try:  # noqa: SIM105 (contextlib is gone)
                stream.flush()
            except self._error:
                pass
        self._end(self._code)


class _LeavingNote:
    """Tells `mpi-dasgd launch`, when Python drops it, that nothing is left but to finalize MPI.

    There this rank waits for the others, for ever if one of them is killed.

    Args:
        file: descriptor of the file of this rank's stage.
        code: exit code of this process.
    """

    def __init__(self, file: int, code: int) -> None:
        self._file = file
        self._text = f"leaving {code}\n".encode()
        self._write, self._close = os.write, os.close

    def __del__(self) -> None:
        self._write(self._file, self._text)  # over the beginning of what is there
        self._close(self._file)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return exit_status.exit_code_of(error.code)
    return error.exit_code if isinstance(error, MpiDasgdError) else 1


def _is_caught_error(error: BaseException) -> bool:
    """Return whether `error` is about another error of this rank, which the program has caught."""
    return isinstance(error, PeerFailed) and error.__cause__ is not None


def _key(error: BaseException) -> str:
    """Return what an error of one rank has in common with the same error of another rank."""
    frames = traceback.extract_tb(error.__traceback__)
    place = (
        f"{frames[-1].filename}:{frames[-1].lineno}"
        if frames and isinstance(error, Exception)
        else ""
    )
    return f"{type(error).__qualname__} {place}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


process_end = ProcessEnd()
