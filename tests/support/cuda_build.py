"""The CUDA kernels, compiled for the CPU with the shim (``cuda_shim.h``)."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.support.mpi_ranks import ROOT, missing

__all__ = ["build", "shared_library"]


def build(library: Path, *flags: str) -> None:
    """Compile the unmodified CUDA sources to the shared library `library`."""
    if shutil.which("g++") is None:
        missing("no g++")
    command = ["g++", "-O2", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-fPIC", "-shared", *flags, "-o", str(library)]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / "cuda_driver.cpp")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@cache
def shared_library() -> Path:
    """Return the library of this process, built at the first call."""
    folder = Path(tempfile.mkdtemp(prefix="mpi_dasgd_shim_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(folder / "kernels.so")
    return folder / "kernels.so"
