"""The publication of a rank of a node in native code; `Publication` is the reference."""

from __future__ import annotations

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.control_words import FREE, WordMap, Words, holder_of
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.publication import Claim, Publication
from mpi_dasgd.transport.release import Immediate
from mpi_dasgd.transport.rma.native_rank import NativeRank

__all__ = ["NativePublication"]


class NativePublication(Publication):
    """This rank's publication, whose state is in `native`, and its access to those of others.

    Args:
        native: native state of this rank, which the inbox has in common.
        words, slots, word_map, rank: as for `Publication`.
    """

    def __init__(
        self, native: NativeRank, words: Words, slots: Slots, word_map: WordMap, rank: int
    ) -> None:
        # Not that of the base: its state would be a second one, which nobody keeps.
        self._native = native
        self._words = words
        self._release = Immediate(words)
        self._slots = slots
        self._word_indices = word_map.publication
        self._rank = rank
        self._counters = native.counters

    def reserve(self) -> Message | None:
        slot = self._native.call.publication_reserve()
        return None if slot < 0 else self._slots.view(self._rank, slot)

    def publish(self) -> None:
        done = self._native.call.publication_publish()
        assert done >= 0, "publish without reserve"
        assert done, "only the owner publishes"

    def claim(self, rank: int) -> Claim | None:
        head = self._native.call.publication_claim(rank)
        return Claim(rank, head & 0xFF, head >> 8) if head else None

    def release(self, claim: Claim) -> None:
        self._native.call.publication_release(claim.rank, claim.slot, claim.version)

    def give_back(self, claim: Claim) -> None:
        self._native.call.publication_release(claim.rank, claim.slot, claim.version)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._native.call.publication_has_free_slot())

    @property
    def state(self) -> tuple[int, int]:
        newest = self._native.call.publication_newest()
        if not newest:
            return FREE, self._rank
        value = self._words.read(self._rank, self._word_indices[newest & 0xFF])
        return value & 3, holder_of(value)

    def reclaim_from(self, rank: int) -> None:
        self._native.call.publication_reclaim_from(rank)

    @property
    def claims(self) -> int:
        return self._native.call.publication_claims()
