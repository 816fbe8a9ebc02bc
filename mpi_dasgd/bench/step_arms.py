"""What `bench step` compares: loops over the same model and batches, which differ in their step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from mpi_dasgd.bench.ddp import join_gloo
from mpi_dasgd.bench.step_job import DDP, LOCKSTEP, StepJob
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.workload import build_workload
from mpi_dasgd.world import World

__all__ = ["AllReduceArm", "Arm", "DdpArm", "DecentralizedArm", "PlainArm", "build_arm"]


class Arm:
    """A training loop of one rank, step by step. Construction is collective.

    Args:
        name: name of the arm, one of `mpi_dasgd.bench.step_job.ARMS`.
        job: what is measured.
        environment: the ranks of the job.

    Attributes:
        name: as given.
        in_lockstep: whether the ranks wait for each other in every step.
        shares_gradient: whether `compute_gradient` contains an exchange.
        workload: model, optimizer and batches of this rank.
        steps: steps that were begun.
        first_loss: loss of the first batch; NaN before.
    """

    shares_gradient = False

    def __init__(self, name: str, job: StepJob, environment: World) -> None:
        self.name = name
        self.in_lockstep = name in LOCKSTEP
        size = environment.size
        self.workload = build_workload(
            job.config(name), environment.rank, size, workers=range(size)
        )
        self.steps = 0
        self.first_loss = float("nan")

    def compute_gradient(self) -> None:
        """Compute the gradient of the next batch."""
        x, y = self.workload.batches.batch(self.steps)
        self.clear_gradient()
        loss = cross_entropy(self.network(x), y)
        loss.backward()
        self.steps += 1
        if self.steps == 1:
            self.first_loss = loss.item()

    @property
    def network(self) -> torch.nn.Module:
        """What the inputs go through."""
        return self.workload.model

    def clear_gradient(self) -> None:
        """Clear the gradient before the next, or between slices: it holds no memory then."""
        self.workload.optimizer.zero_grad()

    def apply_gradient(self) -> None:
        """Make the optimizer's step, and what exchange belongs to it."""
        self.workload.optimizer.step()

    @property
    def messages(self) -> int:
        """Messages that this rank has sent in exchanges so far."""
        return 0

    def close(self) -> None:
        """End the loop. Collective."""


class PlainArm(Arm):
    """A loop without any exchange, which begins from the weights of rank 0."""

    def __init__(self, name: str, job: StepJob, environment: World) -> None:
        super().__init__(name, job, environment)
        for parameter in self.workload.model.parameters():
            environment.comm.Bcast(parameter.detach().numpy())


class AllReduceArm(PlainArm):
    """Gradients lie in one vector, of which each step makes the mean by one MPI_Allreduce."""

    def __init__(self, name: str, job: StepJob, environment: World) -> None:
        super().__init__(name, job, environment)
        self._comm = environment.comm.Dup()
        parameters = list(self.workload.model.parameters())
        self._gradient = torch.zeros(sum(parameter.numel() for parameter in parameters))
        parts = self._gradient.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def clear_gradient(self) -> None:
        self._gradient.zero_()

    def apply_gradient(self) -> None:
        from mpi4py import MPI

        self._comm.Allreduce(MPI.IN_PLACE, self._gradient.numpy())
        self._gradient /= self._comm.size
        super().apply_gradient()

    def close(self) -> None:
        self._comm.Free()


class DdpArm(Arm):
    """torch's DistributedDataParallel, whose backward pass contains the all-reduce."""

    shares_gradient = True

    def __init__(self, name: str, job: StepJob, environment: World) -> None:
        super().__init__(name, job, environment)
        self._ddp = DistributedDataParallel(self.workload.model, gradient_as_bucket_view=True)

    @property
    def network(self) -> torch.nn.Module:
        return self._ddp


class DecentralizedArm(Arm):
    """A loop with `Decentralized`."""

    def __init__(self, name: str, job: StepJob, environment: World) -> None:
        super().__init__(name, job, environment)
        self._training = Decentralized(
            self.workload.model,
            self.workload.optimizer,
            config=job.config(name),
            environment=environment,
        )
        self._samples = len(self.workload.batches.batch(0)[1])

    def apply_gradient(self) -> None:
        self._training.step(self._samples)

    @property
    def messages(self) -> int:
        return int(self._training.counters["messages"])

    def close(self) -> None:
        self._training.close()


def build_arm(name: str, job: StepJob, environment: World, directory: Path) -> Arm:
    """Build an arm. Collective.

    Args:
        name: one of `mpi_dasgd.bench.step_job.ARMS`.
        job: what is measured.
        environment: the ranks of the job.
        directory: directory of the job.
    """
    if name == DDP:
        if not dist.is_initialized():
            join_gloo(directory, environment.rank, environment.size)
        return DdpArm(name, job, environment)
    if name == "allreduce":
        return AllReduceArm(name, job, environment)
    exchanges = job.config(name).algorithm.name != "alone"
    return (DecentralizedArm if exchanges else PlainArm)(name, job, environment)
