"""Publication and Inbox in every order of their steps, and faulty ones that must be found."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_dasgd.kernels import native
from mpi_dasgd.transport.control_words import WordMap, Words
from mpi_dasgd.transport.release import Release
from tests.programs.faults import FAULTS
from tests.programs.interleave import MOVES, RANKS, LateQueue, play
from tests.support.late_faults import AT_ONCE, Collects, Hasty, TrustsOldWord, WritesNewest
from tests.support.late_release import QueuedRelease
from tests.support.mpi_ranks import missing
from tests.support.native_mutants import mutant

SCRIPTS = st.tuples(*[st.lists(st.sampled_from(MOVES), min_size=8, max_size=12)] * RANKS)
SCHEDULES = st.lists(st.integers(0, 2 * RANKS - 1), min_size=150, max_size=150)

PLACES = ("remote", "in place", "late", "native")  # late, native: in place


def queued(words: Words, queue: LateQueue, rank: int, word_map: WordMap) -> Release:
    return QueuedRelease(words, queue)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(SCRIPTS, SCHEDULES, st.integers(0, 999), st.sampled_from(PLACES), st.integers(3, 4))
def test_no_interleaving_breaks_the_protocols(
    scripts: tuple[list[str], ...], schedule: list[int], seed: int, place: str, slots: int
) -> None:
    choices = itertools.chain(schedule, itertools.cycle(range(2 * RANKS)))
    late = queued if place == "late" else None
    library = native.load() if place == "native" else None
    found, _ = play(
        scripts, choices, seed, in_place=place != "remote", slots=slots, library=library, late=late
    )
    assert not found


def endless_choices(dice: random.Random, threads: int = RANKS) -> Iterator[int]:
    while True:
        yield dice.randrange(threads)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_some_interleaving_shows_each_fault(fault: str | None) -> None:
    """The test above can fail: 1000 plays at most find a faulty protocol."""
    for seed in range(100 if fault is None else 1000):
        dice = random.Random(seed)
        scripts = [dice.choices(MOVES, k=12) for _ in range(RANKS)]
        in_place = dice.random() < 0.5
        if fault is None:
            found, done = play(scripts, endless_choices(dice), seed, in_place=in_place)
            assert not found and done["published"] and done["received"] == done["sent"]
            continue
        broken = FAULTS[fault]
        found, _ = play(
            scripts,
            endless_choices(dice),
            seed,
            in_place=in_place,
            publication=broken.publication,
            inbox=broken.inbox,
        )
        if any(found[sign] for sign in broken.signs):
            return
    assert fault is None, f"{fault}: not found"


NATIVE_FAULTS = ("claims without a swap", "out of order", "sends unreserved")


@pytest.mark.parametrize("fault", [None, *NATIVE_FAULTS])
def test_some_interleaving_shows_each_fault_of_the_native_protocols(
    fault: str | None, tmp_path: Path
) -> None:
    if native.load() is None:
        missing(f"native library: {native.status()}")
    library = native.load() if fault is None else mutant(fault, tmp_path)
    for seed in range(100 if fault is None else 1000):
        dice = random.Random(seed)
        scripts = [dice.choices(MOVES, k=12) for _ in range(RANKS)]
        found, done = play(scripts, endless_choices(dice), seed, in_place=True, library=library)
        if fault is None:
            assert not found and done["published"] and done["received"] == done["sent"]
        elif found:
            return
    assert fault is None, f"{fault}: not found"


def hasty(name: str) -> Callable[[Words, LateQueue, int, WordMap], Release]:
    def make(words: Words, queue: LateQueue, rank: int, word_map: WordMap) -> Release:
        return Hasty(QueuedRelease(words, queue), words, AT_ONCE[name], rank, word_map.inbox)

    return make


LATE_FAULTS: dict[str, dict[str, Any]] = {
    **{f"{name} at once": {"late": hasty(name)} for name in AT_ONCE},
    "writes the newest": {"late": queued, "publication": WritesNewest},
    "trusts an old word": {"late": queued, "inbox": TrustsOldWord},
    "collects": {"late": queued, "publication": Collects},
}


@pytest.mark.parametrize("fault", [None, *LATE_FAULTS])
def test_some_interleaving_shows_each_fault_of_a_late_device(fault: str | None) -> None:
    """Nothing is found of the right order in 100 plays, and any fault in 1000 at most."""
    for seed in range(100 if fault is None else 1000):
        dice = random.Random(seed)
        moves = dice.choice([MOVES, ("publish", "claim", "release", "read"), ("send", "receive")])
        scripts = [dice.choices(moves, k=20) for _ in range(RANKS)]
        options = {"late": queued} if fault is None else LATE_FAULTS[fault]
        choices = endless_choices(dice, 2 * RANKS)
        found, done = play(scripts, choices, seed, in_place=True, **options)
        if fault is None:
            assert not found and done["published"] + done["sent"]
            assert done["received"] == done["sent"]
        elif found:
            return
    assert fault is None, f"{fault}: not found"
