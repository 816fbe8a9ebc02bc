"""The library logs; the program prints what is logged, in its own name, on stderr."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpi_dasgd import cli
from mpi_dasgd.world import log_to_stderr
from tests.support.mpi_ranks import ROOT, run_ranks

log = logging.getLogger("mpi_dasgd")


@pytest.fixture
def program() -> Iterator[None]:
    """The logger as the program has it, and afterwards as it was."""
    before = list(log.handlers)
    log.handlers.clear()
    log_to_stderr()
    yield
    log.handlers[:] = before


@pytest.mark.usefixtures("program")
def test_the_program_prints_records_as_its_messages(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("not wanted")
    log.warning("ranks %s were lost", [1])
    log.error("rank %d: ranks %s are gone", 0, [1])
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.splitlines() == [
        "mpi-dasgd: warning: ranks [1] were lost",
        "mpi-dasgd: rank 0: error: ranks [1] are gone",
    ]


@pytest.mark.usefixtures("program")
def test_commands_after_one_another_print_each_record_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        assert cli.main(["algorithms"]) == 0
    log.warning("once")
    assert capsys.readouterr().err == "mpi-dasgd: warning: once\n"


def test_importing_the_package_configures_no_logging() -> None:
    code = (
        "import logging, mpi_dasgd.training.trainer as t; "
        "assert not logging.getLogger('mpi_dasgd').handlers; assert not logging.root.handlers; "
        "logging.getLogger('mpi_dasgd').warning('to the last resort')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == "to the last resort\n"


LOOP = """
import logging, sys, torch, mpi_dasgd
from mpi_dasgd import config
logging.basicConfig(stream=sys.stdout, format="mine %(levelname)s %(name)s %(message)s")
settings = ["task.data=sharded", "algorithm.delay_adaptive_rule=inverse", "budget.samples=8"]
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with mpi_dasgd.Decentralized(model, optimizer, config=config.load(None, settings)) as training:
    while not training.finished:
        model(torch.ones(1)).sum().backward()
        training.step()
"""


@pytest.mark.mpi
def test_a_loop_of_ones_own_gets_warnings_where_it_wants_them() -> None:
    warning = "algorithm.delay_adaptive_rule: 'inverse' with data that differ between ranks"
    done = run_ranks(2, LOOP)
    assert done.stdout.count(f"mine WARNING mpi_dasgd {warning}") == 1
    assert warning not in done.stderr


@pytest.mark.mpi
def test_training_prints_warnings_in_the_name_of_the_program(tmp_path: Path) -> None:
    program = """
    import sys
    from mpi_dasgd import cli
    sys.exit(cli.main(["train", *sys.argv[1:]]))
    """
    keys = ["task.data=sharded", "algorithm.delay_adaptive_rule=inverse", "budget.samples=64"]
    keys += ["algorithm.name=alone", "evaluation.count=1", f"run.directory={tmp_path}"]
    done = run_ranks(1, program, str(ROOT / "jobs" / "train.toml"), *keys)
    warning = "mpi-dasgd: warning: algorithm.delay_adaptive_rule: 'inverse' with data that differ"
    assert re.findall(f"^{warning}", done.stderr, re.M) == [warning]
