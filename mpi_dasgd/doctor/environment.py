"""Checks of the environment without MPI: packages, kernels, devices, shared memory, HDF5."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from mpi_dasgd import __version__
from mpi_dasgd.device import binding
from mpi_dasgd.doctor import gpu_checks
from mpi_dasgd.doctor.check import FAILS, OK, WARNING, Check

__all__ = ["checks"]

_PACKAGES = ("numpy", "torch", "mpi4py", "h5py")
_MIN_SHARED_BYTES = 1e9  # free shared memory: ten slots of a model of 25 million parameters

# Program of the process that reads a run file while it is written.
_READ_COUNTER = """\
import sys
from mpi_dasgd.storage.runfile import read_run_file
print(read_run_file(sys.argv[1]).counters["answer"])
"""


def checks() -> list[Check]:
    """Return the findings; this takes about two seconds, mostly for torch, and ten with GPUs."""
    return [
        _check_versions(),
        _check_kernels(),
        _check_cuda(),
        *gpu_checks.checks(),
        _check_shared_memory(),
        _check_hdf5(),
    ]


def _check_versions() -> Check:
    values = {"python": platform.python_version(), "mpi_dasgd": __version__}
    missing: list[str] = []
    for package in _PACKAGES:
        try:
            values[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    text = ", ".join(f"{name} {version}" for name, version in values.items())
    if missing:
        text += f"; missing: {', '.join(missing)}: pip install {' '.join(missing)}"
    return Check("versions", FAILS if missing else OK, text, values)


def _check_kernels() -> Check:
    from mpi_dasgd.kernels import native

    library = native.load()
    if library is None:
        text = f"{native.status()}; training works, but exchanges take longer"
        return Check("kernels", WARNING, text, {"native": False})
    values = {"native": True, "instruction_set": library.mpd_instruction_set().decode()}
    return Check("kernels", OK, native.status(), values)


def _check_cuda() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", FAILS, f"torch cannot be imported ({error}): reinstall it")
    built = torch.version.cuda
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        text = f"CUDA {built}, {len(names)} visible: {', '.join(names)}; models are on the device"
        return Check("torch", OK, text, {"cuda": True, "devices": names})
    values = {"cuda": False, "devices": []}
    if binding.has_driver():
        reason = (
            f"the driver is too old for CUDA {built}" if built else "torch is built without CUDA"
        )
        text = (
            f"there is an NVIDIA device, but torch does not see it: perhaps {reason}, or "
            "CUDA_VISIBLE_DEVICES hides it; training would run on the CPU"
        )
        return Check("torch", WARNING, text, values)
    return Check("torch", OK, "no CUDA device: training runs on the CPU", values)


def _check_shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.exists():
        return Check("shared memory", OK, "there is no /dev/shm to look at")
    free = shutil.disk_usage(folder).free
    text, values = f"{free / 1e9:.1f} GB free in /dev/shm", {"free_bytes": free}
    if free < _MIN_SHARED_BYTES:
        text += (
            "; a model needs 8 times its size there for each rank of this node (less with smaller "
            "transport.publication_slots and .inbox_slots), and a rank that finds it full dies of "
            "SIGBUS: start a container with `--shm-size=8g` or `--ipc=host`"
        )
        return Check("shared memory", WARNING, text, values)
    return Check("shared memory", OK, text, values)


def _check_hdf5() -> Check:
    """Check that a run file in the working directory can be read while it is open for writing."""
    try:
        import h5py

        from mpi_dasgd.storage.runfile import RunFile
    except (ImportError, OSError) as error:
        return Check("hdf5", FAILS, f"h5py cannot be imported ({error}): pip install h5py")
    directory = Path.cwd()
    version = h5py.version.hdf5_version
    values = {"version": version, "directory": str(directory)}
    try:
        with tempfile.TemporaryDirectory(prefix=".mpi-dasgd-", dir=directory) as name:
            path = Path(name, "rank.h5")
            with RunFile(path, rank=0, size=1, attributes={}) as run_file:
                run_file.flush({"answer": 42})
                command = [sys.executable, "-c", _READ_COUNTER, str(path)]
                reader = subprocess.run(
                    command, capture_output=True, text=True, timeout=20, check=False
                )
    except (OSError, subprocess.TimeoutExpired) as error:
        text = (
            f"HDF5 {version}: no run file can be written in {directory} ({error}); go elsewhere, "
            "or set run.directory to a directory that can be written"
        )
        return Check("hdf5", FAILS, text, values)
    if reader.stdout.strip() != "42":
        error_line = (reader.stderr.strip().splitlines() or ["nothing"])[-1]
        text = (
            f"HDF5 {version}: a run file in {directory} cannot be read while it is written "
            f"({error_line}); runs work, but look at them only at their end, or set run.directory "
            "to a local disk"
        )
        return Check("hdf5", WARNING, text, {**values, "swmr": False})
    text = f"HDF5 {version}: run files can be read while they are written (SWMR) in {directory}"
    return Check("hdf5", OK, text, {**values, "swmr": True})
