"""Totals of exchanges on a GPU, which the host reads when the device has written them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from mpi_dasgd.codecs.base import ExchangeOutcome
from mpi_dasgd.device.base import Array, Device, Mark
from mpi_dasgd.errors import DeviceFailed

__all__ = ["LateOutcome", "LateTotals"]

Resolve = Callable[[np.ndarray], ExchangeOutcome]

# More exchanges than a host begins before the device has done the first of them.
_SLOTS = 64


class LateOutcome:
    """An outcome that is known when the device has passed a mark; see `Outcome`.

    Args:
        totals: what it comes from.
    """

    __slots__ = ("_totals", "outcome")

    def __init__(self, totals: LateTotals) -> None:
        self._totals = totals
        self.outcome: ExchangeOutcome | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it is known. Never waits.

        Raises:
            DeviceFailed: the device has failed.
        """
        if self.outcome is None:
            self._totals.collect()
        return self.outcome is not None

    def value(self) -> ExchangeOutcome:
        """Return it; waits until it is known.

        Raises:
            DeviceFailed: the device has failed.
        """
        while self.outcome is None:
            self._totals.wait_for_first()
        return self.outcome


class LateTotals:
    """Totals of a codec's exchanges, resolved in the order of the exchanges.

    The device writes the numbers of an exchange to a slot of a ring in mapped memory: nothing is
    copied, and nobody waits, unless all slots hold exchanges that the device has not done.

    Args:
        device: device of the codec.
        numbers: numbers of an exchange.
    """

    def __init__(self, device: Device, numbers: int) -> None:
        on_device, self._on_host = device.mapped((_SLOTS, numbers), np.dtype(np.float64))
        self._device = device
        self._on_device = [on_device[slot] for slot in range(_SLOTS)]
        self._late: deque[tuple[LateOutcome, Resolve, int, Mark]] = deque()
        self._slot = 0

    def reserve(self) -> Array:
        """Return where the next exchange writes its numbers, float64, (numbers,), on the device.

        Raises:
            DeviceFailed: the device has failed.
        """
        self.collect()
        while len(self._late) >= _SLOTS:
            self.wait_for_first()
        return self._on_device[self._slot]

    def add(self, resolve: Resolve) -> LateOutcome:
        """Return the outcome of the exchange whose work was asked for after `reserve`.

        Args:
            resolve: called once with its numbers, float64, (numbers,); returns the outcome.

        Raises:
            DeviceFailed: the device has failed.
        """
        outcome = LateOutcome(self)
        self._late.append((outcome, resolve, self._slot, self._device.mark()))
        self._slot = (self._slot + 1) % _SLOTS
        return outcome

    def collect(self) -> None:
        """Resolve the exchanges that the device has done."""
        while self._late and self._late[0][-1].is_done:
            self._resolve_first()

    def wait_for_first(self) -> None:
        """Wait for the first exchange that is not resolved, and resolve it."""
        if not self._late:
            raise DeviceFailed("an exchange whose numbers were given up after a failure")
        self._late[0][-1].wait()
        self._resolve_first()

    def settle(self) -> None:
        """Wait for all exchanges, and resolve them; after a failure none is left.

        Raises:
            DeviceFailed: the device has failed; what it has not done is given up.
        """
        try:
            while self._late:
                self.wait_for_first()
        finally:
            self._late.clear()

    def _resolve_first(self) -> None:
        outcome, resolve, slot, _ = self._late.popleft()
        outcome.outcome = resolve(self._on_host[slot])
