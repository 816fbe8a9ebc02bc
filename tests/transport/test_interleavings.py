"""Publication and Inbox in every order of their steps, and faulty ones that must be found."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.programs.faults import FAULTS
from tests.programs.interleave import MOVES, RANKS, play

SCRIPTS = st.tuples(*[st.lists(st.sampled_from(MOVES), min_size=8, max_size=12)] * RANKS)
SCHEDULES = st.lists(st.integers(0, RANKS - 1), min_size=150, max_size=150)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(SCRIPTS, SCHEDULES, st.integers(0, 999), st.booleans(), st.integers(3, 4))
def test_no_interleaving_breaks_the_protocols(
    scripts: tuple[list[str], ...], schedule: list[int], seed: int, in_place: bool, slots: int
) -> None:
    choices = itertools.chain(schedule, itertools.cycle(range(RANKS)))
    found, _ = play(scripts, choices, seed, in_place=in_place, slots=slots)
    assert not found


def endless_choices(dice: random.Random) -> Iterator[int]:
    while True:
        yield dice.randrange(RANKS)


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
