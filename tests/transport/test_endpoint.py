"""What algorithms use of an endpoint besides exchanges: reads, messages, conditions, counts."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_dasgd import topology
from mpi_dasgd.codecs import Layout
from mpi_dasgd.transport.endpoint import ReadRequest
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import ROOT, rank_counts, run_ranks

PROGRAM = ROOT / "tests" / "programs" / "endpoint.py"
LAYOUT = Layout(
    codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8, trailer_words=2
)


def make_endpoints(inbox_slots: int = 4, **options: float) -> list[VirtualEndpoint]:
    network = Network(
        Clock(),
        SharedMemory(LAYOUT, 3, inbox_slots=inbox_slots),
        topology.build("complete", 3),
        **options,
    )
    return [VirtualEndpoint(network, rank) for rank in range(3)]


def clock_of(endpoint: VirtualEndpoint) -> Clock:
    return endpoint._network.clock


def publish(endpoint: VirtualEndpoint, value: int) -> None:
    message = endpoint.publication.reserve()
    assert message is not None
    message.payload[:] = value
    message.trailer[:] = [value, -value]
    message.stamp(rank=endpoint.rank, step=value, time_ns=0)
    endpoint.publication.publish()


def value_of(request: ReadRequest) -> int:
    """Value of a publication, all parts of which must agree."""
    message = request.message
    assert request.is_settled and message is not None
    value = message.header.step
    assert (message.payload == value).all() and message.trailer.tolist() == [value, -value]
    return value


def send(endpoint: VirtualEndpoint, rank: int, value: int) -> bool:
    buffer = endpoint.acquire_send_buffer(rank)
    if buffer is None:
        return False
    buffer.message.payload[:] = value
    buffer.message.stamp(rank=endpoint.rank, step=value, time_ns=0)
    endpoint.send(buffer)
    return True


def receive(endpoint: VirtualEndpoint) -> list[tuple[int, int]]:
    """Sender and value of all messages that have arrived; frees them."""
    messages = endpoint.inbox.receive()
    values = [(received.sender, received.message.header.step) for received in messages]
    for received in messages:
        endpoint.inbox.free(received)
    return values


def advance(endpoint: VirtualEndpoint, until: float) -> None:
    """Let virtual time pass."""
    clock = clock_of(endpoint)
    clock.after(until - clock.now, lambda: None)
    while clock.now < until:
        clock.advance()


# Reads


def test_a_read_is_a_copy_of_the_newest() -> None:
    owner, reader, other = make_endpoints()
    nothing = reader.read(0)
    assert nothing.test() and nothing.message is None
    publish(owner, 1)
    publish(owner, 2)
    request = reader.read(0)
    assert value_of(request) == 2
    for value in range(3, 12):
        publish(owner, value)  # through all slots
    assert value_of(request) == 2
    assert value_of(other.read(0)) == value_of(reader.read(0)) == 11
    assert reader.counters.bytes_received == 2 * LAYOUT.nbytes


def test_a_claim_does_not_hide_a_publication() -> None:
    owner, reader, other = make_endpoints()
    publish(owner, 1)
    assert other.publication.claim(0) is not None
    assert value_of(reader.read(0)) == 1


def test_a_read_takes_a_latency_and_a_transfer() -> None:
    owner, reader, _ = make_endpoints(latency=1.0, bandwidth=LAYOUT.nbytes / 2)
    publish(owner, 1)
    request = reader.read(0)
    advance(reader, 0.9)
    publish(owner, 2)  # before the request arrives
    advance(reader, 1.1)
    publish(owner, 3)
    advance(reader, 3.9)
    assert not request.test()
    advance(reader, 4.1)  # a latency there; a latency and two for the bytes back
    assert value_of(request) == 2


@pytest.mark.parametrize("latency", [0.0, 1.0])
def test_a_read_of_a_version_settles_when_it_is_published(latency: float) -> None:
    owner, reader, _ = make_endpoints(latency=latency)
    woken: list[int] = []
    first = reader.read(0, 1)
    second = reader.read(0, 2)
    clock_of(reader).after(0.0, lambda: None)
    assert not first.test()
    reader._network.notify(second, lambda: woken.append(value_of(second)))
    publish(owner, 1)
    advance(reader, 5.0)
    assert value_of(first) == 1 and not second.test() and not woken
    publish(owner, 2)
    assert value_of(first) == 1, "the version before is not overwritten yet"
    advance(reader, 10.0)
    assert value_of(second) == 2 and woken == [2]
    late = reader.read(0, 2)
    advance(reader, 15.0)
    assert value_of(late) == 2


def test_reading_an_overwritten_version_is_an_error() -> None:
    owner, reader, _ = make_endpoints()
    for value in range(1, 6):
        publish(owner, value)
    with pytest.raises(RuntimeError, match="version 1 of rank 0 was overwritten"):
        reader.read(0, 1)


# Messages


def test_a_full_inbox_refuses_and_loses_nothing() -> None:
    receiver, sender, other = make_endpoints(inbox_slots=3)
    assert send(sender, 0, 1) and send(other, 0, 5) and send(sender, 0, 2)
    assert not send(sender, 0, 3) and not send(other, 0, 6)
    assert (sender.counters.inbox_full, other.counters.inbox_full) == (1, 1)
    assert sorted(receive(receiver)) == [(1, 1), (1, 2), (2, 5)]
    assert send(sender, 0, 3)
    assert receive(receiver) == [(1, 3)]
    assert receive(receiver) == []
    assert sender.counters.messages == 3 and receiver.counters.absorbed == 4
    assert sender.counters.bytes_sent == 3 * LAYOUT.nbytes


def test_messages_arrive_in_order_after_their_time() -> None:
    receiver, sender, other = make_endpoints(latency=1.0)
    got: list[tuple[int, int]] = []
    for value in range(20):
        while not send(sender, 0, value):
            assert not sender.is_flushed() or receiver.inbox.has_messages
            advance(sender, clock_of(sender).now + 0.5)
            got += receive(receiver)
        send(other, 0, 100 + value)  # takes a slot, if one is free
    assert not sender.is_flushed() and receive(receiver) == []
    advance(sender, clock_of(sender).now + 2.0)
    assert sender.is_flushed()
    got += receive(receiver)
    assert [value for rank, value in got if rank == 1] == list(range(20))
    others = [value for rank, value in got if rank == 2]
    assert others == sorted(set(others)) and len(others) == other.counters.messages


def test_a_buffer_that_was_not_sent_does_not_arrive() -> None:
    receiver, sender, _ = make_endpoints()
    buffer = sender.acquire_send_buffer(0)
    assert buffer is not None
    assert not receiver.inbox.has_messages and receive(receiver) == []
    assert send(sender, 0, 2) and receive(receiver) == [(1, 2)]


# Conditions


def test_a_wait_ends_once_when_a_word_makes_its_condition_true() -> None:
    receiver, sender, _ = make_endpoints(latency=1.0)
    woken: list[float] = []
    message_arrived = receiver.wait_until(lambda: receiver.inbox.has_messages)
    assert not message_arrived.test()
    receiver._network.notify(message_arrived, lambda: woken.append(clock_of(receiver).now))
    publish(receiver, 1)  # changes a word that the condition does not depend on
    advance(receiver, 3.0)
    assert not woken
    assert send(sender, 0, 1) and send(sender, 0, 2)
    assert not message_arrived.test()
    advance(receiver, 9.0)
    assert message_arrived.test() and woken == [4.0]


def test_a_wait_for_words_of_others() -> None:
    waiter, one, two = make_endpoints()
    woken: list[str] = []
    both = waiter.wait_until(
        lambda: all(waiter.publication.locate(rank, 1) is not None for rank in (1, 2)), (1, 2)
    )
    waiter._network.notify(both, lambda: woken.append("both"))
    publish(one, 1)
    advance(waiter, 1.0)
    assert not both.test() and not woken
    publish(two, 1)
    assert both.test()
    advance(waiter, 2.0)
    assert woken == ["both"]


def test_a_wait_whose_condition_holds_already() -> None:
    waiter = make_endpoints()[0]
    woken: list[str] = []
    nothing = waiter.wait_until(lambda: True)
    assert nothing.test()
    waiter._network.notify(nothing, lambda: woken.append("now"))
    assert not woken, "not before the call returns"
    advance(waiter, 0.1)
    assert woken == ["now"]


# Counts


def test_gradients_are_counted_over_all_ranks() -> None:
    endpoints = make_endpoints()
    assert [endpoint.gradients() for endpoint in endpoints] == [0, 0, 0]
    for endpoint, counts in zip(endpoints, ((1, 2, 3), (1,), (5, 7)), strict=True):
        for count in counts:
            endpoint.report_gradients(count)
    assert [endpoint.gradients() for endpoint in endpoints] == [11, 11, 11]
    assert [endpoints[0].gradients_of(rank) for rank in range(3)] == [3, 1, 7]


# Real windows


def test_on_windows(mpi: str) -> None:
    """Every case of the program, in place and by Get and Put."""
    run_ranks(*rank_counts(3), PROGRAM, "auto", "rma", mpi=mpi)


def test_between_hosts(two_hosts: Hosts) -> None:
    """With a neighbour on the own host and two on the other."""
    run_ranks(4, PROGRAM, "auto", hosts=two_hosts)
