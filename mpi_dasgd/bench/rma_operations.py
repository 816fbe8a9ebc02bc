"""Operations that `bench rma` times on the transport over MPI, with a check of every payload."""

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

# Rounds beside the warm-up.
_MIN_ROUNDS, _MAX_ROUNDS = 7, 500
# Bytes that are read between two operations, so that each finds the caches cold.
_CACHE_BYTES = 64 * 2**20
# Float32 elements per page of 4 KiB; one element of each page changes in every round.
_PAGE = 1024


class Peer:
    """One of the two ranks that exchange: its arrays, and the operations that are timed.

    Args:
        endpoint: transport of this rank.
        codec: codec of the messages.
        partner: the other rank.

    Attributes:
        in_place: whether the partner's memory is mapped here, so that no copy is needed.
        wrong_payloads: number of payloads that differed from what was sent.
        round: number of the round, which the payloads contain.
    """

    def __init__(self, endpoint: RmaEndpoint, codec: NoCodec, partner: int) -> None:
        elements = codec.layout.elements
        self.endpoint, self.codec, self.partner = endpoint, codec, partner
        self.in_place = endpoint.is_local(partner)
        self.pattern = np.arange(elements, dtype=np.float32) % 65521
        self.x = self.pattern.copy()
        self.private = np.zeros_like(self.x)
        self.out = Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)
        self.cache_filler = np.zeros(_CACHE_BYTES // 8)
        self.wrong_payloads = 0
        self.round = 0

    def start(self) -> float:
        """Fill the caches with other data and return the time, in seconds."""
        self.cache_filler.sum()
        return time.perf_counter()

    def check(self, payload: np.ndarray, number: int) -> None:
        """Compare a payload with the model that was sent in a round, and count it if it differs.

        Args:
            payload: float32, shape (elements,).
            number: number of the round.
        """
        self.pattern[::_PAGE] = number
        self.wrong_payloads += not np.array_equal(payload, self.pattern)

    def receive(self) -> None:
        """Receive the messages in the inbox, check their payloads and free their slots."""
        for received in self.endpoint.inbox.receive():
            self.check(received.message.payload, received.message.header.step)
            self.endpoint.inbox.free(received)

    def publish(self, number: int) -> float:
        """Encode and publish the model of round `number`, and return the seconds that took."""
        self.x[::_PAGE] = number
        start = self.start()
        message = self.endpoint.publication.reserve()
        assert message is not None, "no rank claims publications of this rank"
        self.codec.encode(self.x, message)
        message.stamp(rank=self.endpoint.rank, step=number, time_ns=self.endpoint.time_ns())
        self.endpoint.publication.publish()
        seconds = time.perf_counter() - start
        self.check(message.payload, number)
        return seconds

    def measure(self, seconds: float, warm_up: int) -> dict[str, list[float]]:
        """Run rounds of all operations until the time is over.

        Args:
            seconds: time to spend.
            warm_up: additional rounds, whose samples come first.

        Returns:
            The seconds of each operation, one sample per round, by the name of the operation.
        """
        operations: dict[str, Callable[[], float]] = {
            "memcpy": self._memcpy,
            "publish": lambda: self.publish(self.round),
            "read" if self.in_place else "get": self._read,
            "put": self._put,
        }
        request = None
        if self.in_place:
            request = self.endpoint.begin_exchange([self.partner])
            assert request.partner_model is not None and request.partner_delta is not None
            model, delta = request.partner_model.payload, request.partner_delta.payload
            operations["average"] = lambda: self._average(model, None)
            operations["exchange"] = lambda: self._average(model, delta)
        samples: dict[str, list[float]] = {name: [] for name in operations}
        order = list(operations)
        shuffle = random.Random(1).shuffle
        min_rounds, max_rounds = warm_up + _MIN_ROUNDS, warm_up + _MAX_ROUNDS
        end = time.perf_counter() + seconds
        while self.round < min_rounds or (self.round < max_rounds and time.perf_counter() < end):
            self.round += 1
            self.x[::_PAGE] = self.round
            shuffle(order)
            for name in order:
                samples[name].append(operations[name]())
        if request is not None:
            self.endpoint.abort_exchange(request)
        return samples

    def _memcpy(self) -> float:
        destination, source, nbytes = self.private.ctypes.data, self.x.ctypes.data, self.x.nbytes
        start = self.start()
        ctypes.memmove(destination, source, nbytes)
        seconds = time.perf_counter() - start
        self.check(self.private, self.round)
        return seconds

    def _read(self) -> float:
        """Copy the partner's newest publication, with the version checks that find a torn copy."""
        self.out.payload[::_PAGE] = -1
        start = self.start()
        is_whole = self.endpoint.publication.read(self.partner, self.out)
        seconds = time.perf_counter() - start
        assert is_whole, "the partner does not replace the publication"
        self.check(self.out.payload, 0)
        return seconds

    def _put(self) -> float:
        """Send a message to the partner: encode it in place, or put one that is encoded already."""
        inbox, rank = self.endpoint.inbox, self.endpoint.rank
        if not self.in_place:
            self.codec.encode(self.x, self.out)
            self.out.stamp(rank=rank, step=self.round, time_ns=self.endpoint.time_ns())
        start = self.start()
        reservation = inbox.reserve(self.partner)
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
        """Wait until the partner has checked and freed all messages, which would disturb timings.

        Args:
            slots: slots of the partner's inbox that are not reserved throughout.
        """
        inbox = self.endpoint.inbox
        while True:
            attempts = [inbox.reserve(self.partner) for _ in range(slots)]
            reservations = [reservation for reservation in attempts if reservation is not None]
            for reservation in reservations:
                inbox.cancel(reservation)
            if len(reservations) == slots:
                return
            time.sleep(1e-4)

    def _average(self, partner_model: np.ndarray, reply_delta: np.ndarray | None) -> float:
        """Average a private model with the partner's publication, without copying it.

        Args:
            partner_model: payload of the publication, float32, shape (elements,).
            reply_delta: receives the partner's delta, float32, shape (elements,); None for none.
        """
        y = self.private
        y.fill(1.0)
        start = self.start()
        pair_average(y, (), partner_model, 0.5, reply_delta)
        seconds = time.perf_counter() - start
        # All numbers are multiples of 1/2 below 2**16: the partner's model is recovered exactly.
        y *= 2
        y -= 1
        self.check(y, 0)
        if reply_delta is not None:
            np.multiply(reply_delta, -2, out=y)
            y += 1
            self.check(y, 0)
        return seconds
