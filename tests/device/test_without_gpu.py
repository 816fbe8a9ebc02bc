"""Training on the CPU asks nothing of a GPU: CuPy may be missing, broken or without a driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT, run_ranks

# A CuPy without a driver raises such an error at most of its functions, a broken one at its import.
CUPY = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
"""

PROGRAM = """
import sys
from pathlib import Path

folder, kernels, *arguments = sys.argv[1:]
sys.path.insert(0, folder)  # with a CuPy
from mpi_dasgd.kernels import native
if kernels == "numpy":
    native.load = lambda: None
from mpi_dasgd.cli import main

code = main(["train", *arguments])
import torch
assert code == 0, code
assert "cupy" not in sys.modules
assert not any(name.startswith("mpi_dasgd.device.cuda") for name in sys.modules)
assert not torch.cuda.is_initialized()
"""


@pytest.fixture
def cupy(tmp_path: Path) -> Path:
    """A folder with a CuPy that notes that it is imported, and cannot be."""
    folder = tmp_path / "packages"
    (folder / "cupy").mkdir(parents=True)
    (folder / "cupy" / "__init__.py").write_text(CUPY)
    return folder


@pytest.mark.concurrent
@pytest.mark.parametrize("kernels", ["native", "numpy"])
def test_training_on_the_cpu_imports_no_cupy(cupy: Path, tmp_path: Path, kernels: str) -> None:
    config = [str(ROOT / "jobs" / "train.toml"), f"run.directory={tmp_path}/runs"]
    short = ["budget.epochs=1", "evaluation.count=1", "checkpoint.count=1"]
    run_ranks(2, PROGRAM, str(cupy), kernels, *config, *short)
    assert not (cupy / "cupy" / "imported").exists()


def test_everything_can_be_imported_without_cupy(cupy: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(cupy)!r})\n"
        "import mpi_dasgd.device.cuda, mpi_dasgd.device.binding, mpi_dasgd.kernels.cuda\n"
        "assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
    assert not (cupy / "cupy" / "imported").exists()
