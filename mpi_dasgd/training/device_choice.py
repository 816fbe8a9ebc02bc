"""Choice of the device that exchanges a rank's model, and of the memory of its payload slots.

Models on GPUs are exchanged there, by kernels that use the neighbours' memory in place, where every
rank can; where one cannot, all copy them to the host and exchange them there. Both sides of an
exchange must agree, so the choice is made once, by all ranks together.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mpi_dasgd import codecs
from mpi_dasgd.device import gpu_facts, ipc_probe
from mpi_dasgd.device.base import Device
from mpi_dasgd.device.gpu_facts import GpuFacts
from mpi_dasgd.device.host import HOST
from mpi_dasgd.errors import DeviceFailed, UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.world import polled_barrier

if TYPE_CHECKING:
    from mpi_dasgd.algorithms.build import RunParts
    from mpi_dasgd.config import Config
    from mpi_dasgd.world import World

__all__ = ["DeviceChoice", "choose_device"]

_log = logging.getLogger("mpi_dasgd")


@dataclass(frozen=True)
class DeviceChoice:
    """Where the models of all ranks are exchanged.

    Attributes:
        device: device of this rank that exchanges its model; the host also for a model on a GPU
            that is copied there.
        memory: memory of the payload slots, the same on all ranks.
        reason: where and why, for users to read; "" where there was nothing to choose.
    """

    device: Device = HOST
    memory: Literal["host", "ipc"] = "host"
    reason: str = ""


@dataclass(frozen=True)
class _Rank:
    """What the ranks tell each other.

    Attributes:
        memory: `transport.memory`.
        on_gpu: whether the model is on a GPU.
        obstacle: why this rank cannot exchange it there; "" if nothing is known.
        gpu: what is known of the GPU; None if that does not matter any more.
    """

    memory: str
    on_gpu: bool
    obstacle: str = ""
    gpu: GpuFacts | None = None


def choose_device(
    environment: World, tensor_device: torch.device, config: Config, run: RunParts
) -> DeviceChoice:
    """Choose where the models of all ranks are exchanged. Collective.

    Args:
        environment: the ranks, and this one's place among them.
        tensor_device: device of this rank's parameters.
        config: configuration of the run.
        run: algorithm, codec and topology of the run.

    Raises:
        UserError: on all ranks: `transport.memory` demands what is not possible.
    """
    own = _examine(environment, tensor_device, config, run)
    ranks: list[_Rank] = environment.comm.allgather(own)
    demanded = next((rank for rank, told in enumerate(ranks) if told.memory == "ipc"), None)
    if not any(told.on_gpu for told in ranks) and demanded is None:
        return DeviceChoice()
    if any(told.memory == "host" for told in ranks):
        choice = DeviceChoice(reason="models are exchanged in host memory (transport.memory=host)")
        return _announced(environment, choice, logging.INFO)
    obstacle, found = _first_obstacle(ranks), ""
    if not obstacle and environment.size > 1:
        verdict = _probe(environment, ranks)
        obstacle, found = ("", verdict.reason) if verdict.works else (verdict.reason, "")
    device = HOST
    if not obstacle:
        device, obstacle = _open_devices(environment, own.gpu)
    if not obstacle:
        reason = f"models are exchanged in memory of the GPUs{found and f': {found}'}"
        return _announced(environment, DeviceChoice(device, "ipc", reason), logging.INFO)
    if demanded is not None:
        raise UserError(
            "transport.memory: 'ipc' exchanges models in memory of the GPUs, which is not possible "
            f"here: {obstacle}. Change that, or set transport.memory=auto, which then exchanges "
            "models in host memory",
            on_all_ranks=True,
        )
    choice = DeviceChoice(
        reason=f"models on GPUs are copied to the host and exchanged there: {obstacle}"
    )
    return _announced(environment, choice, logging.WARNING)


def _examine(
    environment: World, tensor_device: torch.device, config: Config, run: RunParts
) -> _Rank:
    """Return what this rank knows of itself. A GPU is looked at only if all else is as it must be.

    The order is that of what a user can change most easily.
    """
    memory = config.transport.memory
    if tensor_device.type != "cuda":
        where = {"cpu": "the CPU"}.get(tensor_device.type, str(tensor_device))
        return _Rank(memory, False, f"the model of rank {environment.rank} is on {where}")
    if memory == "host":
        return _Rank(memory, True)
    obstacle = _obstacle_of_run(environment, config, run)
    if obstacle:
        return _Rank(memory, True, obstacle)
    index = torch.cuda.current_device() if tensor_device.index is None else tensor_device.index
    gpu = gpu_facts.read_gpu(index)
    problem = f"rank {environment.rank}: {gpu.problem}" if gpu.problem else ""
    return _Rank(memory, True, problem, gpu)


def _obstacle_of_run(environment: World, config: Config, run: RunParts) -> str:
    """Return why this run cannot exchange models in memory of GPUs, whatever these are; or ""."""
    name, codec = run.algorithm_cls.name, run.codec_config.name
    if not run.algorithm_cls.capabilities.runs_on_device:
        return f"algorithm {name!r} computes on the host in this variant"
    if not codecs.runs_on_device(codec, run.dtype):
        return f"codec {codec!r} encodes models of {run.dtype} on the host"
    if environment.nodes > 1:
        return f"the ranks are on {environment.nodes} nodes"
    if config.transport.mode == "rma":
        return "transport.mode=rma uses Get and Put"
    if native.load() is None:
        return f"rank {environment.rank}: {native.status()}"
    return ""


def _first_obstacle(ranks: list[_Rank]) -> str:
    return next((told.obstacle for told in ranks if told.obstacle), "")


def _probe(environment: World, ranks: list[_Rank]) -> ipc_probe.Verdict:
    """Have one rank of the node probe for all. Collective."""
    verdict = None
    if environment.node_rank == 0:
        try:
            verdict = ipc_probe.probe([told.gpu.probed for told in ranks if told.gpu is not None])
        except Exception as error:  # it must not end a run that is possible without
            problem = f"the probe of CUDA IPC failed: {type(error).__name__}: {error}"
            verdict = ipc_probe.Verdict(False, problem)
    polled_barrier(environment.comm)  # it lasts seconds: leave the cores to its processes
    shared: ipc_probe.Verdict = environment.comm.bcast(verdict)
    return shared


def _open_devices(environment: World, gpu: GpuFacts | None) -> tuple[Device, str]:
    """Open the GPU of each rank. Collective.

    Returns:
        This rank's device, and why one of them cannot be opened, or "".
    """
    device, problem = HOST, ""
    try:
        assert gpu is not None, "a rank without obstacles has looked at its GPU"
        device = open_device(gpu.index)
    except (DeviceFailed, ImportError, RuntimeError) as error:
        problem = f"rank {environment.rank}: {error}"
    problems = environment.comm.allgather(problem)
    return device, next(filter(None, problems), "")


def open_device(index: int) -> Device:
    """Return GPU `index` as a device; CuPy is imported here.

    Raises:
        DeviceFailed: it cannot be used.
    """
    from mpi_dasgd.device.cuda import CudaDevice

    return CudaDevice(index)


def _announced(environment: World, choice: DeviceChoice, level: int) -> DeviceChoice:
    """Say once what was chosen where models are on GPUs, and return it."""
    if environment.rank == 0:
        _log.log(level, choice.reason)
    return choice
