"""Training of real ranks through the whole path of a GPU, on a CUDA of host memory.

``fake_gpu.py LIBCUDA KERNELS FOLDER|fail``: with the paths of a fake libcuda and of the kernels
compiled for the CPU. Nothing of the package is replaced but the answers to where the parameters
are, and to whether CUDA IPC works: the choice of the device, `CudaDevice`, `DeviceSlots`,
`Launched` and the launches of the codec are its own, and control words move late, by a thread.

Rank 0 prints what the ranks saw, as JSON: of exchanges whose sum must be kept, and of
``mpi-dasgd train`` on the host and on the device, with its results in FOLDER. With ``fail`` the
device of rank 1 fails in the midst of a training.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch
from torch import nn

import mpi_dasgd
from mpi_dasgd.config import load
from mpi_dasgd.device import binding, ipc_probe
from mpi_dasgd.device.ipc_probe import Verdict
from mpi_dasgd.training import rank_parts, trainer
from tests.support.fake_cuda import FakeCuda
from tests.support.mpi_ranks import ROOT
from tests.support.pace import in_pace

CONFIG = {"algorithm.name": "adpsgd", "codec.name": "lattice8", "device.share": True}
EXCHANGES = 200  # that each rank must have made
WARMED_UP = 40  # exchanges after which no event is created any more
OF_RANKS = ("absorbed", "messages", "steps", "buckets_corrupt", "buckets_decoded")
OF_RANKS += ("buckets_rejected",)


@contextlib.contextmanager
def on_gpu(libcuda: Path, kernels: Path) -> Iterator[FakeCuda]:
    """In the ``with`` block models that are on the CPU are exchanged as if they were on a GPU."""
    require, choose = binding.require_own_device, rank_parts.choose_device
    gpu = torch.device("cuda:0")
    with (
        FakeCuda(libcuda, kernels).installed() as cuda,
        mock.patch.object(torch.cuda, "is_available", lambda: False),  # of torch's own modules
        mock.patch.object(torch.cuda, "device_count", lambda: 0),
        mock.patch.object(
            binding, "require_own_device", lambda world, _, share: require(world, gpu, share)
        ),
        mock.patch.object(
            rank_parts, "choose_device", lambda world, _, *rest: choose(world, gpu, *rest)
        ),
        mock.patch.object(ipc_probe, "probe", lambda devices: Verdict(True, "on host memory")),
    ):
        cuda.runtime.libcuda.fake_cuda_delay(300)
        yield cuda
        cuda.runtime.libcuda.fake_cuda_drain()


class OwnLoop:
    """A training by a loop of one's own; its gradients are zero if they change nothing."""

    def __init__(self, world: Any, lr: float) -> None:
        self.world = world
        self.model = nn.Sequential(nn.Linear(200, 40), nn.ReLU(), nn.Linear(40, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.records: list[Any] = []
        self.training = mpi_dasgd.Decentralized(
            self.model,
            self.optimizer,
            config=CONFIG,
            environment=world,
            record=self.records.append,
        )

    def step(self) -> None:
        """Make a step."""
        self.optimizer.zero_grad()
        self.model(torch.ones(4, 200)).square().mean().backward()
        self.training.step(4)

    def models(self) -> np.ndarray:
        """Return the models of all ranks, (ranks, elements)."""
        own = np.concatenate([p.detach().numpy().ravel() for p in self.model.parameters()])
        return np.array(self.world.comm.allgather(own.astype(np.float64)))


def conserve(world: Any, cuda: FakeCuda) -> dict[str, Any]:
    """Exchange models that nothing else changes; return what became of their sum."""
    loop = OwnLoop(world, lr=0.0)
    training = loop.training
    with training.paused(), torch.no_grad():
        generator = torch.Generator().manual_seed(training.rank)
        for p in loop.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    before = loop.models()
    events = None
    for step in range(5000):  # a busy machine lets one rank run for long, and then another
        if step % 50 == 0 and min(world.comm.allgather(len(loop.records))) > EXCHANGES:
            break
        if events is None and len(loop.records) > WARMED_UP:
            events = len(cuda.runtime.of("eventCreateWithFlags"))
        loop.step()
    assert events is not None, "hardly any exchange"
    events = len(cuda.runtime.of("eventCreateWithFlags")) - events
    waits = cuda.runtime.of("deviceSynchronize")
    training.finish()
    after = loop.models()
    result = {
        "of_sum": float(np.abs(after.sum(0) - before.sum(0)).max() / np.abs(before.sum(0)).max()),
        "apart": [float(np.ptp(models, 0).max()) for models in (before, after)],
        "records": len(loop.records),
        "corrupt": int(training.codec.counters["buckets_corrupt"]),
        "kinds": [
            type(training.parameters.device).__name__,
            type(training.endpoint.release).__name__,
            training.endpoint.transfer_mode,
        ],
        "events_created_in_steps": events,
        "steps": training.local.local_step,
        "steps_of_optimizer": sum("sgd" in name for name in cuda.shim.launched),
        "waits_in_steps": len(cuda.runtime.of("deviceSynchronize")) - len(waits),
    }
    training.close()
    calls = Counter(call[0] for call in cuda.runtime.calls)
    return {**result, "calls": calls, "in_use": len(cuda.runtime.in_use)}


def train(world: Any, folder: Path, name: str) -> dict[str, Any]:
    """Train as ``mpi-dasgd train`` does; return what the results say."""
    overrides = [f"run.directory={folder}", f"run.name={name}", "budget.epochs=10"]
    overrides += ["codec.name=lattice8", "evaluation.count=2", "checkpoint.count=2"]
    overrides += ["device.share=true"]
    config = load(str(ROOT / "jobs" / "train.toml"), overrides)
    with mock.patch.object(binding, "device_of_rank", lambda _: "cpu"), in_pace():
        assert trainer.train(config, world) == 0
    world.comm.Barrier()
    with h5py.File(folder / name / "results.h5") as file:
        ranks = {name: file["ranks"][name][:].tolist() for name in OF_RANKS}
        accuracy = file["evaluation/test_accuracy"][:, -1].tolist()
        return {**ranks, "accuracy": accuracy, "transport": file.attrs["transport"]}


def fail(world: Any, cuda: FakeCuda) -> int:
    """Train until the device of rank 1 fails."""
    loop = OwnLoop(world, lr=0.1)
    for step in range(10_000):
        if (world.rank, step) == (1, 20):
            cuda.runtime.fail(719)
        loop.step()
    return 0


def main() -> None:
    """See the module."""
    libcuda, kernels, folder = map(Path, sys.argv[1:])
    world = rank_parts.start_world()
    with on_gpu(libcuda, kernels) as cuda:
        if folder.name == "fail":
            world.run(lambda: fail(world, cuda))
        report: dict[str, Any] = {"sum": conserve(world, cuda)}
    report["host"] = train(world, folder, "host")
    with on_gpu(libcuda, kernels):
        report["device"] = train(world, folder, "device")
    reports = world.comm.gather(report)
    if world.rank == 0:
        print(json.dumps(reports), flush=True)


if __name__ == "__main__":
    main()
