"""Publication: the newest model of a rank, for any rank to read, without locks or torn reads.

The owner encodes into a free slot and publishes it with one swap. A reader either *claims* the
newest version, which pins its slot like a hazard pointer and makes one version serve one exchange,
or copies it unclaimed and reads the slot's word again to see whether the copy is whole.

Words of a slot: FREE -> READY(version) -> FREE, or READY -> CLAIMED(reader) -> FREE.
The head word, ``version << 8 | slot``, names the newest version.

Swaps that give memory away (publish, retire, release a claim) go through a `Release`, and may be
made later than they are asked for, in their order; what this rank knows of its own slots is then
ahead of their words. A word tells the version it is of, so that a slot that is FREE of an earlier
version, to be published still, is not taken for one that is free again.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.control_words import (
    CLAIMED,
    FREE,
    HEAD,
    READY,
    WordMap,
    Words,
    holder_of,
    pack_slot_word,
)
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.release import Immediate, Release

__all__ = ["Claim", "Publication"]

_MAX_COPIES = 8  # attempts to copy a publication that is replaced during the copy


@dataclass(frozen=True)
class Claim:
    """A pinned version of a rank's publication."""

    rank: int
    slot: int
    version: int


class Publication:
    """This rank's publication, and its access to the publications of others.

    Args:
        words: control words of all ranks.
        slots: payload slots of all ranks.
        word_map: indices of the slots' words.
        rank: this rank.
        counters: where publications, skipped ones, lost claims and torn reads are counted.
        max_claims: number of versions that others may hold claimed; at that number this rank
            publishes nothing until one is released.
        release: makes the swaps that give memory away; None: at once.
    """

    def __init__(
        self,
        words: Words,
        slots: Slots,
        word_map: WordMap,
        rank: int,
        counters: Counters,
        max_claims: int = 2,
        release: Release | None = None,
    ) -> None:
        self._words = words
        self._release = Immediate(words) if release is None else release
        self._slots = slots
        self._word_indices = word_map.publication
        self._rank = rank
        self._counters = counters
        self._max_claims = max_claims
        self._free = list(range(len(self._word_indices)))
        # words of the slots in _free
        self._last_words = dict.fromkeys(self._free, pack_slot_word(FREE))
        # slots of earlier versions that are not known to be free, with their versions
        self._replaced: dict[int, int] = {}
        self._newest: int | None = None
        self._version = 0
        self._reserved: int | None = None
        self._is_late = False  # whether swaps are made later than they are asked for

    def reserve(self) -> Message | None:
        """Return a free slot to encode the next version into, or None (counted). Never waits."""
        if not self.has_free_slot:
            self._counters.publications_skipped += 1
            return None
        self._reserved = self._free[-1]
        return self._slots.view(self._rank, self._reserved)

    def publish(self) -> None:
        """Make the reserved slot the newest version."""
        slot = self._reserved
        assert slot is not None, "publish without reserve"
        self._reserved = None
        self._free.remove(slot)
        self._slots.fence()  # the payload must be complete before the word says so
        self._version += 1
        swap = self._release.swap
        published = swap(
            self._rank,
            self._word_indices[slot],
            self._last_words[slot],
            pack_slot_word(READY, self._rank, self._version),
            required=True,
        )
        old = 0 if self._newest is None else (self._version - 1) << 8 | self._newest
        became_head = swap(self._rank, HEAD, old, self._version << 8 | slot, required=True)
        assert published is not False and became_head is not False, "only the owner publishes"
        self._is_late = became_head is None
        if self._newest is not None:
            self._retire(self._newest, self._version - 1)
        self._newest = slot
        self._counters.publications += 1

    def claim(self, rank: int) -> Claim | None:
        """Pin the newest version of `rank`; return None if there is none or it is claimed."""
        head = self._words.read(rank, HEAD)
        version, slot = head >> 8, head & 0xFF
        if version == 0:
            return None
        ready, mine = (
            pack_slot_word(READY, rank, version),
            pack_slot_word(CLAIMED, self._rank, version),
        )
        if not self._words.swap(rank, self._word_indices[slot], ready, mine):
            self._counters.claims_lost += 1
            return None
        return Claim(rank, slot, version)

    def release(self, claim: Claim) -> None:
        """Free a claimed slot for its owner."""
        mine = pack_slot_word(CLAIMED, self._rank, claim.version)
        self._release.swap(
            claim.rank,
            self._word_indices[claim.slot],
            mine,
            pack_slot_word(FREE, version=claim.version),
        )

    def give_back(self, claim: Claim) -> None:
        """Free a claimed slot at once: nobody has been asked to read it."""
        mine = pack_slot_word(CLAIMED, self._rank, claim.version)
        self._words.swap(
            claim.rank,
            self._word_indices[claim.slot],
            mine,
            pack_slot_word(FREE, version=claim.version),
        )

    @property
    def has_free_slot(self) -> bool:
        """Whether `reserve` would return a slot."""
        return self.claims < self._max_claims and bool(self._free)

    def withdraw(self) -> bool:
        """Withdraw the newest version, so that no rank can claim it; return False if one has."""
        assert not self._release.is_pending, "the newest version may not be published yet"
        claim = self.claim(self._rank)
        if claim is not None:
            self.give_back(claim)
        return claim is not None

    @property
    def state(self) -> tuple[int, int]:
        """State of the newest version, and its claimer if the state is CLAIMED.

        READY: not claimed yet; FREE: it was withdrawn or released, or none was published.
        """
        if self._newest is None:
            return FREE, self._rank
        value = self._words.read(self._rank, self._word_indices[self._newest])
        if value >> 22 != self._version:  # still to be published
            return READY, self._rank
        return value & 3, holder_of(value)

    def read(self, rank: int, out: Message) -> bool:
        """Copy the newest version of `rank`, claimed or not, to `out`; return whether whole."""
        for _ in range(_MAX_COPIES):
            head = self._words.read(rank, HEAD)
            version, slot = head >> 8, head & 0xFF
            if version == 0:
                return False
            published = self._slots.view(rank, slot)
            if published is None:
                self._slots.get(rank, slot, out)
            else:
                out.buffer[:] = published.buffer
            self._slots.fence()
            # The owner writes to a slot only after a newer version is out and this one is free.
            if self._words.read(rank, HEAD) == head:
                return True
            word = self._words.read(rank, self._word_indices[slot])
            if word >> 22 == version and word & 3 != FREE:
                return True
            self._counters.torn_reads += 1
        return False

    def locate(self, rank: int, version: int) -> int | None:
        """Return the slot that holds `version` of `rank`, or None if it is not published yet.

        For readers without claims that the owner waits for: nothing else protects the slot.

        Raises:
            RuntimeError: the version was overwritten already.
        """
        head = self._words.read(rank, HEAD)
        if head >> 8 == version:
            return head & 0xFF
        if head >> 8 < version:
            return None
        for slot, index in enumerate(self._word_indices):
            if self._words.read(rank, index) >> 22 == version:
                return slot
        raise RuntimeError(f"version {version} of rank {rank} was overwritten before it was read")

    def reclaim_from(self, rank: int) -> None:
        """Free the slots that dead rank `rank` has claimed."""
        slots = (*self._replaced, *(() if self._newest is None else (self._newest,)))
        for slot in slots:
            value = self._words.read(self._rank, self._word_indices[slot])
            if value & 3 == CLAIMED and holder_of(value) == rank:
                self._words.swap(
                    self._rank,
                    self._word_indices[slot],
                    value,
                    pack_slot_word(FREE, version=value >> 22),
                )

    @property
    def claims(self) -> int:
        """Number of this rank's versions that others hold claimed."""
        claimed = self._collect()
        if self._newest is None:
            return claimed
        newest = self._words.read(self._rank, self._word_indices[self._newest])
        return claimed + (newest & 3 == CLAIMED)

    def _retire(self, slot: int, version: int) -> None:
        ready, free = (
            pack_slot_word(READY, self._rank, version),
            pack_slot_word(FREE, version=version),
        )
        if self._release.swap(self._rank, self._word_indices[slot], ready, free):
            self._free.append(slot)
            self._last_words[slot] = free
        else:
            self._replaced[slot] = version

    def _collect(self) -> int:
        """Take back replaced slots that are free by now; return how many are still claimed."""
        claimed = 0
        for slot, version in tuple(self._replaced.items()):
            value = self._words.read(self._rank, self._word_indices[slot])
            if value & 3 == FREE and value >> 22 == version and self._is_replaced(version):
                del self._replaced[slot]
                self._free.append(slot)
                self._last_words[slot] = value
            else:
                claimed += value & 3 == CLAIMED
        return claimed

    def _is_replaced(self, version: int) -> bool:
        """Return whether the head names a later version than `version`, as all readers see it.

        A slot that a reader has claimed and released is FREE before the head has moved on: until
        then it may still be read without a claim.
        """
        return not self._is_late or self._words.read(self._rank, HEAD) >> 8 > version
