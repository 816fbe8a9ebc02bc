"""What algorithms use of an endpoint besides exchanges, on real windows. Run by `test_endpoint`.

Each case is a function of a fresh endpoint on ranks that are all neighbours; all ranks run them
all, on each path that is named.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from mpi_dasgd import topology
from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.config.schema import TransportConfig
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
from tests.support.mpi_ranks import parallel_assert

COMM = MPI.COMM_WORLD
OTHERS = [rank for rank in range(COMM.size) if rank != COMM.rank]
LAYOUT = Layout(
    codec=0, elements=2000, payload_dtype=np.dtype(np.float64), payload_items=2000, trailer_words=3
)
VERSIONS, MESSAGES = 60, 60
LIMIT = 20.0  # seconds for anything to happen


def wait(done: Callable[[], bool], what: str) -> None:
    """Wait until something is done, or fail."""
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline, f"rank {COMM.rank}: no {what}"
        time.sleep(1e-4)


def write(message: Message, value: int) -> None:
    """Fill a message with what `whole` knows."""
    message.payload[:] = value + COMM.rank / 64
    message.trailer[:] = [value, -value, COMM.rank]
    message.stamp(rank=COMM.rank, step=value, time_ns=0)


def whole(message: Message, rank: int) -> int:
    """Return the value of a message of `rank`; -1 if not all of it is of one value."""
    value = message.header.step
    good = (message.payload == value + rank / 64).all() and message.header.rank == rank
    return value if good and message.trailer.tolist() == [value, -value, rank] else -1


def publish(endpoint: RmaEndpoint, value: int) -> None:
    message = endpoint.publication.reserve()
    assert message is not None
    write(message, value)
    endpoint.publication.publish()


def newest_version(endpoint: RmaEndpoint) -> bool:
    """A publication that is read is whole, never older than the one before, in the end the last."""
    seen = dict.fromkeys(OTHERS, 0)
    good = True

    def read(rank: int) -> None:
        nonlocal good
        request = endpoint.read(rank)
        wait(request.test, f"publication of {rank}")
        if request.message is None:
            good &= seen[rank] == 0
            return
        value = whole(request.message, rank)
        good &= value >= seen[rank]
        seen[rank] = value

    for rank in OTHERS:
        read(rank)
    good &= not any(seen.values())  # nothing was published yet
    COMM.Barrier()
    for value in range(1, VERSIONS + 1):
        publish(endpoint, value)
        read(OTHERS[value % len(OTHERS)])
    COMM.Barrier()
    for rank in OTHERS:
        read(rank)
    return good and set(seen.values()) == {VERSIONS}


def given_version(endpoint: RmaEndpoint) -> bool:
    """A given version settles once it is published, whichever rank comes first, and is that one."""
    good = True
    for value in range(1, VERSIONS + 1):
        time.sleep(1e-3 * ((value + COMM.rank) % 3))
        publish(endpoint, value)
        for rank in OTHERS:
            request = endpoint.read(rank, value)
            wait(request.test, f"version {value} of {rank}")
            good &= request.message is not None and whole(request.message, rank) == value
    return good


def messages(endpoint: RmaEndpoint) -> bool:
    """Messages arrive exactly once and in order; a full inbox is reported, and no rank waits."""
    sent, received = dict.fromkeys(OTHERS, 0), defaultdict(list)

    def send(rank: int) -> bool:
        buffer = endpoint.acquire_send_buffer(rank)
        if buffer is None:
            return False
        write(buffer.message, sent[rank])
        endpoint.send(buffer)
        sent[rank] += 1
        return True

    def receive() -> None:
        for incoming in endpoint.inbox.receive():
            received[incoming.sender].append(whole(incoming.message, incoming.sender))
            endpoint.inbox.free(incoming)

    for rank in OTHERS:
        while send(rank):  # no rank receives: the inbox, or the send buffer, fills up
            assert sent[rank] < MESSAGES, "a full inbox took more"
    filled = max(sent.values()) <= 4 + 1  # slots of an inbox, and what waits for one
    COMM.Barrier()
    deadline = time.monotonic() + LIMIT
    while min(sent.values()) < MESSAGES:
        assert time.monotonic() < deadline, f"rank {COMM.rank}: sent {sent}"
        if not sum(send(rank) for rank in OTHERS if sent[rank] < MESSAGES):
            time.sleep(1e-4)
        receive()

    def complete() -> bool:
        receive()
        return endpoint.is_flushed() and all(len(received[r]) == MESSAGES for r in OTHERS)

    wait(complete, f"all messages: { ({rank: len(got) for rank, got in received.items()}) }")
    COMM.Barrier()
    receive()
    return filled and all(received[rank] == list(range(MESSAGES)) for rank in OTHERS)


def conditions(endpoint: RmaEndpoint) -> bool:
    """A condition on words is complete when they change, not before."""
    everyone = range(COMM.size)
    counted = endpoint.wait_until(lambda: endpoint.gradients() == COMM.size, everyone)
    arrived = endpoint.wait_until(lambda: endpoint.inbox.has_messages)
    good = not counted.test() and not arrived.test()
    COMM.Barrier()
    endpoint.report_gradients(1)
    wait(counted.test, "gradients")
    buffer = endpoint.acquire_send_buffer(OTHERS[0])
    assert buffer is not None
    write(buffer.message, 0)
    endpoint.send(buffer)
    if COMM.rank < 2:  # rank 0 is the first other of all but itself
        wait(arrived.test, "message")
    wait(endpoint.is_flushed, "delivery")
    return good


def gradients(endpoint: RmaEndpoint) -> bool:
    """Each rank's newest count is known to all."""
    own = 10 * (COMM.rank + 1)
    for count in (1, own - 1, own):
        endpoint.report_gradients(count)
    expected = [10 * (rank + 1) for rank in range(COMM.size)]
    wait(lambda: endpoint.gradients() == sum(expected), "sum of the counts")
    return [endpoint.gradients_of(rank) for rank in range(COMM.size)] == expected


def main() -> None:
    """Run all cases on each path."""
    graph = topology.build("complete", COMM.size)
    for path in sys.argv[1:]:
        for case in (newest_version, given_version, messages, conditions, gradients):
            endpoint = RmaEndpoint(COMM, LAYOUT, graph, TransportConfig(mode=path))
            COMM.Barrier()
            good = case(endpoint)
            endpoint.close()
            parallel_assert(COMM, good, f"{case.__name__}, {path}")


if __name__ == "__main__":
    main()
