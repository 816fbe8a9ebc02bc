"""Ranks that stay together on a busy machine, for tests of what each of them does in a short run.

A budget is that of all ranks: where one stands still, the others use it up. Algorithms that never
wait are held back here, so that each makes its share. (One that waits may wait for the rank that is
held back.)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.trainer_step import DeviceStep, HostStep
from mpi_dasgd.transport.membership import RUNNING

__all__ = ["in_pace", "keep_pace"]

LEAD = 5


def keep_pace(training: Decentralized, lead: int = LEAD) -> None:
    """Wait until this rank is no more than `lead` steps ahead of any that still trains."""
    endpoint, step = training.endpoint, training.local.local_step
    membership = endpoint.membership

    def is_behind(rank: int) -> bool:
        return (
            membership.status[rank] == RUNNING
            and rank not in membership.dead
            and endpoint.gradients_of(rank) < step - lead
        )

    while any(is_behind(rank) for rank in range(training.size) if rank != training.rank):
        endpoint.flush()
        endpoint.refresh_membership()
        time.sleep(2e-4)


@contextlib.contextmanager
def in_pace(lead: int = LEAD) -> Iterator[None]:
    """In the ``with`` block trainers keep the pace of the slowest rank."""

    def held_back(make: Callable[[Any], None]) -> Callable[[Any], None]:
        def held(step: Any) -> None:
            keep_pace(step._training, lead)
            make(step)

        return held

    with contextlib.ExitStack() as stack:
        for kind in (HostStep, DeviceStep):
            stack.enter_context(mock.patch.object(kind, "make", held_back(kind.make)))
        yield
