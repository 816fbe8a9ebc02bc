"""The programs of docs/migrating.md: "after" runs on 2 ranks and learns, "before" is Python."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT, missing
from tests.support.rank_pool import run_pooled

TEXT = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r'```python title="(.+?)"\n(.*?)```', TEXT, flags=re.S))
AFTER = [title for title in PROGRAMS if ", after" in title]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the file that the programs share."""
    (tmp_path / "digits.py").write_text(PROGRAMS["digits.py"])
    return tmp_path


def _run(folder: Path, source: str) -> list[float]:
    """Run a program there on 2 ranks; return the accuracies that it printed, in percent."""
    enter = f"import os, sys; os.chdir({str(folder)!r}); sys.path.insert(0, {str(folder)!r})\n"
    printed = run_pooled(2, enter + source).stdout
    return [float(number) for number in re.findall(r"accuracy ([\d.]+) %\n", printed)]


def test_every_library_has_both() -> None:
    for library in ("DDP", "Horovod", "BlueFog", "torchft", "accelerate"):
        assert {f"{library}, before", f"{library}, after"} <= set(PROGRAMS)
    for title, source in PROGRAMS.items():
        compile(source, title, "exec")


@pytest.mark.mpi
@pytest.mark.parametrize("title", [title for title in AFTER if title != "DDP, after"])
def test_after_learns(title: str, folder: Path) -> None:
    if "accelerate" in title and find_spec("accelerate") is None:
        missing("no accelerate: `make test` installs it")
    assert _run(folder, PROGRAMS[title])[-1] > 85


@pytest.mark.mpi
def test_after_resumes(folder: Path) -> None:
    source = PROGRAMS["DDP, after"]
    part = source.replace("EPOCHS, BATCH, ACCUMULATE = 6,", "EPOCHS, BATCH, ACCUMULATE = 4,")
    assert len(_run(folder, part)) == 4
    accuracies = _run(folder, source)
    assert len(accuracies) == 2
    assert accuracies[-1] > 85
