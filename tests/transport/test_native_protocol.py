"""The native publication and inbox against those in Python, operation by operation.

Both play the same random schedules, in which other ranks act between any two word operations of a
rank; words, slots, counters, results and the trace of all operations must be the same.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.control_words import CLAIMED, READY, pack_slot_word
from mpi_dasgd.transport.inbox import ReceivedMessage, Reservation
from mpi_dasgd.transport.publication import Claim
from mpi_dasgd.transport.rma.peer_views import PeerViews
from tests.support.native_mutants import MUTANTS, mutant
from tests.support.traced_memory import TracedMemory

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.status())

LAYOUT = Layout(codec=0, elements=4, payload_dtype=np.dtype(np.int64), payload_items=4)
MOVES = (
    *("publish", "claim", "release", "give_back", "claims", "state", "withdraw", "read", "locate"),
    *("reserve", "send", "send", "copy", "cancel", "receive", "receive", "free", "free"),
    *("has_messages", "has_free_slot", "publish", "claim", "reserve", "leave", "reclaim"),
)


INBOX_MOVES = (
    *("reserve", "reserve", "send", "send", "receive", "free", "leave", "reclaim"),
    *("number", "number"),
)


class Actor:
    """A rank that makes moves on its views, and keeps what it holds of others."""

    def __init__(self, memory: TracedMemory, rank: int, views: PeerViews) -> None:
        self.memory, self.rank = memory, rank
        self.publication, self.inbox, self.counters = views
        self.claims: list[Claim] = []
        self.reservations: list[Reservation] = []
        self.received: list[ReceivedMessage] = []
        self.number = 0
        self._staging = Message(np.zeros(LAYOUT.nbytes, np.uint8), LAYOUT)

    def act(self, move: str, dice: random.Random) -> Any:
        """Make a move; return what came of it."""
        self.number += 1
        other = dice.randrange(len(self.memory.words))
        return getattr(self, f"_{move}")(other, dice)

    def _publish(self, other: int, dice: random.Random) -> Any:
        slot = self.publication.reserve()
        if slot is None:
            return None
        slot.payload[:] = self.number
        if dice.random() < 0.1:
            return "kept"
        self.publication.publish()
        return slot.payload.ctypes.data - self.memory.payload.ctypes.data

    def _claim(self, other: int, dice: random.Random) -> Any:
        claim = self.publication.claim(other)
        if claim is not None:
            self.claims.append(claim)
        return claim

    def _release(self, other: int, dice: random.Random) -> Any:
        if self.claims:
            self.publication.release(self.claims.pop(dice.randrange(len(self.claims))))

    def _give_back(self, other: int, dice: random.Random) -> Any:
        if self.claims:
            self.publication.give_back(self.claims.pop(dice.randrange(len(self.claims))))

    def _claims(self, other: int, dice: random.Random) -> Any:
        return self.publication.claims

    def _state(self, other: int, dice: random.Random) -> Any:
        return self.publication.state

    def _withdraw(self, other: int, dice: random.Random) -> Any:
        return self.publication.withdraw()

    def _read(self, other: int, dice: random.Random) -> Any:
        return self.publication.read(other, self._staging) and self._staging.payload.tolist()

    def _locate(self, other: int, dice: random.Random) -> Any:
        try:
            return self.publication.locate(other, dice.randrange(1, 9))
        except RuntimeError as error:
            return str(error)

    def _has_free_slot(self, other: int, dice: random.Random) -> Any:
        return self.publication.has_free_slot

    def _reserve(self, other: int, dice: random.Random) -> Any:
        reservation = self.inbox.reserve(other)
        if reservation is not None:
            self.reservations.append(reservation)
        return reservation

    def _send(self, other: int, dice: random.Random) -> Any:
        if self.reservations:
            reservation = self.reservations.pop(dice.randrange(len(self.reservations)))
            message = self.inbox.view_of(reservation)
            assert message is not None
            message.payload[:] = self.number
            self.inbox.send(reservation, message)

    def _copy(self, other: int, dice: random.Random) -> Any:
        if self.reservations:
            self._staging.payload[:] = self.number
            self.inbox.send(self.reservations.pop(), self._staging)

    def _number(self, other: int, dice: random.Random) -> Any:
        """Send under another number, as if some were lost."""
        if self.reservations:
            rank, slot = (reservation := self.reservations.pop()).rank, reservation.slot
            message = self.inbox.view_of(reservation)
            assert message is not None
            message.sequence = dice.randrange(4)
            index = self.memory.word_map.inbox[slot]
            mine, ready = (pack_slot_word(state, self.rank) for state in (CLAIMED, READY))
            self.memory.swap(rank, index, mine, ready)

    def _cancel(self, other: int, dice: random.Random) -> Any:
        if self.reservations:
            self.inbox.cancel(self.reservations.pop(dice.randrange(len(self.reservations))))

    def _receive(self, other: int, dice: random.Random) -> Any:
        messages = self.inbox.receive()
        self.received += messages
        return [(r.sender, r.slot, r.message.payload.tolist()) for r in messages]

    def _free(self, other: int, dice: random.Random) -> Any:
        if self.received:
            self.inbox.free(self.received.pop(dice.randrange(len(self.received))))

    def _has_messages(self, other: int, dice: random.Random) -> Any:
        return self.inbox.has_messages

    def _leave(self, other: int, dice: random.Random) -> Any:
        """Die, as far as the others can tell: what is held is kept, and may be used later."""
        if dice.random() < 0.5:
            self.claims, self.reservations = [], []

    def _reclaim(self, other: int, dice: random.Random) -> Any:
        if other != self.rank and dice.random() < 0.5:
            self.publication.reclaim_from(other)
            self.inbox.reclaim_from(other)


class World:
    """Actors on one memory: ranks whose bit is set in `native` are in native code."""

    def __init__(self, size: int, slots: tuple[int, int], natives: int, library: Any) -> None:
        self.memory = TracedMemory(LAYOUT, size, *slots, library=library)
        self.actors = []
        for rank in range(size):
            in_native = natives >> rank & 1
            views = self.memory.native_views if in_native else self.memory.python_views
            self.actors.append(Actor(self.memory, rank, views(rank, max(1, slots[0] - 2))))
        self.busy: set[int] = set()
        self.log: list[Any] = []

    def act(self, rank: int, move: str, seed: int) -> None:
        """A move of a rank, unless it is in the middle of one."""
        if rank not in self.busy:
            self.busy.add(rank)
            try:
                done = self.actors[rank].act(move, random.Random(seed))
            except AssertionError as error:  # a mutant that has broken the protocol
                done = str(error)
            self.log.append((rank, move, done))
            self.busy.discard(rank)

    def state(self) -> list[Any]:
        """All that must be the same in all worlds."""
        return [
            self.log,
            self.memory.trace,
            self.memory.words.tolist(),
            self.memory.payload.tobytes(),
            [actor.counters.as_dict() for actor in self.actors],
        ]


def first_difference(seed: int, natives: int, moves: int, library: Any = None) -> str | None:
    """Play a schedule in Python and with some ranks in native code; return where they differ."""
    dice = random.Random(seed)
    size = dice.choice([2, 2, 3, 4])
    slots = dice.choice([(4, 4), (3, 1), (4, 2), (5, 3)])
    worlds = [World(size, slots, bits, library) for bits in (0, natives)]
    kinds = dice.choice([MOVES, INBOX_MOVES])
    for number in range(moves):
        rank, move = dice.randrange(size), dice.choice(kinds)
        others = [
            (dice.randrange(1, 12), dice.randrange(size), dice.choice(kinds), dice.random())
            for _ in range(dice.choice([0, 1, 2, 4]))
        ]
        for world in worlds:
            world.memory.begin(
                {
                    at: lambda w=world, who=who, what=what, at=at, s=s: w.act(who, what, hash(s))
                    for at, who, what, s in others
                }
            )
            world.act(rank, move, seed + number)
        names = ("results", "trace", "words", "slots", "counters")
        for name, expected, found in zip(names, *(w.state() for w in worlds), strict=True):
            if expected != found:
                return f"seed {seed}, move {number} ({move} of {rank}): {name} differ"
        for world in worlds:
            world.log.clear()
    return None


@pytest.mark.parametrize("natives", [0b1111, 0b0101])
def test_native_and_python_do_the_same(natives: int) -> None:
    for seed in range(150):
        assert first_difference(seed, natives, 60) is None


def test_ranks_in_native_code_and_in_python_may_be_mixed_with_their_words_by_atomics() -> None:
    """Without hooks the words are the same."""
    memory = TracedMemory(LAYOUT, 2)
    owner, reader = memory.native_rank(0, traced=False), memory.python_views(1)
    assert owner.call.publication_publish() == -1
    slot = owner.call.publication_reserve()
    assert owner.call.publication_publish() == 1
    assert reader.publication.claim(0) == Claim(0, slot, 1)
    assert owner.call.publication_claims() == 1
    assert owner.call.publication_claim(1) == 0
    reservation = reader.inbox.reserve(0)
    assert reservation is not None
    reader.inbox.send(reservation, memory.view(0, len(memory.word_map.publication) + 1))
    assert owner.call.inbox_receive(owner.arrivals_at) == 1
    assert (owner.arrivals[0].sender, owner.arrivals[0].slot) == (1, 1)


@pytest.mark.parametrize("is_native", [False, True])
def test_a_number_that_was_not_seen_before_is_waited_for(is_native: bool) -> None:
    """Lost is only what is missing in a scan that began after a later number was seen."""
    memory = TracedMemory(LAYOUT, 2)
    inbox = (memory.native_views if is_native else memory.python_views)(0).inbox
    first, second = memory.word_map.inbox[:2]
    memory.words[0, first] = pack_slot_word(CLAIMED, 1)
    inbox.reclaim_from(1)

    def deliver() -> None:
        memory.view(0, len(memory.word_map.publication) + 1).sequence = 2
        memory.words[0, second] = pack_slot_word(READY, 1)

    memory.begin({len(memory.word_map.inbox) + 1: deliver})  # between the two scans
    assert inbox.receive() == []
    assert [message.slot for message in inbox.receive()] == [1]


def test_a_closed_rank_reaches_no_memory() -> None:
    memory = TracedMemory(LAYOUT, 2)
    state = memory.native_rank(0)
    state.close()
    with pytest.raises(RuntimeError, match="transport is closed"):
        state.call.publication_reserve()
    state.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_the_differential_test_finds_faults(name: str | None, tmp_path: Any) -> None:
    library = mutant(name, tmp_path)
    found = (first_difference(seed, 0b1111, 60, library) for seed in range(100))
    assert any(found) is (name is not None)
