"""The operations that `bench rma` times, on the real transport, and a check of what they moved."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable

import numpy as np

from mpi_dasgd.codecs.message import Message
from mpi_dasgd.codecs.none import NoCodec
from mpi_dasgd.kernels.pair_average import pair_average
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint

__all__ = ["Peer"]

ROUNDS = (7, 500)  # at least and at most

_CACHES = 64 * 2**20  # bytes read between two operations, so that each finds the caches cold
_PAGE = 1024  # float32 elements of 4 KiB: one element of each page is new in every round


class Peer:
    """One of the two ranks that exchange: its arrays, and the operations that are timed.

    Args:
        endpoint: real transport.
        codec: of the messages.
        other: the other rank.
    """

    def __init__(self, endpoint: RmaEndpoint, codec: NoCodec, other: int) -> None:
        elements = codec.layout.elements
        self.endpoint, self.codec, self.other = endpoint, codec, other
        self.in_place = endpoint.is_local(other)
        self.pattern = np.arange(elements, dtype=np.float32) % 65521
        self.x = self.pattern.copy()
        self.private = np.zeros_like(self.x)
        self.out = Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)
        self.caches = np.zeros(_CACHES // 8)
        self.wrong = 0
        self.round = 0

    def start(self) -> float:
        """Fill the caches with something else and return the time, in seconds."""
        self.caches.sum()
        return time.perf_counter()

    def check(self, found: np.ndarray, number: int) -> None:
        """Compare a payload with what round `number` has sent."""
        self.pattern[::_PAGE] = number
        self.wrong += not np.array_equal(found, self.pattern)

    def receive(self) -> None:
        """Take messages out of the inbox and compare them."""
        for arrival in self.endpoint.inbox.receive():
            self.check(arrival.message.payload, arrival.message.header.step)
            self.endpoint.inbox.free(arrival)

    def publish(self, number: int) -> float:
        """Encode and publish the model of round `number`; return the seconds it took."""
        self.x[::_PAGE] = number
        start = self.start()
        message = self.endpoint.publication.reserve()
        assert message is not None, "nobody holds publications of this rank"
        self.codec.encode(self.x, message)
        message.stamp(rank=self.endpoint.rank, step=number, time_ns=self.endpoint.time_ns())
        self.endpoint.publication.publish()
        seconds = time.perf_counter() - start
        self.check(message.payload, number)
        return seconds

    def measure(self, seconds: float, warm_up: int) -> dict[str, list[float]]:
        """Do rounds of all operations until the time is over; return the seconds of each.

        Args:
            seconds: to spend.
            warm_up: rounds to do besides; their samples come first.
        """
        operations: dict[str, Callable[[], float]] = {
            "memcpy": self._memcpy,
            "publish": lambda: self.publish(self.round),
            "read" if self.in_place else "get": self._read,
            "put": self._put,
        }
        pairing = None
        if self.in_place:
            pairing = self.endpoint.begin_exchange([self.other])
            assert pairing.partner_model is not None and pairing.partner_delta is not None
            theirs, reply = pairing.partner_model.payload, pairing.partner_delta.payload
            operations["average"] = lambda: self._average(theirs, None)
            operations["exchange"] = lambda: self._average(theirs, reply)
        samples: dict[str, list[float]] = {name: [] for name in operations}
        order = list(operations)
        shuffle = random.Random(1).shuffle
        least, most = (warm_up + rounds for rounds in ROUNDS)
        end = time.perf_counter() + seconds
        while self.round < least or (self.round < most and time.perf_counter() < end):
            self.round += 1
            self.x[::_PAGE] = self.round
            shuffle(order)
            for name in order:
                samples[name].append(operations[name]())
        if pairing is not None:
            self.endpoint.abort_exchange(pairing)
        return samples

    def _memcpy(self) -> float:
        to, source, nbytes = self.private.ctypes.data, self.x.ctypes.data, self.x.nbytes
        start = self.start()
        ctypes.memmove(to, source, nbytes)
        seconds = time.perf_counter() - start
        self.check(self.private, self.round)
        return seconds

    def _read(self) -> float:
        """Copy the other's newest publication, with the words that make sure that it is whole."""
        self.out.payload[::_PAGE] = -1
        start = self.start()
        whole = self.endpoint.publication.read(self.other, self.out)
        seconds = time.perf_counter() - start
        assert whole, "nobody replaces the publication"
        self.check(self.out.payload, 0)
        return seconds

    def _put(self) -> float:
        """Encode into the other's inbox and set it ready; remote: put what is encoded already."""
        inbox, rank = self.endpoint.inbox, self.endpoint.rank
        if not self.in_place:
            self.codec.encode(self.x, self.out)
            self.out.stamp(rank=rank, step=self.round, time_ns=self.endpoint.time_ns())
        start = self.start()
        reservation = inbox.reserve(self.other)
        assert reservation is not None, "the inbox was emptied"
        message = inbox.view_of(reservation)
        if message is None:
            message = self.out
        else:
            self.codec.encode(self.x, message)
            message.stamp(rank=rank, step=self.round, time_ns=self.endpoint.time_ns())
        inbox.send(reservation, message)
        seconds = time.perf_counter() - start
        self._wait_until_freed(2 - self.in_place)
        return seconds

    def _wait_until_freed(self, slots: int) -> None:
        """Wait until the other has compared what was put: that would disturb what follows."""
        inbox = self.endpoint.inbox
        while True:
            taken = [r for r in (inbox.reserve(self.other) for _ in range(slots)) if r is not None]
            for reservation in taken:
                inbox.cancel(reservation)
            if len(taken) == slots:
                return
            time.sleep(1e-4)

    def _average(self, theirs: np.ndarray, reply: np.ndarray | None) -> float:
        """Average a private model with the other's publication where it lies."""
        y = self.private
        y.fill(1.0)
        start = self.start()
        pair_average(y, (), theirs, 0.5, reply)
        seconds = time.perf_counter() - start
        # All numbers are multiples of 1/2 below 2**16: the way back to the other's model is exact.
        y *= 2
        y -= 1
        self.check(y, 0)
        if reply is not None:
            np.multiply(reply, -2, out=y)
            y += 1
            self.check(y, 0)
        return seconds
