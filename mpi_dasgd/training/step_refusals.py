"""Calls of a training loop that come at a wrong time, or on a wrong rank, each with its message."""

from __future__ import annotations

from mpi_dasgd.algorithms import Algorithm
from mpi_dasgd.errors import UserError

__all__ = ["require_budget", "require_running", "require_server", "require_worker"]


def require_worker(algorithm: Algorithm) -> None:
    """Refuse a step on a rank that only serves others.

    Raises:
        UserError: it does.
    """
    if not algorithm.computes_gradients:
        raise UserError(
            f"rank {algorithm.endpoint.rank} is the server of {algorithm.name!r} and takes no "
            "gradients: call training.serve() while training.computes_gradients is false, or "
            "set algorithm.server_trains=true"
        )


def require_server(algorithm: Algorithm) -> None:
    """Refuse to serve on a rank that computes gradients.

    Raises:
        UserError: it does.
    """
    if algorithm.computes_gradients:
        raise UserError(
            f"training.serve: rank {algorithm.endpoint.rank} computes gradients, expected "
            "training.step(): call serve only while training.computes_gradients is false"
        )


def require_running(is_running: bool, call: str) -> None:
    """Refuse a call after the end of training.

    Args:
        is_running: whether neither `finish` nor `close` has been called.
        call: name of the call.

    Raises:
        UserError: one has.
    """
    if not is_running:
        raise UserError(
            f"training.{call}: expected before training.finish() or training.close(), got one "
            "after it: this rank exchanges no more; for further training make another "
            "Decentralized object of the same model, on all ranks"
        )


def require_budget(was_spent: bool) -> None:
    """Refuse a step that begins after the budget is spent.

    Args:
        was_spent: whether it was when the last step ended, so that the loop could see it.

    Raises:
        UserError: it was.
    """
    if was_spent:
        raise UserError(
            "training.step: the budget was spent at the last step, expected an end of the loop: "
            "make it `while not training.finished`, leave inner loops by `if training.finished: "
            "break`, or give a larger total_samples or seconds, or neither"
        )
