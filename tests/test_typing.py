"""A user's type checker sees the types of the package."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT

# A user's script; a comment is a part of the error that its line must give.
SCRIPT = """\
import numpy as np
import torch

import mpi_dasgd
from mpi_dasgd.analysis import load_run

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
training = mpi_dasgd.Decentralized(model, optimizer, total_samples=1000)
while not training.finished:
    training.step(32)
training.close()
ages: np.ndarray = load_run("runs/a").column("exchange", "age_s")
mpi_dasgd.Decentralized(model, optimizer, total_samples="many")  # "total_samples" .* "int | None"
mpi_dasgd.Decentralized(model)  # Missing positional argument "optimizer"
training.step(model)  # Argument 1 to "step" .* expected "int"
training.ended  # "Decentralized" has no attribute "ended"
load_run(1)  # Argument 1 to "load_run" .* expected "str | Path"
"""


@pytest.mark.slow
def test_mypy_finds_a_users_wrong_types_and_no_others(tmp_path: Path) -> None:
    """The package is installed as by a wheel: mypy does not follow our editable install."""
    environment = tmp_path / "environment"
    make = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(environment)]
    subprocess.run(make, check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / "lib" / version / "site-packages"
    (packages / "mpi_dasgd").symlink_to(ROOT / "mpi_dasgd")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    mypy = [sys.executable, "-m", "mypy", "--config-file=", "--no-pretty", "--hide-error-codes"]
    mypy += ["--cache-dir", str(ROOT / ".mypy_cache" / "user")]
    mypy += ["--python-executable", str(environment / "bin" / "python"), script.name]
    done = subprocess.run(
        mypy, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False
    )
    found = dict(re.findall(r"^user\.py:(\d+): error: (.*)$", done.stdout, re.M))
    lines = enumerate(SCRIPT.splitlines(), 1)
    expected = {str(n): line.split("  # ")[1] for n, line in lines if "  # " in line}
    assert found.keys() == expected.keys(), done.stdout + done.stderr
    for number, pattern in expected.items():
        assert re.search(pattern, found[number])
