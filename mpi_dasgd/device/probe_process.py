"""A child process that tries what may crash, hang or lie: it answers in lines, or is ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ANSWER_MARK", "ProbeFailure", "ProbeProcess"]

ANSWER_MARK = "mpi_dasgd probe: "
"""Prefix of a line that is an answer; libraries print to stdout, too."""

_END_SECONDS = 1.0  # that a process gets to end once its input is closed
_KEPT = 4096  # bytes kept of a line that does not end, and read of what a process said


class ProbeFailure(Exception):
    """A process did not do what was asked of it; the message says how, in words."""


class ProbeProcess:
    """A child process, started by exec, never by fork alone: its parent may use MPI and CUDA.

    Args:
        name: how messages call it.
        command: program and arguments.
        environment: its environment.

    Raises:
        ProbeFailure: it cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._name = name
        self._partial = b""
        try:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads blocks
        except OSError as error:
            raise ProbeFailure(f"{name} cannot be started: {error}") from error
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=dict(environment),
            )
        except OSError as error:
            self._said.close()
            raise ProbeFailure(f"{name} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def tell(self, request: Mapping[str, Any]) -> None:
        """Send a request.

        Raises:
            ProbeFailure: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended(str(request.get("do", "its start"))) from None

    def hear(self, operation: str, deadline: float) -> dict[str, Any]:
        """Wait for the next answer.

        Args:
            operation: what was asked for, for messages.
            deadline: time by `time.monotonic` at which to give up.

        Raises:
            ProbeFailure: there is none in time, the process has ended, or it reports an error.
        """
        while True:
            line, newline, rest = self._partial.partition(b"\n")
            if newline:
                self._partial = rest
                answer = _answer_in(line)
                if answer is None:
                    continue
                if "error" in answer:
                    raise ProbeFailure(f"{self._name}, {operation}: {answer['error']}")
                return answer
            self._partial = self._partial[-_KEPT:]
            self._read_more(operation, deadline)

    def _read_more(self, operation: str, deadline: float) -> None:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        poll = select.poll()  # `select` takes no numbers of files above 1023
        poll.register(output, select.POLLIN | select.POLLHUP)
        remaining = deadline - time.monotonic()
        # It may say something all the time, but no answer.
        if remaining <= 0 or not poll.poll(1000 * remaining):
            raise ProbeFailure(f"{self._name}, {operation}: no answer in time")
        data = os.read(output, 1 << 16)
        if not data:
            raise self._ended(operation)
        self._partial += data

    def _ended(self, operation: str) -> ProbeFailure:
        """Return the failure of a process that is ending, or has ended."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return ProbeFailure(f"{self._name}, {operation}: its output is closed")
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        said = self._last_line()
        return ProbeFailure(f"{self._name}, {operation}: {how}{f' ({said})' if said else ''}")

    def _last_line(self) -> str:
        """Return what it said last on stderr, shortened."""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _KEPT))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else ""

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end, or end it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()
        self._said.close()


def _answer_in(line: bytes) -> dict[str, Any] | None:
    """Return the answer in a line of output, or None if there is none."""
    text = line.decode(errors="replace")
    if not text.startswith(ANSWER_MARK):
        return None
    try:
        answer = json.loads(text.removeprefix(ANSWER_MARK))
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
