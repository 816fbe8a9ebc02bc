"""`mpi-dasgd doctor`: says whether training would work here and how fast its parts are.

Run alone it starts a probe job of its own; under mpirun or srun it probes in the ranks at hand.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import tempfile
from collections.abc import Sequence

from mpi_dasgd import launch, world
from mpi_dasgd.doctor import environment
from mpi_dasgd.doctor.check import FAILS, OK, WARNING, Check
from mpi_dasgd.errors import UserError
from mpi_dasgd.launch import mpiexec

__all__ = ["run"]

_SECONDS = 60.0  # for the probe: it takes about three
_MARK = (
    "mpi-dasgd doctor: "  # begins the line with the findings: launchers and libraries print, too
)


def run(ranks: int, *, as_json: bool = False) -> int:
    """Examine this machine, print the findings, and return 0 if training would work, else 1.

    Args:
        ranks: of the probe job; under a launcher its own number counts.
        as_json: print one object ``{"ok": bool, "checks": [{name, verdict, text, values}]}``.

    Raises:
        UserError: `ranks` is less than 1.
    """
    if ranks < 1:
        raise UserError(f"doctor: -n must be at least 1, got {ranks}")
    started, rank = world.expected_ranks()
    if started > 1:
        return _in_these_ranks(rank, as_json)
    return _print([*_job(ranks), *environment.checks()], as_json)


def _in_these_ranks(rank: int, as_json: bool) -> int:
    """Probe in the ranks that a launcher has started; rank 0 prints."""
    from mpi_dasgd.doctor import probe
    from mpi_dasgd.world import polled_barrier

    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    try:
        started = world.start()
    except UserError as error:
        return (
            _print([Check("mpi", FAILS, str(error)), *environment.checks()], as_json)
            if rank == 0
            else 1
        )
    except SystemExit:  # rank 0 says why
        return 1
    started.abort_on_exception()
    library: list[Check] = []
    if started.rank == 0:
        library = _library(needs_launcher=False)
    path = library[0].values.get("path", "") if library else ""
    checks = [*library, *probe.checks(started, str(path))]
    faulthandler.cancel_dump_traceback_later()
    code = 0
    if started.rank == 0:
        code = _print([*checks, *environment.checks()], as_json)
    polled_barrier(started.comm)
    return int(started.comm.bcast(code))


def _library(needs_launcher: bool) -> list[Check]:
    """Say which MPI library mpi4py loads, and which launcher belongs to it."""
    try:
        library = mpiexec.mpi_library()
    except UserError as error:
        return [Check("mpi", FAILS, _plain(error))]
    version = library.version.replace("Version:", "").partition(",")[0].strip("\0")
    version = " ".join(version.split())
    values = {"version": version, "path": library.path}
    checks = [
        Check("mpi", OK, f"{version}, loaded from {library.path or 'a place unknown'}", values)
    ]
    try:
        launcher = mpiexec.find_launcher(library)
    except UserError as error:
        verdict = FAILS if needs_launcher else WARNING
        return [*checks, Check("launcher", verdict, _plain(error))]
    return [*checks, Check("launcher", OK, launcher, {"path": launcher})]


def _job(ranks: int, seconds: float = _SECONDS) -> list[Check]:
    """Run the probe on ranks of its own: that they start is part of the examination."""
    checks = _library(needs_launcher=True)
    if any(check.verdict == FAILS for check in checks):
        return checks
    path = str(checks[0].values["path"])
    command = [sys.executable, "-m", "mpi_dasgd.doctor.probe", _MARK, path]
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+") as err:
        outcome = launch.run(
            command, ranks, needs_all=True, timeout=seconds, stdout=out, stderr=err
        )
        out.seek(0)
        err.seek(0)
        lines, said = out.read().splitlines(), err.read()
    found = next((line for line in lines if line.startswith(_MARK)), None)
    if found is not None:
        checks += [Check(**check) for check in json.loads(found.removeprefix(_MARK))]
    if outcome.code == 0 and found is not None:
        return checks
    if said:
        print(said, end="" if said.endswith("\n") else "\n", file=sys.stderr, flush=True)
    if any(check.verdict == FAILS for check in checks):
        return checks  # the ranks have said why themselves
    ended = outcome.describe() or "the ranks ended without findings"
    text = (
        f"the probe on {ranks} ranks failed: {ended}; what they said, stacks included, is above. "
        "Try the MPI of `pip install 'mpi_dasgd[mpich]'`, or run the doctor under your site's own "
        "launcher, as in `srun mpi-dasgd doctor`"
    )
    return [*checks, Check("ranks", FAILS, text, {"exit_code": outcome.code})]


def _plain(error: UserError) -> str:
    return str(error).removeprefix("launch: ")


def _print(checks: Sequence[Check], as_json: bool) -> int:
    ok = all(check.verdict != FAILS for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [vars(check) for check in checks]}), flush=True)
        return 0 if ok else 1
    for check in checks:
        word = "FAILS" if check.verdict == FAILS else check.verdict
        print(f"{word:<9}{check.name:<22}{check.text}")
    print(
        "Training would work here." if ok else "Training would NOT work here: see FAILS.",
        flush=True,
    )
    return 0 if ok else 1
