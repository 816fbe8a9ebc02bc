"""The end of a run on one rank: who writes the results, and who leaves how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_dasgd.algorithms.asgd import ASGD
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import DeviceFailed, Diverged, PeerFailed, PeerLost
from mpi_dasgd.training import run_end
from mpi_dasgd.training.finalize import RankRoles
from mpi_dasgd.training.run_end import RunEnd
from mpi_dasgd.transport.membership import DEPARTED, FAILED, FINISHED


class Exited(Exception):
    """The process would have ended."""


class Run:
    """A rank of four; what it does to the world around it is kept in `done`."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        self.done: list[Any] = []
        self.on_refresh: Callable[[], None] = lambda: None
        self.close_error: Exception | None = None
        self.settle_error: Exception | None = None
        self.first_to_fail = True
        self.membership = SimpleNamespace(
            status=[FINISHED] * 4, dead=set(), publish_status=lambda s: self.done.append(s)
        )
        training: Any = SimpleNamespace(
            rank=rank, size=4, close=self._close, fail=self._fail,
            claim_report=self._claim_report,
            algorithm=SimpleNamespace(
                model_ranks=ASGD.model_ranks, workers=ASGD.workers, settings=Config().algorithm,
                settle=self._settle,
            ),
            endpoint=SimpleNamespace(
                membership=self.membership, refresh_membership=lambda: self.on_refresh()
            ),
        )  # fmt: skip
        evaluator: Any = None
        self.directory = directory
        self.end = RunEnd(training, evaluator, directory, 5, None)
        monkeypatch.setattr(run_end, "write_results", self._write_results)
        monkeypatch.setattr(run_end, "consolidate", lambda *_, **kw: self.done.append(kw["dead"]))
        monkeypatch.setattr(run_end.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(run_end.os, "_exit", self._exit)

    def _write_results(self, directory: Path, roles: RankRoles, count: int, evaluator: Any) -> None:
        self.done.append(roles)
        self.put_outputs()

    def put_outputs(self) -> None:
        """What `write_results` leaves."""
        for name in ("results.h5", "model.h5"):
            (self.directory / name).touch()

    def _close(self) -> None:
        if self.close_error:
            raise self.close_error
        self.done.append("closed")

    def _settle(self) -> None:
        self.done.append("settled")
        if self.settle_error:
            raise self.settle_error

    def _fail(self, exit_code: int, error: Exception) -> None:
        self.exit_code = exit_code
        self.done.append("failed")

    def _claim_report(self) -> bool:
        self.done.append("claimed")
        return self.first_to_fail

    def _exit(self, code: int) -> None:
        raise Exited(code)


def test_the_lowest_rank_that_lives_writes_the_results_and_knows_who_is_who(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, monkeypatch, rank=1)
    run.membership.dead.add(0)
    run.end.finish()
    assert run.done == [RankRoles(range(4), range(1), range(1, 4), [0])]
    assert f"results: {tmp_path}/results.h5" in capsys.readouterr().out


def test_the_others_wait_until_the_results_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, rank=1)
    waits = iter(range(3))

    def wait() -> None:
        if next(waits) == 2:
            run.put_outputs()

    run.on_refresh = wait
    run.end.finish()
    assert run.done == []
    assert next(waits, None) is None


def test_the_next_rank_writes_the_results_if_the_first_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, rank=1)
    run.on_refresh = lambda: run.membership.dead.add(0)
    run.end.finish()
    assert [roles.dead for roles in run.done] == [[0]]


def test_a_rank_that_has_departed_has_written_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, rank=2)
    run.membership.status[0] = DEPARTED
    run.end.finish()
    assert run.done == []


def test_if_the_first_rank_fails_the_others_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, rank=2)
    run.membership.status[0] = FAILED
    with pytest.raises(PeerLost, match="rank 0 could not write the results"):
        run.end.finish()


def test_ranks_that_all_live_leave_by_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, rank=2)
    run.end.leave()
    assert run.done == ["closed"]


@pytest.mark.parametrize("dies", ["before", "meanwhile"])
def test_a_dead_rank_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    run = Run(tmp_path, monkeypatch, rank=2)
    if dies == "before":
        run.membership.dead.add(3)
    else:
        run.close_error = PeerLost("rank 3 is gone")
    with pytest.raises(Exited, match="^0$"):
        run.end.leave()
    assert run.done == [DEPARTED]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Diverged("too large"), "failed"), (PeerLost("gone"), "stopped"), (PeerFailed(1), "stopped")],
)
@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_rank_that_fails_says_why_and_writes_what_there_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Diverged | PeerLost,
    status: str,
    first: bool,
) -> None:
    run = Run(tmp_path, monkeypatch, rank=2)
    run.first_to_fail = first
    run.settle_error = DeviceFailed("an earlier one") if first else None  # the report goes on
    run.membership.dead.add(3)
    recorder: Any = SimpleNamespace(close=run.done.append)
    with pytest.raises(Exited, match=f"^{error.exit_code}$"):
        run.end.fail(error, recorder)
    assert run.exit_code == error.exit_code
    # It claims the report before others can learn of the failure, and only then if it is its own.
    told = ["failed", "settled", status]
    claim = ["claimed"]
    done = [*told, *claim] if isinstance(error, PeerFailed) else [*claim, *told]
    assert run.done == [*done, *([(3,)] if first else [])]
    assert (str(error) in caplog.text) == first
