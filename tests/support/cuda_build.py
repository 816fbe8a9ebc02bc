"""The CUDA kernels, compiled for the CPU with the shim (``cuda_shim.h``)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.support.mpi_ranks import ROOT, missing

__all__ = ["build"]


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
