"""Ranks use accelerate: loaders, operations on all processes, and a training with `attach`."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import torch
from accelerate import Accelerator
from mpi4py import MPI
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

import mpi_dasgd
from mpi_dasgd.errors import UserError
from mpi_dasgd.integrations.accelerate import use_mpi_ranks
from tests.support.mpi_ranks import parallel_assert

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size


class Stream(IterableDataset):
    """The numbers below 20."""

    def __iter__(self):
        return iter(range(20))


def check(condition: bool, message: str) -> None:
    parallel_assert(COMM, condition, message)


def check_state(accelerator: Accelerator) -> None:
    check(not torch.distributed.is_initialized(), "there is a process group")
    check(os.environ.get("PMI_SIZE") == str(SIZE), "the variables of the launcher are there again")
    check((accelerator.num_processes, accelerator.process_index) == (SIZE, RANK), "numbers")
    check(accelerator.is_main_process == (RANK == 0), "main process")
    ran: list[int] = []
    accelerator.on_main_process(ran.append)(1)
    check(len(ran) == (RANK == 0), "on_main_process")


def check_operations(accelerator: Accelerator) -> None:
    mine = torch.tensor([RANK, 10 * RANK])
    check(accelerator.gather(mine).tolist() == [x for r in range(SIZE) for x in (r, 10 * r)], "1")
    half = torch.tensor(RANK, dtype=torch.bfloat16)
    check(accelerator.gather({"a": half})["a"].tolist() == list(range(SIZE)), "scalars, types")
    check(accelerator.reduce(mine, "sum").tolist() == [1, 10] if SIZE == 2 else True, "sum")
    check(accelerator.reduce(mine, "mean").tolist() == [0.5, 5] if SIZE == 2 else True, "mean")
    padded = accelerator.pad_across_processes(torch.ones(RANK + 1))
    check(padded.shape == (SIZE,) and padded.sum() == RANK + 1, "pad_across_processes")
    texts = accelerator.gather_for_metrics([f"text {RANK}"])
    check(texts == [f"text {rank}" for rank in range(SIZE)], "objects")
    with contextlib.suppress(UserError):
        accelerator.gather(torch.ones(RANK + 1))
        check(False, "tensors of different shapes are refused")
    with accelerator.main_process_first():
        times = (time.monotonic(), time.sleep(0.1), time.monotonic())
    ends = COMM.allgather(times)
    check(all(ends[0][2] <= other[0] for other in ends[1:]), "the main process is first")


def check_loaders(accelerator: Accelerator) -> None:
    torch.manual_seed(RANK)  # each rank on its own
    numbers = TensorDataset(torch.arange(32))
    samplers = {
        "shuffle": {"shuffle": True},
        "weighted": {"sampler": WeightedRandomSampler([1] * 32, 32, replacement=False)},
        "sharded before": {"sampler": DistributedSampler(numbers, SIZE, RANK)},
        "in order": {},
    }
    for name, how in samplers.items():
        loader = accelerator.prepare(DataLoader(numbers, 4, **how))
        orders = []
        for _epoch in range(2):
            mine = torch.cat([batch[0] for batch in loader]).tolist()
            orders.append(mine)
            every = sorted(x for part in COMM.allgather(mine) for x in part)
            check(every == list(range(32)), f"{name}: shards {every}")
        check(len(loader) == 32 // 4 // SIZE, f"{name}: length")
        if name in ("shuffle", "weighted"):
            check(orders[0] != orders[1], f"{name}: another order in each epoch")
    mine = torch.cat(list(accelerator.prepare(DataLoader(Stream(), 5)))).tolist()
    check(sorted(x for part in COMM.allgather(mine) for x in part) == list(range(20)), "stream")
    whole = accelerator.prepare(DataLoader(TensorDataset(torch.arange(11)), 4))
    kept = torch.cat([accelerator.gather_for_metrics(batch[0]) for batch in whole])
    check(kept.tolist() == list(range(11)), "metrics of each sample, once")


def check_training(accelerator: Accelerator) -> None:
    """Of `allreduce` with accumulation: the steps of one process with all batches."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(48, 6, generator=generator), torch.randn(48, 2, generator=generator)
    plain, model = torch.nn.Linear(6, 2), torch.nn.Linear(6, 2)
    plain.load_state_dict(COMM.bcast(model.state_dict()))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(reference, 2, 0.5)
    for inputs, targets in zip(x.split(4 * SIZE), y.split(4 * SIZE), strict=True):
        reference.zero_grad()
        torch.nn.functional.mse_loss(plain(inputs), targets).backward()
        reference.step()
        schedule.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    # In two batches of 2 on each rank, so that a step has the same samples as above.
    order = np.arange(48).reshape(-1, SIZE, 2, 2).transpose(0, 2, 1, 3).reshape(-1)
    loader = DataLoader(TensorDataset(x[order], y[order]), 2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    check(type(model) is torch.nn.Linear, "the model is wrapped")
    with mpi_dasgd.attach(model, optimizer, "allreduce") as training:
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
    check(training.local.local_step == 48 // 4 // SIZE, "one step per accumulated gradient")
    distance = max(
        (a - b).abs().max() for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    check(distance < 1e-6, f"not the model of one process: {distance}")


use_mpi_ranks()
os.environ["ACCELERATE_USE_CPU"] = "true"  # with which accelerate looks for MPI by itself
accelerator = Accelerator(gradient_accumulation_steps=2)
check_state(accelerator)
check_operations(accelerator)
check_loaders(accelerator)
check_training(accelerator)
