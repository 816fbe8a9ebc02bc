"""Trains on the digits, several runs one after the other; run by test_synchronous_and_push_sum.

    baselines.py '{"NAME": ["key=value", ...], ...}'

The first word of a name is the algorithm; rank 1 of a run with `straggler` in its name is slow.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import mpi_dasgd
from mpi_dasgd import config, launch, world
from mpi_dasgd.tasks import data, models
from tests.support.pace import keep_pace


def main() -> None:
    """Run."""
    environment = world.start()
    environment.abort_on_exception()
    launch.ready()
    reports: dict[str, Any] = {}
    for name, overrides in json.loads(sys.argv[1]).items():
        reports[name] = _learn(environment, name, overrides)
    if environment.rank == 0:
        print(json.dumps(reports))


def _learn(environment: world.World, name: str, overrides: list[str]) -> dict[str, Any]:
    settings = config.load(None, [f"algorithm.name={name.split()[0]}", *overrides])
    task = data.load("digits", "mlp", 1)
    torch.manual_seed(1)
    model = models.build("mlp", task.features, task.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = mpi_dasgd.Decentralized(model, optimizer, config=settings, environment=environment)
    batches = data.Batches(task, 32, seed=1, rank=training.rank, ranks=training.size, sharded=False)
    while not training.finished:
        if name in ("osgp", "osgp remote"):  # the others wait for each other
            keep_pace(training)
        x, y = batches.batch(training.local.local_step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if "straggler" in name and training.rank == 1:
            time.sleep(0.02)
        training.step(len(x))
    training.finish()
    comm, counters = environment.comm, training.counters
    report = {
        "quanta": comm.allreduce(getattr(training.algorithm, "weight_quanta", 0)),
        "steps": comm.allgather(training.local.local_step),
        "messages": comm.allreduce(counters["messages"]),
        "absorbed": comm.allreduce(counters["absorbed"]),
        "path": training.endpoint.transfer_mode,
    }
    training.average()
    accuracy = (model(task.test_x).argmax(1) == task.test_y).float().mean().item()
    training.close()
    return {"accuracy": accuracy, **report}


main()
