"""The progress line: replaced on a terminal, printed line by line elsewhere, by one rank only."""

from __future__ import annotations

import pytest

from mpi_dasgd.training import progress_line
from mpi_dasgd.training.progress_line import ProgressLine


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test moves."""
    now = [100.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: now[0])
    return now


def test_a_batch_job_gets_a_line_every_few_seconds(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MPI_DASGD_TERMINAL", raising=False)
    line = ProgressLine(True, seconds=5.0)
    assert line.due
    line.show("10 %")
    now[0] += 4.9
    assert not line.due
    now[0] += 0.2
    assert line.due
    line.end("100 %")
    assert capsys.readouterr().out == "10 %\n100 %\n"


def test_a_terminal_gets_one_line_that_is_replaced(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPI_DASGD_TERMINAL", "1")
    line = ProgressLine(True)
    line.show("a longer line")
    now[0] += 0.3
    assert line.due
    line.end("short")
    assert capsys.readouterr().out == "\ra longer line\rshort        \n"


def test_other_ranks_print_nothing(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(False)
    assert not line.due
    line.end("100 %")
    assert capsys.readouterr().out == ""
