"""Publication and Inbox in one process, one transition at a time."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_dasgd import topology
from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.transport.control_words import CLAIMED, FREE, HEAD, pack_slot_word
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import claim_and_reserve
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network

SLOTS = 4
LAYOUT = Layout(codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8)


class Rank:
    """Publication, inbox and counters of one rank."""

    def __init__(self, memory: SharedMemory, rank: int, max_claims: int = 2) -> None:
        self.memory = memory
        self.rank = rank
        self.counters = Counters()
        shared = memory, memory, memory.word_map, rank, self.counters
        self.publication = Publication(*shared, max_claims)
        self.inbox = Inbox(*shared)

    def publish(self, value: float) -> bool:
        """Publish a model of equal elements; return whether there was a slot."""
        message = self.publication.reserve()
        if message is not None:
            message.payload[:] = value
            self.publication.publish()
        return message is not None

    def send(self, receiver: int, value: float) -> bool:
        """Send a message of equal elements; return whether there was a slot."""
        reservation = self.inbox.reserve(receiver)
        if reservation is None:
            return False
        message = self.inbox.view_of(reservation)
        assert message is not None
        message.payload[:] = value
        self.inbox.send(reservation, message)
        return True

    def receive(self) -> list[tuple[int, float]]:
        """Return sender and first element of all messages that have arrived, and free them."""
        messages = self.inbox.receive()
        values = [(a.sender, float(a.message.payload[0])) for a in messages]
        for received in messages:
            self.inbox.free(received)
        return values

    def words(self) -> list[int]:
        """All words of this rank."""
        return [self.memory.read(self.rank, index) for index in range(self.memory.word_map.count)]


@pytest.fixture
def memory() -> SharedMemory:
    return SharedMemory(LAYOUT, 3)


@pytest.fixture
def ranks(memory: SharedMemory) -> list[Rank]:
    return [Rank(memory, rank) for rank in range(3)]


def staging() -> Message:
    return Message(np.zeros(LAYOUT.nbytes, np.uint8), LAYOUT)


# Publication


def test_nothing_to_claim_or_read_before_the_first_version(ranks: list[Rank]) -> None:
    reader = ranks[1]
    assert reader.publication.claim(0) is None
    assert not reader.publication.read(0, staging())
    assert reader.counters == Counters()  # no rank has taken anything


def test_a_version_serves_one_exchange(ranks: list[Rank]) -> None:
    owner, first, second = ranks
    owner.publish(1.0)
    claim = first.publication.claim(0)
    assert claim is not None and (claim.rank, claim.version) == (0, 1)
    assert second.publication.claim(0) is None
    assert first.publication.claim(0) is None
    first.publication.release(claim)
    assert second.publication.claim(0) is None, "not after its release either"
    assert (first.counters.claims_lost, second.counters.claims_lost) == (1, 2)
    owner.publish(2.0)
    claim = second.publication.claim(0)
    assert claim is not None and claim.version == 2


def test_a_claimed_version_stays_where_it_is(memory: SharedMemory, ranks: list[Rank]) -> None:
    owner, reader, _ = ranks
    owner.publish(1.0)
    claim = reader.publication.claim(0)
    assert claim is not None
    for value in range(2, 20):
        assert owner.publish(value)
    assert np.all(memory.view(0, claim.slot).payload == 1.0)
    reader.publication.release(claim)
    for value in range(20, 30):
        assert owner.publish(value)
    assert owner.counters.publications == 29


def test_published_and_claimed_slots_are_never_written(memory: SharedMemory) -> None:
    owner, reader = Rank(memory, 0, max_claims=3), Rank(memory, 1)
    claims = []
    for value in range(3):
        owner.publish(value)
        claims.append(reader.publication.claim(0))
    contents = [memory.view(0, claim.slot).payload[0] for claim in claims if claim is not None]
    assert contents == [0.0, 1.0, 2.0]
    assert len({claim.slot for claim in claims if claim is not None}) == 3


@pytest.mark.parametrize("max_claims", [1, 2])
def test_no_more_versions_are_held_than_allowed(memory: SharedMemory, max_claims: int) -> None:
    owner, reader = Rank(memory, 0, max_claims), Rank(memory, 1)
    claims = []
    for value in range(max_claims):
        assert owner.publish(value)
        claims.append(reader.publication.claim(0))
    assert owner.publication.claims == max_claims
    for skipped in range(1, 4):
        assert owner.publication.reserve() is None
        assert owner.counters.publications_skipped == skipped
    assert owner.counters.publications == max_claims
    assert claims[0] is not None
    reader.publication.release(claims[0])
    assert owner.publication.claims == max_claims - 1
    assert owner.publish(9.0)


def test_no_free_slot_skips_the_publication() -> None:
    memory = SharedMemory(LAYOUT, 3, publication_slots=3)
    owner, reader = Rank(memory, 0, max_claims=99), Rank(memory, 1)
    for value in range(3):
        assert owner.publish(value)
        assert reader.publication.claim(0) is not None
    assert not owner.publish(3.0)
    assert owner.counters.publications_skipped == 1


def test_publish_needs_a_reservation(ranks: list[Rank]) -> None:
    owner = ranks[0]
    with pytest.raises(AssertionError, match="without reserve"):
        owner.publication.publish()
    owner.publish(1.0)
    with pytest.raises(AssertionError, match="without reserve"):
        owner.publication.publish()


def test_reserving_again_costs_no_slot(ranks: list[Rank]) -> None:
    owner, reader, _ = ranks
    for _ in range(3 * SLOTS):
        assert owner.publication.reserve() is owner.publication.reserve()
    assert reader.publication.claim(0) is None
    assert owner.publish(1.0)


def test_forget_takes_back_what_a_dead_rank_held(ranks: list[Rank]) -> None:
    owner, dead, alive = ranks
    owner.publish(1.0)
    old = dead.publication.claim(0)
    owner.publish(2.0)
    kept = alive.publication.claim(0)
    owner.publish(3.0)
    assert owner.publication.reserve() is None
    owner.publication.reclaim_from(1)
    assert owner.publication.claims == 1, "the claim of a rank that lives is kept"
    assert owner.publish(4.0)
    newest = dead.publication.claim(0)
    owner.publication.reclaim_from(1)
    assert owner.publication.claims == 1
    assert owner.publish(5.0)
    # If it was not dead after all, its late release must not hurt.
    assert old is not None and newest is not None and kept is not None
    before = owner.words()
    dead.publication.release(old)
    dead.publication.release(newest)
    assert owner.words() == before
    alive.publication.release(kept)
    assert owner.publication.claims == 0
    owner.publication.reclaim_from(1)
    assert owner.publish(6.0)


def test_read_copies_the_newest_claimed_or_not(ranks: list[Rank]) -> None:
    owner, reader, other = ranks
    out = staging()
    owner.publish(1.0)
    assert reader.publication.read(0, out) and np.all(out.payload == 1.0)
    assert other.publication.claim(0) is not None
    assert reader.publication.read(0, out)
    owner.publish(2.0)
    assert reader.publication.read(0, out) and np.all(out.payload == 2.0)
    assert owner.publication.read(0, out), "the own one too"
    assert reader.counters.torn_reads == 0


@pytest.mark.parametrize(("replacements", "whole"), [(1, True), (7, True), (8, False)])
def test_read_tries_again_if_the_owner_overtakes(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch, replacements: int, whole: bool
) -> None:
    owner, reader, _ = ranks
    owner.publish(0.0)
    left = [replacements]

    def sync() -> None:
        if left[0]:  # after the copy, before the second read
            left[0] -= 1
            monkeypatch.setattr(type(reader.memory), "fence", lambda self: None)
            for _ in range(2):
                owner.publish(float(owner.counters.publications))
            monkeypatch.setattr(type(reader.memory), "fence", lambda self: sync())

    monkeypatch.setattr(type(reader.memory), "fence", lambda self: sync())
    out = staging()
    assert reader.publication.read(0, out) is whole
    assert reader.counters.torn_reads == replacements
    if whole:
        assert np.all(out.payload == owner.counters.publications - 1)


def test_a_replaced_version_is_whole_while_its_slot_is_not_written_again(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader, other = ranks
    owner.publish(1.0)
    assert other.publication.claim(0) is not None  # pins the slot

    def sync(memory: SharedMemory) -> None:
        monkeypatch.setattr(SharedMemory, "fence", lambda self: None)
        owner.publish(2.0)

    monkeypatch.setattr(SharedMemory, "fence", sync)
    out = staging()
    assert reader.publication.read(0, out) and np.all(out.payload == 1.0)
    assert reader.counters.torn_reads == 0


# Inbox


def test_messages_arrive_once_and_in_order(ranks: list[Rank]) -> None:
    receiver, one, two = ranks
    assert receiver.receive() == []
    for value in (1.0, 2.0):
        assert one.send(0, value) and two.send(0, 10 * value)
    assert receiver.receive() == [(1, 1.0), (1, 2.0), (2, 10.0), (2, 20.0)]
    assert receiver.receive() == []
    assert receiver.counters.absorbed == 4
    assert (one.counters.messages, one.counters.bytes_sent) == (2, 2 * LAYOUT.nbytes)


def test_a_message_can_be_put_from_a_staging_area(ranks: list[Rank]) -> None:
    receiver, sender, _ = ranks
    message = staging()
    for value in (1.0, 2.0):
        message.payload[:] = value
        reservation = sender.inbox.reserve(0)
        assert reservation is not None
        sender.inbox.send(reservation, message)
    assert receiver.receive() == [(1, 1.0), (1, 2.0)]


def test_a_full_inbox_refuses(ranks: list[Rank]) -> None:
    receiver, one, two = ranks
    for value in range(SLOTS):
        assert one.send(0, value)
    assert one.inbox.reserve(0) is None
    assert two.inbox.reserve(0) is None
    assert (one.counters.inbox_full, two.counters.inbox_full) == (1, 1)
    messages = receiver.inbox.receive()
    assert two.inbox.reserve(0) is None, "received is not freed"
    receiver.inbox.free(messages[2])
    assert two.send(0, 7.0) and not two.send(0, 8.0)
    assert receiver.inbox.receive()[0].sender == 2


def test_a_message_is_received_once_and_freed_once(ranks: list[Rank]) -> None:
    receiver, sender, _ = ranks
    sender.send(0, 1.0)
    (received,) = receiver.inbox.receive()
    assert receiver.inbox.receive() == [], "not again before it is freed"
    receiver.inbox.free(received)
    with pytest.raises(AssertionError, match="only the owner frees"):
        receiver.inbox.free(received)


def test_a_reserved_or_cancelled_slot_holds_no_message(ranks: list[Rank]) -> None:
    receiver, sender, _ = ranks
    for value in range(3 * SLOTS):
        cancelled, reserved = sender.inbox.reserve(0), sender.inbox.reserve(0)
        assert cancelled is not None and reserved is not None
        message = sender.inbox.view_of(cancelled)
        assert message is not None
        message.payload[:] = -1.0
        assert receiver.receive() == []
        sender.inbox.cancel(cancelled)
        message = sender.inbox.view_of(reserved)
        assert message is not None
        message.payload[:] = value
        sender.inbox.send(reserved, message)
        assert receiver.receive() == [(1, float(value))]
    assert sender.counters.messages == 3 * SLOTS
    assert [receiver.memory.read(0, i) for i in receiver.memory.word_map.inbox] == [
        pack_slot_word(FREE)
    ] * 4


def test_order_is_that_of_sending_not_of_slots(ranks: list[Rank]) -> None:
    receiver, sender, _ = ranks
    reservations = [sender.inbox.reserve(0) for _ in range(SLOTS)]
    for value, reservation in enumerate(reversed(reservations)):
        assert reservation is not None
        message = sender.inbox.view_of(reservation)
        assert message is not None
        message.payload[:] = value
        sender.inbox.send(reservation, message)
    assert receiver.receive() == [(1, float(value)) for value in range(SLOTS)]


def test_a_message_waits_for_an_earlier_one_that_was_not_seen(
    memory: SharedMemory, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, sender, _ = ranks
    second_slot, first_slot = sender.inbox.reserve(0), sender.inbox.reserve(0)
    assert first_slot is not None and second_slot is not None
    if first_slot.slot > second_slot.slot:  # the scan goes upwards
        first_slot, second_slot = second_slot, first_slot
    real = SharedMemory.read

    def read(self: SharedMemory, rank: int, index: int) -> int:
        value = real(self, rank, index)
        if index == self.word_map.inbox[first_slot.slot]:  # seen empty; then both are sent
            monkeypatch.setattr(SharedMemory, "read", real)
            for slot in (first_slot, second_slot):
                sender.inbox.send(slot, memory.view(0, SLOTS + slot.slot))
        return value

    monkeypatch.setattr(SharedMemory, "read", read)
    assert receiver.inbox.receive() == []
    assert [sender for sender, _ in receiver.receive()] == [1, 1]


def test_forget_takes_back_the_slots_that_a_dead_rank_reserved(ranks: list[Rank]) -> None:
    receiver, dead, alive = ranks
    dead.send(0, 1.0)
    assert alive.inbox.reserve(0) is not None
    assert dead.inbox.reserve(0) is not None and dead.inbox.reserve(0) is not None
    assert alive.inbox.reserve(0) is None
    receiver.inbox.reclaim_from(1)
    assert receiver.receive() == [(1, 1.0)], "what it sent before is valid"
    assert sum(alive.inbox.reserve(0) is not None for _ in range(SLOTS)) == 3


def test_a_rank_given_up_by_mistake_can_send_again(ranks: list[Rank]) -> None:
    receiver, sender, other = ranks
    late = sender.inbox.reserve(0)
    assert late is not None
    receiver.inbox.reclaim_from(1)
    sender.inbox.send(late, staging())
    assert sender.counters.messages == 0 and sender.counters.bytes_sent == 0
    assert receiver.receive() == []
    for value in range(3 * SLOTS):  # would fill the inbox for good if they waited for the lost one
        assert sender.send(0, value) and other.send(0, -value)
        assert receiver.receive() == [(1, value), (2, -value)]


# Both


@pytest.mark.parametrize("full", [False, True])
def test_meet_gets_both_or_neither(ranks: list[Rank], full: bool) -> None:
    owner, reader, other = ranks
    owner.publish(1.0)
    if full:
        while other.send(0, 0.0):
            pass
    met = claim_and_reserve(reader.publication, reader.inbox, 0)
    assert (met is None) is full
    assert owner.publication.claims == (0 if full else 1)
    again = claim_and_reserve(reader.publication, reader.inbox, 0)
    assert again is None
    claimed = [v for v in owner.words()[HEAD + 1 :] if v & 3 == CLAIMED]
    assert len(claimed) == (0 if full else 2)


@pytest.mark.parametrize("latency", [0.0, 1.0])
def test_pairing_tries_candidates_in_order(latency: float) -> None:
    network = Network(
        Clock(), SharedMemory(LAYOUT, 4), topology.build("complete", 4), latency=latency
    )
    endpoints = [VirtualEndpoint(network, rank) for rank in range(4)]
    for end in endpoints:
        assert end.publication.reserve() is not None
        end.publication.publish()
    assert claim_and_reserve(endpoints[3].publication, endpoints[3].inbox, 1) is not None
    request = endpoints[0].begin_exchange([1, 2, 3])
    assert request.is_settled is (latency == 0)
    while network.clock.advance():
        pass
    assert request.test() and request.failed_attempts == 1
    assert request.claim is not None and request.claim.rank == 2
    again = endpoints[3].begin_exchange([1, 2])
    while network.clock.advance():
        pass
    assert again.is_settled and again.failed_attempts == 2
    assert again.partner_model is None and again.partner_delta is None
    endpoints[3].abort_exchange(again)
    endpoints[0].commit_exchange(request)
    while network.clock.advance():
        pass
    assert endpoints[0].is_flushed()
    assert [received.sender for received in endpoints[2].inbox.receive()] == [0]
    assert endpoints[2].publication.claims == 0
