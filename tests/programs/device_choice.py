"""Where real ranks choose to exchange their models, with what they find made up.

Prints JSON: of each case what each rank has chosen, or the error, what was said, and how often the
GPUs were probed.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpi_dasgd import world
from mpi_dasgd.algorithms.build import build_run
from mpi_dasgd.config import load
from mpi_dasgd.device import gpu_facts, ipc_probe
from mpi_dasgd.device.gpu_facts import GpuFacts
from mpi_dasgd.device.ipc_probe import Rates, Verdict
from mpi_dasgd.errors import DeviceFailed, UserError
from mpi_dasgd.training import device_choice
from tests.support.late_device import LateDevice

GOOD = Verdict(True, "kernels read at 1000 GB/s", Rates(1000, 900, 1500))
BAD = Verdict(False, "the probe of CUDA IPC failed: process 1, start: killed by SIGSEGV")
CASES: dict[str, dict] = {
    "cpu": {"device": "cpu"},
    "ipc": {},
    "ipc demanded": {"set": ["transport.memory=ipc"]},
    "host demanded": {"set": ["transport.memory=host"]},
    "algorithm": {"set": ["algorithm.name=allreduce"]},
    "mode": {"set": ["transport.mode=rma"]},
    "gpu of rank 1": {"problem": "CuPy is not installed"},
    "probe": {"verdict": BAD},
    "probe raises": {"verdict": OSError("no processes left")},
    "opening on rank 1": {"fails": True},
    "a model on the cpu": {"device": "cpu of rank 1"},
    "demanded on the cpu": {"device": "cpu", "set": ["transport.memory=ipc"]},
    "demanded, probe": {"verdict": BAD, "set": ["transport.memory=ipc"]},
    "demanded, opening": {"fails": True, "set": ["transport.memory=ipc"]},
}


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def _choose(environment: world.World, case: dict) -> dict:
    rank, probes, reads = environment.rank, [], []

    def read_gpu(index: int) -> GpuFacts:
        reads.append(index)
        return GpuFacts(index, "card", f"bus {rank}", problem=case.get("problem", "") * rank)

    def probe(devices: list) -> Verdict:
        probes.append([device.bus_id for device in devices])
        verdict = case.get("verdict", GOOD)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def open_device(index: int) -> LateDevice:
        if case.get("fails") and rank == 1:
            raise DeviceFailed(f"cuda:{index}: out of memory")
        return LateDevice((0, 0))

    gpu_facts.read_gpu, ipc_probe.probe = read_gpu, probe
    device_choice.open_device = open_device
    where = case.get("device", "cuda:1")
    on_cpu = where == "cpu" or (where.startswith("cpu") and rank == 1)
    config = load(None, case.get("set", []))
    said = _Said()
    logger = logging.getLogger("mpi_dasgd")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        choice = device_choice.choose_device(
            environment,
            torch.device("cpu" if on_cpu else "cuda:1"),
            config,
            build_run(config, environment.size),
        )
        result = {"memory": choice.memory, "reason": choice.reason, "device": choice.device.name}
    except UserError as error:
        result = {"error": str(error), "on_all_ranks": error.on_all_ranks}
    finally:
        logger.removeHandler(said)
    return {**result, "said": said.lines, "probes": probes, "reads": reads}


def main() -> None:
    environment = world.start()
    found = {name: environment.comm.gather(_choose(environment, CASES[name])) for name in CASES}
    if environment.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    original = gpu_facts.read_gpu, ipc_probe.probe, device_choice.open_device
    try:
        main()
    finally:
        gpu_facts.read_gpu, ipc_probe.probe, device_choice.open_device = original
