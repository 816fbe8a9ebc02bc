"""Control words: a state, a holder and a version in 64 bits, each word in its own place."""

from __future__ import annotations

from mpi_dasgd.transport.control_words import (
    ACTIVITY,
    CALL,
    CHECKSUM,
    CLAIMED,
    ERROR_REPORTER,
    FREE,
    GRADIENTS,
    HEAD,
    HEARTBEAT,
    LAST_STEP,
    READY,
    SAMPLES,
    SHARDS,
    STATUS,
    WordMap,
    holder_of,
    pack_slot_word,
)


def test_word_keeps_state_holder_and_version_apart() -> None:
    for state in (FREE, READY, CLAIMED):
        for holder in (0, 1, 65_535, (1 << 20) - 1):
            for version in (0, 1, (1 << 40) - 1):
                value = pack_slot_word(state, holder, version)
                assert (value & 3, holder_of(value), value >> 22) == (state, holder, version)
                assert 0 <= value < 1 << 63


def test_word_map_gives_each_word_its_own_place() -> None:
    where = WordMap(5, 7)
    fixed = [HEARTBEAT, SAMPLES, STATUS, LAST_STEP, ERROR_REPORTER, GRADIENTS, ACTIVITY]
    fixed += [SHARDS, HEAD, CALL, CHECKSUM]
    indices = [*fixed, *where.publication, *where.inbox]
    assert sorted(indices) == list(range(where.count))
    assert (len(where.publication), len(where.inbox)) == (5, 7)
    assert WordMap(0, 0).count == len(fixed)
