"""Start and end of jobs, and the messages about it; on one host and on fake hosts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpi_dasgd import launch
from mpi_dasgd.errors import UserError
from mpi_dasgd.launch import mpiexec
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import ROOT, mpi_library, run_ranks

pytestmark = pytest.mark.concurrent

LIMITS = (6, 40)  # seconds until ranks are where they stay: here, and on a busy machine
START = """
import os, signal, sys, time
from mpi4py import MPI
comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
"""


@pytest.fixture(scope="module")
def mpich() -> mpiexec.Library:
    return mpiexec.mpi_library({**os.environ, "MPI4PY_LIBMPI": str(mpi_library("mpich"))})


# --- environment and end of ranks ---


def test_ranks_receive_arguments_and_environment(mpi, n_ranks):
    program = START + (
        "assert size == int(os.environ['MPI_DASGD_RANKS']), size\n"
        "assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN\n"
        "sys.stdout.write(f\"rank {rank} {sys.argv[1]} {os.environ['EXTRA']}\\n\")\n"
    )
    done = run_ranks(n_ranks, program, "two words", mpi=mpi, env={"EXTRA": "a b"})
    assert sorted(done.stdout.splitlines()) == [f"rank {r} two words a b" for r in range(n_ranks)]
    assert done.codes == [0] * n_ranks
    assert done.message == ""


@pytest.mark.parametrize(("code", "other", "verdict"), [(2, 3, 2), (3, 0, 3), (5, 0, 5)])
def test_exit_codes(mpi, code, other, verdict):
    program = START + "comm.Barrier(); os._exit([0, int(sys.argv[1]), int(sys.argv[2])][rank])"
    done = run_ranks(3, program, str(code), str(other), mpi=mpi, check=False)
    assert done.codes == [0, code, other]
    assert done.code == verdict
    assert f"rank 1 ended with exit code {code}" in done.message


def test_survivors_of_a_killed_rank_finish(mpi):
    program = START + (
        "comm.Barrier()\n"
        "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(1); sys.stdout.write(f'{rank} finished\\n'); sys.stdout.flush(); os._exit(0)\n"
    )
    done = run_ranks(3, program, mpi=mpi)
    assert done.codes == [0, 137, 0]
    assert done.code == 0
    assert done.message.startswith("warning: rank 1 killed by SIGKILL")
    assert sorted(done.stdout.splitlines()) == ["0 finished", "2 finished"]


def test_exception_ends_all_ranks_within_seconds(mpi):
    program = START + "if rank == 1: raise ValueError('this one')\ntime.sleep(50)"
    done = run_ranks(3, program, mpi=mpi, check=False)
    assert done.code == 1
    assert "ValueError: this one" in done.stderr
    assert done.seconds < 40


def test_failure_before_mpi_starts_ends_the_others():
    """No rank calls MPI_Abort, and the others wait in MPI_Init."""
    program = "import os\nif os.environ['PMI_RANK'] == '1': os._exit(6)\n" + START
    done = run_ranks(2, program, check=False)
    assert done.code == 6
    assert done.seconds < 40


def test_time_limit_shows_the_stacks_of_all_ranks(mpi):
    program = START + (
        "def stuck():\n    comm.Barrier()\n"
        "def stopped():\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "def asleep():\n    time.sleep(90)\n"
        "[stuck, asleep, stopped][rank]()\n"
    )
    # A stopped process cannot dump its stacks, but it is killed.
    expected = ("in stuck", "in asleep", "none")
    for limit in LIMITS:
        start = time.monotonic()
        with pytest.raises(AssertionError) as failure:
            run_ranks(3, program, mpi=mpi, timeout=limit)
        assert time.monotonic() - start < limit + 30
        text = str(failure.value)
        stacks = text.split("--- stacks of rank ")[1:]
        assert [stack[0] for stack in stacks] == ["0", "1", "2"]
        assert "ranks [137, 137, 137]" in text
        found = [words in stack for words, stack in zip(expected, stacks, strict=True)]
        if all(found):
            break
    assert all(found), text


def _start(directory: Path, program: str, n: int) -> subprocess.Popen[str]:
    """Start ranks without waiting for them."""
    (directory / "program.py").write_text(program)
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "mpi_ranks.py"),
        "rank",
        "program.py",
    ]
    env = {"MPI4PY_LIBMPI": str(mpi_library("mpich"))}
    request = {"command": command, "n": n, "timeout": 40, "env": env}
    (directory / "request").write_text(json.dumps(request))
    helper = [
        sys.executable,
        str(ROOT / "tests" / "support" / "mpi_ranks.py"),
        "launch",
        str(directory),
    ]
    return subprocess.Popen(helper, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("handler", "codes", "verdict"),
    [
        ("lambda *_: os._exit(0)", [0, 0], 0),
        ("signal.SIG_DFL", [143, 143], 143),
        ("signal.SIG_IGN", [137, 137], 143),
    ],
)
def test_signal_is_passed_on(tmp_path, handler, codes, verdict):
    program = START + (
        f"signal.signal(signal.SIGTERM, {handler})\n"
        "comm.Barrier(); sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "while True: time.sleep(0.1)\n"
    )
    helper = _start(tmp_path, program, 2)
    assert helper.stdout is not None
    assert [helper.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    helper.send_signal(signal.SIGTERM)
    if "IGN" in handler:  # ranks that ignore it are killed later, or at the second signal
        time.sleep(0.5)
        assert helper.poll() is None
        helper.send_signal(signal.SIGTERM)
    assert helper.wait(timeout=30) == 0
    helper.stdout.close()
    answer = json.loads((tmp_path / "answer").read_text())
    assert answer["codes"] == codes
    assert answer["code"] == verdict


def test_launch_runs_a_command(capfd, mpich, monkeypatch):
    monkeypatch.setenv("MPI4PY_LIBMPI", mpich.path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch.launch(2, ["train", "jobs/train.toml", "nonsense=1"]) == 2
    err = capfd.readouterr().err
    assert "nonsense" in err
    assert "mpi-dasgd launch" not in err  # the program itself prints the reason


def test_launch_runs_a_script_of_the_user(capfd, mpich, monkeypatch):
    monkeypatch.setenv("MPI4PY_LIBMPI", mpich.path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.launch(2, [str(ROOT / "examples" / "own_loop.py")], timeout=100) == 0
    match = re.fullmatch(r"2 ranks, (\d+) samples, accuracy ([\d.]+) %\n", capfd.readouterr().out)
    assert match is not None
    assert 60_000 <= int(match[1]) < 61_000
    assert float(match[2]) > 93


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"expected one of train, doctor, bench, or a Python script \(\*\.py\)"),
        (["trian", "jobs/train.toml"], r"got 'trian'; did you mean 'train'\?"),
        (["python", "examples/own_loop.py"], r"got 'python'"),
        (["nowhere.py"], r"there is no script nowhere\.py"),
    ],
)
def test_launch_refuses_what_is_neither_command_nor_script(arguments, message):
    with pytest.raises(UserError, match=message):
        launch.launch(2, arguments)


# --- ranks that are killed while the others need them ---

# Kills rank 1 when it imports a certain module; Python imports sitecustomize at start-up.
SITECUSTOMIZE = """
import os, signal, sys
class Killer:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["KILL_AT"]:
            os.kill(os.getpid(), signal.SIGKILL)
if "1" in (os.environ.get("PMI_RANK"), os.environ.get("OMPI_COMM_WORLD_RANK")):
    sys.meta_path.insert(0, Killer())
"""


@pytest.fixture
def kill_rank_1(mpi, tmp_path, monkeypatch):
    """Function that runs `launch.launch` and kills rank 1 when it imports a module."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("MPI4PY_LIBMPI", str(mpi_library(mpi)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("mpi_dasgd.launch.supervisor._FAILURE_GRACE", 1.0)

    def run(module: str, *arguments: str) -> int:
        monkeypatch.setenv("KILL_AT", module)
        return launch.launch(2, arguments, timeout=50)

    return run


# Before the initialization of MPI, and after it.
@pytest.mark.parametrize("module", ["mpi4py", "mpi_dasgd.training.trainer"])
def test_rank_killed_before_training_ends_the_others(kill_rank_1, module, tmp_path, capfd):
    code = kill_rank_1(module, "train", "jobs/train.toml", f"run.directory={tmp_path}")
    err = capfd.readouterr().err
    assert code == 137, err
    assert "rank 1 killed by SIGKILL before the others could do without it" in err


OWN_SCRIPT = """
import sys, time, torch, mpi_dasgd
from importlib.util import find_spec
if sys.argv[1] == "before": find_spec("nothing")
model = torch.nn.Linear(2, 2)
training = mpi_dasgd.Decentralized(model, torch.optim.SGD(model.parameters(), lr=0.1))
if sys.argv[1] == "after": find_spec("nothing")
time.sleep(2.5)
print("goes on", flush=True)
import os; os._exit(0)
"""


@pytest.mark.parametrize("mpi", ["mpich"], indirect=True)
@pytest.mark.parametrize(("moment", "verdict"), [("before", 137), ("after", 0)])
def test_own_script_needs_all_ranks_until_decentralized_is_made(
    kill_rank_1, moment, verdict, tmp_path, capfd
):
    script = tmp_path / "own.py"
    script.write_text(OWN_SCRIPT)
    code = kill_rank_1("nothing", str(script), moment)
    captured = capfd.readouterr()
    assert code == verdict, captured.err
    assert captured.out == ("goes on\n" if moment == "after" else "")


@pytest.mark.parametrize("mpi", ["mpich"], indirect=True)
def test_own_script_that_never_calls_ready_survives_a_loss(kill_rank_1, tmp_path, capfd):
    script = tmp_path / "own.py"
    script.write_text("import colorsys; import time; time.sleep(2.5); print('goes on')")
    assert kill_rank_1("colorsys", str(script)) == 0
    assert capfd.readouterr().out == "goes on\n"


# --- the launcher ---


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "at least 1, got 0"),
        (4, {"hosts": "a:1,b:2"}, "room for 3 ranks, but -n is 4"),
        (2, {"hosts": "a:x,b:2"}, "host:ranks"),
        (2, {"launcher": "/nowhere/mpiexec"}, "not an executable"),
        (2, {"env": {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}}, "cannot load an MPI library"),
    ],
)
def test_impossible_jobs_are_refused(n, options, message):
    with pytest.raises(UserError, match=message):
        launch.run(["true"], n, **options)


# --- several hosts ---


def test_killed_rank_on_another_host(two_hosts: Hosts):
    """MPICH only: with Open MPI a closed socket ends the other ranks despite error handlers."""
    program = START + (
        "comm.Barrier()\n"
        "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(1); os._exit(0)\n"
    )
    done = run_ranks(2, program, hosts=two_hosts)
    assert done.codes == [0, 137]
    assert done.code == 0


def test_time_limit_reaches_other_hosts(mpi, two_hosts: Hosts):
    for limit in LIMITS:
        with pytest.raises(AssertionError, match=r"ranks \[137, 137\]") as failure:
            run_ranks(2, START + "time.sleep(90)", mpi=mpi, hosts=two_hosts, timeout=limit)
        found = str(failure.value).count("program.py")
        if found == 2:
            break
    assert found == 2
