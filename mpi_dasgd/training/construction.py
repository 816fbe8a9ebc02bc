"""Construction of a training, which is collective: a wait for ranks that never come is bounded."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mpi_dasgd import launch
from mpi_dasgd.config import Config, load
from mpi_dasgd.errors import UserError
from mpi_dasgd.process_end import process_end
from mpi_dasgd.world import expected_ranks

__all__ = ["bounded", "collective_construction"]

_LEAST_SECONDS = 60.0  # by which ranks may start apart: imports from a busy file system take long

P = ParamSpec("P")
R = TypeVar("R")


def collective_construction(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, which constructs a training, such that no rank waits in it for ever.

    Args:
        function: waits inside MPI for all ranks to call it; its argument `config` is as that of
            `Decentralized`.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        timeout = max(_LEAST_SECONDS, _stall_timeout(kwargs.get("config")))
        with launch.constructing(), bounded(timeout):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def bounded(timeout: float) -> Iterator[None]:
    """End this process, and with it the job, if the body lasts longer than `timeout` seconds.

    Nothing else can: this rank is inside MPI, where it waits for the others.
    """
    ranks, rank = expected_ranks()
    if ranks == 1:
        yield
        return
    timer = threading.Timer(timeout, _give_up, (rank, timeout))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(rank: int, timeout: float) -> None:
    error = UserError(
        f"rank {rank} has waited in mpi_dasgd.Decentralized(...) for other ranks for {timeout:g} "
        "s; every rank must construct it (if some come so late, raise transport.stall_timeout)"
    )
    process_end.end_now(process_end.fail(error))


def _stall_timeout(config: object) -> float:
    """Return `transport.stall_timeout` of `config`, or the default if that is refused later."""
    if isinstance(config, (str, Path, Mapping)):
        given: Any = config
        with contextlib.suppress(UserError):
            config = load(given)
    return (config if isinstance(config, Config) else Config()).transport.stall_timeout
