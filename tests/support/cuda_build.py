"""The CUDA kernels, compiled for the CPU with the shim (``cuda_shim.h``)."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

from tests.support.mpi_ranks import ROOT, missing

__all__ = ["build", "shared_library"]

_COMMAND = ("g++", "-O2", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
_COMMAND += ("-Wno-unknown-pragmas", "-fPIC", "-shared")
_SUPPORT = ROOT / "tests" / "support"


def build(library: Path, *flags: str) -> None:
    """Compile the unmodified CUDA sources to the shared library `library`."""
    if shutil.which("g++") is None:
        missing("no g++")
    done = subprocess.run(
        [*_COMMAND, *flags, "-o", str(library), str(_SUPPORT / "cuda_driver.cpp")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@cache
def shared_library() -> Path:
    """Return the library of the present sources, built by the first process that needs it."""
    folder = ROOT / "build" / "shim"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{_digest()}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            build(library.with_suffix(".new"))
            library.with_suffix(".new").rename(library)
    return library


def _digest() -> str:
    """Return a hash of all that the library is made of."""
    kernels = ROOT / "mpi_dasgd" / "kernels"
    sources = [*kernels.glob("*.h"), *kernels.glob("cuda/*.*"), *kernels.glob("cpu/*.h")]
    sources += [_SUPPORT / "cuda_shim.h", _SUPPORT / "cuda_driver.cpp"]
    digest = hashlib.sha256(repr(_COMMAND).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
