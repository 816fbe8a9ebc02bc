"""`mpi-dasgd doctor`: checks whether training would work here, and measures the parts of it.

Started alone, the doctor launches a probe job; under mpirun or srun, the ranks of that job probe.
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

_PROBE_TIMEOUT = 60.0  # seconds; the probe takes about three
# Prefix of the line with the findings, since launchers and libraries print to stdout, too.
_FINDINGS_MARK = "mpi-dasgd doctor: "


def run(ranks: int, *, as_json: bool = False) -> int:
    """Examine this machine, print the findings, and return 0 if training would work, else 1.

    Args:
        ranks: number of ranks of the probe job; ignored under a launcher.
        as_json: print one object ``{"ok": bool, "checks": [{name, verdict, text, values}]}``
            instead of lines.

    Raises:
        UserError: `ranks` is less than 1.
    """
    if ranks < 1:
        raise UserError(f"doctor: -n must be at least 1, got {ranks}")
    size, rank = world.expected_ranks()
    if size > 1:
        return _probe_in_place(rank, as_json)
    return _print_checks([*_probe_in_job(ranks), *environment.checks()], as_json)


def _probe_in_place(rank: int, as_json: bool) -> int:
    """Probe in the ranks that a launcher has started, print on rank 0, and return the exit code."""
    from mpi_dasgd.doctor import probe
    from mpi_dasgd.world import polled_barrier

    faulthandler.dump_traceback_later(_PROBE_TIMEOUT, exit=True)
    try:
        job = world.start()
    except UserError as error:
        if rank != 0:
            return 1
        return _print_checks([Check("mpi", FAILS, str(error)), *environment.checks()], as_json)
    except SystemExit:  # rank 0 prints the reason
        return 1
    job.abort_on_exception()
    library_checks = _check_library(needs_launcher=False) if job.rank == 0 else []
    path = library_checks[0].values.get("path", "") if library_checks else ""
    checks = [*library_checks, *probe.checks(job, str(path))]
    faulthandler.cancel_dump_traceback_later()
    code = 0
    if job.rank == 0:
        code = _print_checks([*checks, *environment.checks()], as_json)
    polled_barrier(job.comm)
    return int(job.comm.bcast(code))


def _check_library(needs_launcher: bool) -> list[Check]:
    """Check which MPI library mpi4py loads, and which launcher belongs to it.

    Args:
        needs_launcher: whether a missing launcher is a failure; else it is a warning.
    """
    try:
        library = mpiexec.mpi_library()
    except UserError as error:
        return [Check("mpi", FAILS, _message(error))]
    version = library.version.replace("Version:", "").partition(",")[0].strip("\0")
    version = " ".join(version.split())
    values = {"version": version, "path": library.path}
    text = f"{version}, loaded from {library.path or 'a place unknown'}"
    checks = [Check("mpi", OK, text, values)]
    try:
        launcher = mpiexec.find_launcher(library)
    except UserError as error:
        verdict = FAILS if needs_launcher else WARNING
        return [*checks, Check("launcher", verdict, _message(error))]
    return [*checks, Check("launcher", OK, launcher, {"path": launcher})]


def _probe_in_job(ranks: int, timeout: float = _PROBE_TIMEOUT) -> list[Check]:
    """Launch the probe on `ranks` ranks, and return its findings.

    That the ranks start is part of the examination.

    Args:
        ranks: number of ranks.
        timeout: seconds until the job is ended, which is a failure.
    """
    checks = _check_library(needs_launcher=True)
    if any(check.verdict == FAILS for check in checks):
        return checks
    path = str(checks[0].values["path"])
    command = [sys.executable, "-m", "mpi_dasgd.doctor.probe", _FINDINGS_MARK, path]
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+") as err:
        outcome = launch.run(
            command, ranks, needs_all=True, timeout=timeout, stdout=out, stderr=err
        )
        out.seek(0)
        err.seek(0)
        output, errors = out.read(), err.read()
    marked = [line for line in output.splitlines() if line.startswith(_FINDINGS_MARK)]
    if marked:
        findings = json.loads(marked[0].removeprefix(_FINDINGS_MARK))
        checks += [Check(**finding) for finding in findings]
    if outcome.code == 0 and marked:
        return checks
    if errors:
        print(errors, end="" if errors.endswith("\n") else "\n", file=sys.stderr, flush=True)
    if any(check.verdict == FAILS for check in checks):
        return checks  # the findings of the ranks give the reason
    ending = outcome.describe() or "the ranks ended without findings"
    text = (
        f"the probe on {ranks} ranks failed: {ending}; what they said, stacks included, is above. "
        "Try the MPI of `pip install 'mpi_dasgd[mpich]'`, or run the doctor under your site's own "
        "launcher, as in `srun mpi-dasgd doctor`"
    )
    return [*checks, Check("ranks", FAILS, text, {"exit_code": outcome.code})]


def _message(error: UserError) -> str:
    """Return the message of `error` without the prefix of the command `launch`."""
    return str(error).removeprefix("launch: ")


def _print_checks(checks: Sequence[Check], as_json: bool) -> int:
    """Print the findings and the verdict; return 0 if none fails, else 1."""
    ok = all(check.verdict != FAILS for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [vars(check) for check in checks]}), flush=True)
        return 0 if ok else 1
    for check in checks:
        verdict = "FAILS" if check.verdict == FAILS else check.verdict
        print(f"{verdict:<9}{check.name:<22}{check.text}")
    conclusion = "Training would work here." if ok else "Training would NOT work here: see FAILS."
    print(conclusion, flush=True)
    return 0 if ok else 1
