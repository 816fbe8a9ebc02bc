"""Exit code of a program, as an exit handler sees it and as the process has it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mpi_dasgd.exit_status import exit_code_of

PROGRAM = """
import atexit, sys
from mpi_dasgd import exit_status
exit_status.watch()
exit_status.watch()
member = SystemExit.code
atexit.register(lambda: print("seen", exit_status.current()))
try:
    sys.exit(9)  # caught: it ends nothing
except SystemExit as error:
    assert (error.code, error.args) == (9, (9,))
    error.code = 8
    assert error.code == 8 and SystemExit(1, 2).code == (1, 2)
assert SystemExit().code is None and SystemExit.code is member
assert exit_status.current() is None
def last():
    ENDING
last()
"""


@pytest.mark.parametrize(
    ("ending", "seen", "code"),
    [
        ("pass", "None", 0),
        ("sys.exit()", "0", 0),
        ("sys.exit(0)", "0", 0),
        ("sys.exit(3)", "3", 3),
        ("sys.exit('no more disk quota')", "1", 1),
        ("sys.exit(-1)", "255", 255),
        ("sys.exit(256)", "0", 0),
        ("sys.exit(SystemExit(4))", "4", 4),
        ("sys.exit((5, 6))", "1", 1),
        ("raise SystemExit(7)", "7", 7),
        ("raise SystemExit", "0", 0),
        ("exit(True)", "1", 1),
        ("import argparse; argparse.ArgumentParser().parse_args(['--unknown'])", "2", 2),
        ("raise ValueError('not an exit')", "None", 1),
    ],
)
def test_the_exit_code_is_known_before_the_end(ending: str, seen: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("ENDING", ending)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == (f"seen {seen}\n", code), done.stderr
    assert (done.stderr == "no more disk quota\n") == ("quota" in ending)


def test_exit_codes_as_the_system_has_them() -> None:
    assert [exit_code_of(code) for code in (None, 0, 7, -1, 256, 1 << 70, "text", 1.0)] == [
        0, 0, 7, 255, 0, 255, 1, 1,
    ]  # fmt: skip
