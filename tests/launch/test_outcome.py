"""Verdict on a job, given the exit status of each of its ranks."""

from __future__ import annotations

import signal

import pytest

from mpi_dasgd.launch import Outcome


@pytest.mark.parametrize(
    ("codes", "first_failed", "launcher_code", "ended_by", "verdict"),
    [
        ((0, 0), None, 0, None, 0),
        ((0, 0), None, 9, None, 0),  # the launcher's exit status is irrelevant
        ((0, 137, 0), 1, 0, None, 0),  # one was killed, the others finished
        ((137,), 0, 0, None, 137),  # no rank finished
        ((137, 139), 1, 0, None, 139),  # no rank finished: the first failure counts
        ((1, 2, 137), 0, 0, None, 2),  # bad input takes precedence over all failures
        ((143, 3, 1), 2, 0, None, 3),
        ((0, 7, 137), 1, 0, None, 7),  # a failure takes precedence over a loss
        ((143, 5, 4), 2, 0, None, 4),  # the first failure
        ((None, None), None, 7, None, 7),  # aborted: only the launcher knows the exit code
        ((None, 0), None, 0, None, 1),  # an unknown exit status is a failure
        ((0, None), None, 3, None, 3),
        ((137, 137), 0, 0, "timeout", 124),
        ((0, 0), None, 0, "timeout", 124),
        ((143, 0), 0, 0, signal.SIGTERM, 143),
        ((0, 0), None, 0, signal.SIGINT, 0),  # the program handled it
        ((143, 139, 143), 1, 0, "loss", 139),  # the lost rank, not those terminated after it
        ((1, 137, 0), 1, 0, "loss", 137),
    ],
)
def test_exit_code_of_the_job(codes, first_failed, launcher_code, ended_by, verdict):
    outcome = Outcome(codes, first_failed, launcher_code, ended_by)
    assert outcome.code == verdict
    assert (outcome.describe() == "") == (set(codes) == {0} and ended_by is None)


def test_description_names_the_lost_rank():
    assert Outcome((0, 137, 0), 1, 0, None).describe() == (
        "warning: rank 1 killed by SIGKILL; ranks 0, 2 ended with exit code 0"
    )
    assert Outcome((143, 137, 143), 1, 0, "loss").describe() == (
        "rank 1 killed by SIGKILL before the others could do without it, so they were ended: "
        "ranks 0, 2 killed by SIGTERM"
    )
