"""Steps that come at a wrong time, or on a wrong rank, each with its message."""

from __future__ import annotations

from typing import NoReturn

from mpi_dasgd.algorithms import Algorithm
from mpi_dasgd.errors import UserError

__all__ = ["refuse_serving", "refuse_step"]


def refuse_step(algorithm: Algorithm, is_running: bool) -> NoReturn:
    """Say why a rank may make no step.

    Args:
        algorithm: algorithm of the rank.
        is_running: whether neither `finish` nor `close` has been called; the budget was spent at
            the last step then, so that the loop could see it.

    Raises:
        UserError: in any case.
    """
    if not algorithm.computes_gradients:
        raise UserError(
            f"rank {algorithm.endpoint.rank} is the server of {algorithm.name!r} and takes no "
            "gradients: call training.serve() while training.computes_gradients is false, or "
            "set algorithm.server_trains=true"
        )
    if not is_running:
        raise UserError(_after_the_end("step"))
    raise UserError(
        "training.step: the budget was spent at the last step, expected an end of the loop: "
        "make it `while not training.finished`, leave inner loops by `if training.finished: "
        "break`, or give a larger total_samples or seconds, or neither"
    )


def refuse_serving(algorithm: Algorithm, is_running: bool) -> None:
    """Refuse to serve on a rank that computes gradients, or after the end.

    Args:
        algorithm: algorithm of the rank.
        is_running: whether neither `finish` nor `close` has been called.

    Raises:
        UserError: it is one of these.
    """
    if algorithm.computes_gradients:
        raise UserError(
            f"training.serve: rank {algorithm.endpoint.rank} computes gradients, expected "
            "training.step(): call serve only while training.computes_gradients is false"
        )
    if not is_running:
        raise UserError(_after_the_end("serve"))


def _after_the_end(call: str) -> str:
    return (
        f"training.{call}: expected before training.finish() or training.close(), got one after "
        "it: this rank exchanges no more; for further training make another Decentralized object "
        "of the same model, on all ranks"
    )
