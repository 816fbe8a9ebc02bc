"""The layers of the package: imports run downwards only, and light commands stay light.

The contracts are import-linter's, in pyproject.toml. That they can fail is shown on copies of the
package with one import too many.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT

LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
PACKAGES = "Packages: imports run downwards only"
PROTOCOL = "Transport: the protocol knows neither of its two memories"
CIRCLES = "No circle among the modules of any package"

PLANTED = {
    "upwards": (PACKAGES, {"storage/schema.py": "from mpi_dasgd.training import trainer"}),
    "upwards, where it is used": (
        PACKAGES,
        {"kernels/native.py": "def late():\n    from mpi_dasgd import codecs"},
    ),
    "sideways": (PACKAGES, {"tasks/idx.py": "from mpi_dasgd.staleness import delay_meter"}),
    "upwards within transport": (
        PROTOCOL,
        {"transport/inbox.py": "from mpi_dasgd.transport.rma import windows"},
    ),
    "a circle within a package": (
        CIRCLES,
        {
            "algorithms/allreduce.py": "from mpi_dasgd.algorithms import local_sgd",
            "algorithms/local_sgd.py": "from mpi_dasgd.algorithms import allreduce",
        },
    ),
}


def _broken_contracts(directory: Path) -> set[str]:
    """Return the names of the contracts that the package in `directory` breaks."""
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), "NO_COLOR": "1"},
    )
    broken = {line[: -len(" BROKEN")] for line in done.stdout.splitlines() if "BROKEN" in line}
    broken = {name.partition(" (")[0].removesuffix(" BROKEN") for name in broken}
    assert done.returncode == bool(broken), done.stdout + done.stderr
    return broken


def test_imports_run_downwards() -> None:
    assert _broken_contracts(ROOT) == set()


@pytest.mark.parametrize(("contract", "planted"), PLANTED.values(), ids=PLANTED)
def test_an_import_too_many_is_found(
    contract: str, planted: Mapping[str, str], tmp_path: Path
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.cu", "*.h")
    shutil.copytree(ROOT / "mpi_dasgd", tmp_path / "mpi_dasgd", ignore=ignored)
    for name, line in planted.items():
        path = tmp_path / "mpi_dasgd" / name
        path.write_text(f"{path.read_text()}\n{line}\n")
    assert contract in _broken_contracts(tmp_path)


def _loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=ROOT,
    )
    return set(done.stdout.split())


def test_the_package_itself_loads_neither_mpi_nor_torch() -> None:
    assert not {"torch", "mpi4py", "cupy", "h5py"} & _loaded_by("import mpi_dasgd")


def test_reports_load_neither_mpi_nor_torch_nor_cuda() -> None:
    loaded = _loaded_by("import mpi_dasgd.cli, mpi_dasgd.analysis.load, mpi_dasgd.analysis.page")
    assert not {"torch", "mpi4py", "cupy"} & loaded


def test_algorithms_and_simulator_load_neither_mpi_nor_torch() -> None:
    assert not {"mpi4py", "cupy", "torch"} & _loaded_by("import mpi_dasgd.simulation.simulator")
