"""Checks of the exchange of models in memory of GPUs; without a GPU there is nothing to check."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mpi_dasgd.device import gpu_facts, ipc_probe
from mpi_dasgd.doctor.check import OK, WARNING, Check

__all__ = ["checks"]

_PROBE_SECONDS = 30.0
_DRIVER = Path("/proc/driver/nvidia")


def checks() -> list[Check]:
    """Return the findings on all GPUs that this process sees; the probe takes about ten seconds."""
    try:
        import torch
    except (ImportError, OSError):  # which is a finding of its own
        return []
    if not torch.cuda.is_available():
        return []
    gpus = [gpu_facts.read_gpu(index) for index in range(torch.cuda.device_count())]
    first = gpus[0]
    values: dict[str, Any] = {
        "cupy": first.cupy,
        "cuda_of_driver": first.driver,
        "driver": _driver_version(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "bus_ids": [gpu.bus_id for gpu in gpus],
        "capabilities": [list(gpu.capability) for gpu in gpus],
        "hidden": _hidden(gpus),
        "ipc": None,
    }
    text = (
        f"CuPy {first.cupy or 'missing'}, driver {values['driver'] or 'unknown'} (CUDA "
        f"{first.driver or 'unknown'}), capability "
        f"{', '.join(sorted({f'{gpu.capability[0]}.{gpu.capability[1]}' for gpu in gpus}))}, "
        f"CUDA_VISIBLE_DEVICES={values['visible']}"
    )
    if values["hidden"]:
        text += (
            f"; {values['hidden']} more GPUs of this machine are hidden from this process: ranks "
            "that see one GPU each cannot use each other's memory, so ask the scheduler for "
            "--gpus-per-node, not for --gpus-per-task"
        )
    problem = next((gpu.problem for gpu in gpus if gpu.problem), "")
    if not problem:
        verdict = ipc_probe.probe([gpu.probed for gpu in gpus], _PROBE_SECONDS)
        values["ipc"] = verdict.works
        if verdict.rates is not None:
            values |= {f"{k}_gb_per_s": v for k, v in vars(verdict.rates).items()}
        if verdict.works:
            text += f"; CUDA IPC works: {verdict.reason}"
        else:
            problem = verdict.reason
    if problem:
        text += f"; models on GPUs are copied to the host and exchanged there: {problem}"
    return [Check("gpu exchange", WARNING if problem or values["hidden"] else OK, text, values)]


def _driver_version() -> str:
    """Return the version of the driver, as in "580.159"; "" if unknown."""
    try:
        words = (_DRIVER / "version").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _hidden(gpus: list[gpu_facts.GpuFacts]) -> int:
    """Return how many GPUs of this machine, as the driver lists them, this process does not see."""
    try:
        there = {folder.name.lower() for folder in (_DRIVER / "gpus").iterdir()}
    except OSError:
        return 0
    return len(there - {gpu.bus_id.lower() for gpu in gpus}) if gpus[0].bus_id else 0
