"""Messages of this package to the user, on stderr."""

from __future__ import annotations

import logging
import re
import sys

__all__ = ["log_to_stderr", "print_message"]


def print_message(message: str) -> None:
    """Print a message to stderr in one write, after the name of the program."""
    sys.stderr.write(f"mpi-dasgd: {message}\n")
    sys.stderr.flush()


class _ProgramHandler(logging.Handler):
    """Handler that prints log records by `print_message`, with the level after the rank, if any."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print_message(re.sub(r"^(rank \d+: )?", rf"\g<0>{level}", self.format(record), count=1))


def log_to_stderr() -> None:
    """Print the log records of this package as messages of ``mpi-dasgd``.

    Only the programs of this package call it. In other programs the logger ``mpi_dasgd`` stays as
    they configure it, or as Python treats it by default: warnings and errors go to stderr.
    """
    logger = logging.getLogger("mpi_dasgd")
    if not any(isinstance(handler, _ProgramHandler) for handler in logger.handlers):
        logger.addHandler(_ProgramHandler())
