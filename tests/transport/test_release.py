"""Publication and Inbox where swaps that give memory away are made late: one swap at a time."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from mpi_dasgd.codecs import Message
from mpi_dasgd.errors import DeviceFailed
from mpi_dasgd.transport.control_words import CLAIMED, FREE, HEAD, READY, pack_slot_word
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import claim_and_reserve
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.release import Immediate, Synced, await_release
from mpi_dasgd.transport.virtual.memory import SharedMemory
from tests.transport.test_publication_inbox import LAYOUT, Rank

SLOTS = 4


class Scripted:
    """A release whose swaps are made when a test says so."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self.asked: deque[tuple[int, int, int, int, bool]] = deque()

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> None:
        self.asked.append((rank, index, expected, new, required))

    def flush(self) -> None:
        """Do nothing: the test makes the swaps."""

    @property
    def is_pending(self) -> bool:
        return bool(self.asked)

    def make(self, count: int | None = None) -> None:
        """Make the next swaps."""
        for _ in range(len(self.asked) if count is None else count):
            rank, index, expected, new, required = self.asked.popleft()
            if not self._memory.swap(rank, index, expected, new) and required:
                raise RuntimeError("the protocol is broken")


class LateRank(Rank):
    """A rank on a device that is late."""

    def __init__(self, memory: SharedMemory, rank: int, max_claims: int = 2) -> None:
        super().__init__(memory, rank)
        self.release = Scripted(memory)
        self.counters = Counters()
        shared = memory, memory, memory.word_map, rank, self.counters
        self.publication = Publication(*shared, max_claims, self.release)
        self.inbox = Inbox(*shared, release=self.release)

    def slot_words(self) -> list[int]:
        """Words of the slots of the publication."""
        return [self.memory.read(self.rank, i) for i in self.memory.word_map.publication]


@pytest.fixture
def memory() -> SharedMemory:
    return SharedMemory(LAYOUT, 3)


@pytest.fixture
def ranks(memory: SharedMemory) -> list[LateRank]:
    return [LateRank(memory, rank) for rank in range(3)]


def test_nothing_is_published_before_the_device_has_passed(ranks: list[LateRank]) -> None:
    """Fails if a swap of `publish` is made at once."""
    owner, reader, _ = ranks
    assert owner.publish(1.0) and owner.publish(2.0)
    assert not any(owner.words()) and reader.publication.claim(0) is None
    assert owner.publication.state == (READY, 0), "published, as far as this rank knows"
    owner.release.make(2)
    claim = reader.publication.claim(0)
    assert claim is not None and claim.version == 1
    owner.release.make()
    newer = reader.publication.claim(0)
    assert newer is not None and newer.version == 2
    assert owner.publication.claims == 2


def test_swaps_are_asked_for_in_order(ranks: list[LateRank]) -> None:
    """Fails if HEAD moves before the word of its slot, or the older version is retired first."""
    owner = ranks[0]
    first, second = (owner.memory.word_map.publication[slot] for slot in (SLOTS - 1, SLOTS - 2))
    owner.publish(1.0)
    owner.publish(2.0)
    assert [(index, required) for _, index, _, _, required in owner.release.asked] == [
        (first, True),
        (HEAD, True),
        (second, True),
        (HEAD, True),
        (first, False),
    ]


def test_a_slot_is_not_free_before_its_own_version_is(ranks: list[LateRank]) -> None:
    """Fails if `_collect` takes any word that is FREE: that of a slot still to be published is."""
    owner, reader, _ = ranks
    for value in range(1, SLOTS + 1):
        assert owner.publish(value)
    assert owner.publication.reserve() is None, "no slot is free: nothing has been made yet"
    assert owner.counters.publications_skipped == 1
    owner.release.make()
    claim = reader.publication.claim(0)
    assert claim is not None and claim.version == SLOTS
    # Once more around: all words are FREE of versions 1 to 3, or CLAIMED of version 4.
    for value in range(SLOTS + 1, 2 * SLOTS):
        assert owner.publish(value)
    assert owner.publication.reserve() is None
    assert not owner.publish(0.0)
    owner.release.make()
    assert np.all(owner.memory.view(0, claim.slot).payload == SLOTS)
    assert owner.publish(9.0)
    owner.release.make()


def test_pending_versions_do_not_count_as_claimed(ranks: list[LateRank]) -> None:
    """Fails if `claims` counts all versions that are not known to be free."""
    owner, reader, other = ranks
    owner.publish(1.0)
    owner.release.make()
    assert reader.publication.claim(0) is not None
    owner.publish(2.0)
    owner.publish(3.0)
    assert owner.publication.claims == 1
    owner.release.make(2)
    assert other.publication.claim(0) is not None, "the second, while the third is pending"
    assert owner.publication.claims == 2 and owner.publication.reserve() is None
    owner.release.make()
    assert owner.publication.claims == 2


def test_a_version_that_is_claimed_before_it_is_retired_stays(ranks: list[LateRank]) -> None:
    """Fails if the slot counts as free once its retirement has been asked for."""
    owner, reader, _ = ranks
    owner.publish(1.0)
    owner.release.make()
    owner.publish(2.0)
    claim = reader.publication.claim(0)
    assert claim is not None and claim.version == 1
    owner.release.make()
    for value in range(3, 12):
        assert owner.publish(value)
        owner.release.make()
    assert np.all(owner.memory.view(0, claim.slot).payload == 1.0)
    reader.publication.release(claim)
    assert owner.publication.claims == 1, "its reader's device still reads it"
    reader.release.make()
    assert owner.publication.claims == 0


def test_a_version_released_before_it_is_retired_serves_again(ranks: list[LateRank]) -> None:
    """Fails if the late retirement hits the version that is in the slot by then."""
    owner, reader, _ = ranks
    owner.publish(1.0)
    owner.release.make()
    owner.publish(2.0)
    claim = reader.publication.claim(0)
    assert claim is not None
    reader.publication.release(claim)
    reader.release.make()
    owner.publish(3.0)
    owner.publish(4.0)
    owner.release.make(2)
    owner.publish(5.0)  # into the slot of version 1, whose retirement is still pending
    owner.release.make()
    newest = reader.publication.claim(0)
    assert newest is not None and newest.version == 5
    assert sum(word & 3 == FREE for word in owner.slot_words()) == SLOTS - 1


def test_a_slot_that_the_head_still_names_is_not_written(ranks: list[LateRank]) -> None:
    """Fails if what a reader has claimed and released is free before a later version is out."""
    owner, reader, other = ranks
    owner.publish(1.0)
    owner.release.make()
    for value in (2.0, 3.0, 4.0):
        assert owner.publish(value)
    claim = reader.publication.claim(0)
    assert claim is not None
    reader.publication.release(claim)
    reader.release.make()
    assert not owner.publish(5.0), "the head still names version 1"
    copy = Message(np.zeros(LAYOUT.nbytes, np.uint8), LAYOUT)
    assert other.publication.read(0, copy) and copy.payload[0] == 1.0
    owner.release.make(2)
    assert owner.publish(5.0)
    assert other.publication.read(0, copy) and copy.payload[0] == 2.0


def test_a_message_that_is_being_written_is_not_the_one_before(
    ranks: list[LateRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a word that was READY for a message before says so of the next one, too."""
    receiver, sender, _ = ranks
    for number in range(SLOTS):
        assert sender.send(0, float(number))
    sender.release.make()
    assert len(receiver.receive()) == SLOTS
    real = SharedMemory.read

    def read(self: SharedMemory, rank: int, index: int) -> int:
        value = real(self, rank, index)
        if rank == 0 and value & 3 == READY:  # the slot is freed, and reserved for the next
            monkeypatch.setattr(SharedMemory, "read", real)
            receiver.release.make()
            for number in range(SLOTS):
                assert sender.send(0, 10.0 + number)
        return value

    for look in (receiver.receive, lambda: receiver.inbox.has_messages):
        monkeypatch.setattr(SharedMemory, "read", read)
        assert not look()
        sender.release.make()
        assert receiver.inbox.has_messages
        assert receiver.receive() == [(1, 10.0 + number) for number in range(SLOTS)]


def test_what_was_not_read_is_given_back_at_once(ranks: list[LateRank]) -> None:
    """Fails if `give_back` waits for the device, which does not know of it."""
    owner, reader, other = ranks
    owner.publish(1.0)
    owner.release.make()
    while other.send(0, 0.0):
        pass
    assert claim_and_reserve(reader.publication, reader.inbox, 0) is None
    assert not reader.release.asked
    assert not [word for word in owner.slot_words() if word & 3 == CLAIMED]


def test_withdraw_needs_a_version_that_is_out(ranks: list[LateRank]) -> None:
    owner = ranks[0]
    owner.publish(1.0)
    with pytest.raises(AssertionError, match="not be published yet"):
        owner.publication.withdraw()
    owner.release.make()
    assert owner.publication.withdraw() and not owner.release.asked
    assert owner.publication.state == (FREE, 0)


def test_a_message_arrives_when_the_device_has_written_it(ranks: list[LateRank]) -> None:
    """Fails if `send` swaps at once, or gives two messages one number."""
    receiver, sender, _ = ranks
    assert sender.send(0, 1.0) and sender.send(0, 2.0)
    assert receiver.inbox.receive() == [] and not receiver.inbox.has_messages
    sender.release.make()
    assert receiver.receive() == [(1, 1.0), (1, 2.0)]
    assert sender.counters.messages == 2


def test_a_message_whose_slot_is_still_to_be_freed_has_not_arrived(ranks: list[LateRank]) -> None:
    """Fails if `has_messages` counts every READY word: a pause would absorb for ever."""
    receiver, sender, other = ranks
    sender.send(0, 1.0)
    sender.release.make()
    assert receiver.inbox.has_messages
    (received,) = receiver.inbox.receive()
    assert receiver.inbox.has_messages, "not freed"
    receiver.inbox.free(received)
    assert not receiver.inbox.has_messages and receiver.inbox.receive() == []
    assert other.inbox.reserve(0) is not None
    receiver.release.make()
    assert not receiver.inbox.has_messages
    # The next message in the slot is another one of the same number, by another sender.
    for _ in range(SLOTS - 2):
        assert sender.inbox.reserve(0) is not None
    assert other.send(0, 2.0)
    other.release.make()
    assert receiver.inbox.has_messages
    (another,) = receiver.inbox.receive()
    assert (another.slot, another.message.sequence) == (received.slot, received.message.sequence)
    receiver.inbox.free(another)
    assert not receiver.inbox.has_messages


def test_a_broken_protocol_is_told(ranks: list[LateRank]) -> None:
    """Fails if words of which this rank is the only master are not required."""
    receiver, sender, _ = ranks
    sender.send(0, 1.0)
    sender.release.make()
    (received,) = receiver.inbox.receive()
    receiver.inbox.free(received)
    receiver.inbox.free(received)
    with pytest.raises(RuntimeError, match="broken"):
        receiver.release.make()
    sender.publish(1.0)
    assert sender.memory.swap(1, HEAD, 0, 77)
    with pytest.raises(RuntimeError, match="broken"):
        sender.release.make()


def test_a_rank_given_up_by_mistake_can_send_again(ranks: list[LateRank]) -> None:
    """Fails if the receiver waits for the number of the message whose slot it has reclaimed."""
    receiver, sender, other = ranks
    assert sender.send(0, 1.0)
    receiver.inbox.reclaim_from(1)
    sender.release.make()
    assert receiver.receive() == []
    for value in range(2, 3 * SLOTS):
        assert sender.send(0, value) and other.send(0, -value)
        sender.release.make()
        other.release.make()
        assert receiver.receive() == [(1, value), (2, -value)]
        receiver.release.make()


@pytest.mark.parametrize("scan", [1, 2])
def test_a_rank_given_up_by_mistake_still_sends_in_order(
    ranks: list[LateRank], monkeypatch: pytest.MonkeyPatch, scan: int
) -> None:
    """Fails if a number that one scan has missed counts as lost."""
    receiver, sender, _ = ranks
    assert sender.send(0, 0.0)
    receiver.inbox.reclaim_from(1)
    sender.release.make()
    for value in (1.0, 2.0):
        assert sender.send(0, value)
    first = next(index for _, index, *_ in sender.release.asked)
    real, scans = SharedMemory.read, [0]

    def read(self: SharedMemory, rank: int, index: int) -> int:
        value = real(self, rank, index)
        scans[0] += (rank, index) == (0, first)
        if scans[0] == scan:  # seen empty; then both are sent
            monkeypatch.setattr(SharedMemory, "read", real)
            sender.release.make()
        return value

    monkeypatch.setattr(SharedMemory, "read", read)
    assert receiver.receive() + receiver.receive() == [(1, 1.0), (1, 2.0)]


def test_a_rank_that_dies_with_pending_swaps_leaves_nothing_behind(ranks: list[LateRank]) -> None:
    """Fails if what is pending counts as given back."""
    owner, dead, alive = ranks
    owner.publish(1.0)
    owner.release.make()
    claim = dead.publication.claim(0)
    assert claim is not None and dead.send(0, 1.0)
    dead.publication.release(claim)
    assert owner.publication.claims == 1
    owner.publication.reclaim_from(1)
    owner.inbox.reclaim_from(1)
    assert owner.publication.claims == 0 and owner.inbox.receive() == []
    assert sum(alive.inbox.reserve(0) is not None for _ in range(SLOTS)) == SLOTS
    words = owner.words()
    dead.release.make()  # it was not dead after all
    assert owner.words() == words


class _Device:
    """A device that has work to do until it is waited for."""

    is_asynchronous = True

    def __init__(self) -> None:
        self.is_done = False
        self.has_failed = False

    def mark(self) -> _Device:
        return self

    def wait(self) -> None:
        if self.has_failed:
            raise DeviceFailed("gone")
        self.is_done = True


def test_synced_waits_and_then_swaps(memory: SharedMemory) -> None:
    """Fails if it swaps first, or in spite of a failure."""
    device = _Device()
    done: list[bool] = []
    memory.on_write = lambda rank, index, value: done.append(device.is_done)
    release = Synced(memory, device)  # type: ignore[arg-type]
    assert release.swap(0, HEAD, 0, 1, required=True) is True
    assert release.swap(0, HEAD, 0, 1) is False
    release.flush()
    assert done == [True] and not release.is_pending
    device.has_failed = True
    with pytest.raises(DeviceFailed):
        release.swap(0, HEAD, 1, 2)
    assert memory.read(0, HEAD) == 1


def test_awaiting_a_release(memory: SharedMemory) -> None:
    await_release(Immediate(memory))
    release = Scripted(memory)
    release.swap(0, HEAD, 0, pack_slot_word(FREE))
    with pytest.raises(DeviceFailed, match=r"after 0\.001 s"):
        await_release(release, timeout=0.001)
    release.make()
    await_release(release, timeout=0.001)
