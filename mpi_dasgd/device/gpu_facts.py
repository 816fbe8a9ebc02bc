"""What there is to know of a GPU, before anything is asked of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from mpi_dasgd.device.ipc_probe import ProbeDevice
from mpi_dasgd.errors import first_line

__all__ = ["MIN_CAPABILITY", "MIN_CUPY", "GpuFacts", "import_cupy", "read_gpu"]

MIN_CUPY = 14
"""Oldest major version of CuPy whose streams and arrays are used as they are here."""

MIN_CAPABILITY = (8, 0)
"""Oldest compute capability with the instructions of the kernels: theirs, which a test compares."""


@dataclass(frozen=True)
class GpuFacts:
    """What is known of a GPU.

    Attributes:
        index: its number among those that this process sees.
        name: name of the card; "" if unknown.
        bus_id: PCI bus id; "" if unknown.
        capability: compute capability, (major, minor).
        cupy: version of CuPy; "" without it.
        driver: newest CUDA of the driver, as in "13.0"; "" if unknown.
        problem: why models cannot be exchanged on it, for users to read; "" if nothing is known.
    """

    index: int
    name: str = ""
    bus_id: str = ""
    capability: tuple[int, int] = (0, 0)
    cupy: str = ""
    driver: str = ""
    problem: str = ""

    @property
    def probed(self) -> ProbeDevice:
        """The GPU as a probe finds it from another process."""
        return ProbeDevice(self.index, self.bus_id, os.environ.get("CUDA_VISIBLE_DEVICES"))


def import_cupy() -> Any:
    """Return CuPy, or a sentence on why there is none: not installed, or broken."""
    try:
        import cupy
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        reason = "is not installed" if missing else f"cannot be imported ({first_line(error)})"
        return f"CuPy {reason}: `pip install cupy-cuda13x`, or cupy-cuda12x for CUDA 12"
    except Exception as error:  # such as a home directory without room for its cache
        return f"CuPy cannot be imported ({first_line(error)})"
    return cupy


def read_gpu(index: int) -> GpuFacts:
    """Return what is known of GPU `index`, which torch sees."""
    import torch

    try:
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError) as error:  # no driver, or no such GPU
        return GpuFacts(index, problem=f"torch cannot use cuda:{index} ({first_line(error)})")
    cupy = import_cupy()
    if isinstance(cupy, str):
        return GpuFacts(index, name, capability=capability, problem=cupy)
    version, problem = str(cupy.__version__), ""
    try:
        bus_id = str(cupy.cuda.runtime.deviceGetPCIBusId(index))
        number = int(cupy.cuda.runtime.driverGetVersion())
    except Exception as error:
        bus_id, number = "", 0
        problem = f"CuPy {version} cannot use cuda:{index} ({first_line(error)})"
    driver = f"{number // 1000}.{number % 1000 // 10}" if number else ""
    if int(version.partition(".")[0]) < MIN_CUPY:
        problem = f"CuPy {MIN_CUPY} or newer is needed, and this is {version}: upgrade it"
    if capability < MIN_CAPABILITY:
        problem = (
            f"the kernels need compute capability {_dotted(MIN_CAPABILITY)} (A100) or newer, and "
            f"{name} has {_dotted(capability)}"
        )
    return GpuFacts(index, name, bus_id, capability, version, driver, problem)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
