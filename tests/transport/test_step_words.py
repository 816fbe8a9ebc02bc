"""Native reports of a step have the words, and the knowledge of others, of the Python ones."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.kernels import native
from mpi_dasgd.transport.control_words import WordMap
from mpi_dasgd.transport.membership import FAILED, FINISHED, RUNNING, Membership
from mpi_dasgd.transport.rma.step_words import StepWords

library: Any = native.load()
pytestmark = pytest.mark.skipif(library is None, reason=native.status())

RANKS = 4


class Words:
    """Control words in memory of this process."""

    def __init__(self) -> None:
        self.memory = np.zeros((RANKS, WordMap(4, 4).count), np.int64)

    def address(self, rank: int, index: int) -> int:
        """Return where a word is."""
        return self.memory[rank, index:].ctypes.data

    def read(self, rank: int, index: int) -> int:
        """Return a word."""
        return int(self.memory[rank, index])

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        """Set a word, which must be as expected: only its owner changes it."""
        assert self.memory[rank, index] == expected
        self.memory[rank, index] = new
        return True


def members(is_native: bool, counts_others: bool = True) -> tuple[Words, list[Any], list[Any]]:
    """Return the words of some ranks, their memberships, and their step words."""
    words, step_words = Words(), []
    ranks = [Membership(words, rank, RANKS, heartbeat_timeout=1.0) for rank in range(RANKS)]
    for rank, member in enumerate(ranks) if is_native else ():
        made = StepWords(library, words, rank, RANKS, counts_others=counts_others)  # type: ignore[arg-type]
        member.use(made)
        step_words.append(made)
    return words, ranks, step_words


def play(is_native: bool, seed: int, counts_others: bool) -> list[Any]:
    """Have ranks report and read at random; return all words and all that ranks know, each time."""
    words, ranks, _ = members(is_native, counts_others)
    dice = random.Random(seed)
    counts, samples, seen = [0] * RANKS, [0] * RANKS, []
    counted = range(RANKS) if counts_others else ()
    for _ in range(200):
        rank = dice.randrange(RANKS)
        member, found = ranks[rank], None
        match dice.randrange(6):
            case 0:
                counts[rank] += 1
                found = member.begin_step(counts[rank], counted)
            case 1:
                samples[rank] += dice.randrange(64)
                found = member.end_step(samples[rank], counted)
                member.refresh(range(RANKS))  # native code has read samples already
            case 2:
                member.refresh(range(RANKS))
            case 3:
                counts[rank] += 1
                member.report_gradients(counts[rank])
            case 4:
                samples[rank] += 1
                member.report_samples(samples[rank])
            case 5 if dice.random() < 0.1:
                member.publish_status(dice.choice([FINISHED, FAILED]), 3)
        known = [list(m.gradients) + list(m.samples) + m.status + m.exit_codes for m in ranks]
        seen.append((found, words.memory.tolist(), known, ranks[0].total_samples))
    return seen


@pytest.mark.parametrize("counts_others", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_native_reports_leave_and_find_what_those_of_python_do(
    seed: int, counts_others: bool
) -> None:
    assert play(True, seed, counts_others) == play(False, seed, counts_others)


def test_a_step_reads_the_samples_of_others_and_sees_that_a_status_has_changed() -> None:
    _, ranks, _ = members(True)
    ranks[1].report_samples(40)
    ranks[0].end_step(8, range(RANKS))
    assert list(ranks[0].samples) == [8, 40, 0, 0]
    assert ranks[0].reads_in_steps and not ranks[0].news[0]
    ranks[2].publish_status(FAILED, 3)
    ranks[0].end_step(16, range(RANKS))
    assert ranks[0].news[0] and ranks[0].status[2] == RUNNING
    ranks[0].refresh(range(RANKS))
    assert not ranks[0].news[0] and ranks[0].status[2] == FAILED
    ranks[0].end_step(24, range(RANKS))
    assert not ranks[0].news[0]


def test_gradients_of_a_dead_rank_are_those_last_seen() -> None:
    _, ranks, step_words = members(True)
    ranks[1].begin_step(5, range(RANKS))
    assert ranks[0].begin_step(1, range(RANKS)) == 6
    step_words[0].forget({1})
    ranks[1].begin_step(9, range(RANKS))
    ranks[2].begin_step(2, range(RANKS))
    assert ranks[0].end_step(32, range(RANKS)) == 1 + 5 + 2


def test_what_a_rank_knows_may_be_set_as_after_a_checkpoint() -> None:
    _, ranks, _ = members(True)
    for rank in range(RANKS):
        ranks[0].gradients[rank] = 3 + rank
    assert list(ranks[0].gradients) == [3, 4, 5, 6] and max(ranks[0].gradients) == 6
    assert ranks[0].begin_step(9, range(RANKS)) == 9, "the words count"


def test_closed_words_are_not_touched() -> None:
    _, ranks, step_words = members(True)
    step_words[0].close()
    with pytest.raises(RuntimeError, match="transport is closed"):
        ranks[0].begin_step(1, range(RANKS))
    with pytest.raises(RuntimeError, match="transport is closed"):
        ranks[0].refresh(range(RANKS))
