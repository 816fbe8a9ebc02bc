"""Train the given variants on the digits for some epochs; rank 0 prints the mean models' accuracy.

Arguments: name, variant, graph or edge file, in turns. All variants run in one job, as most of a
test's time is imports.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.nn.functional import cross_entropy

from mpi_dasgd import Decentralized, config, launch, world
from mpi_dasgd.tasks import data, models

EPOCHS = 8


def _graph(name: str) -> list[str]:
    if name.endswith(".txt"):
        return ["topology.graph=edge_list", f"topology.file={name}"]
    return [f"topology.graph={name}"]


def main() -> None:
    """Train with each variant, on all ranks."""
    launch.setting_up()
    environment = world.start()
    launch.ready()
    comm = environment.comm
    task = data.load("digits", "mlp", 1)
    found = {}
    for name, variant, graph in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        settings = config.load(
            None,
            [
                f"algorithm.name={name}", f"algorithm.variant={variant}", *_graph(graph),
                f"budget.samples={EPOCHS * len(task.train_x)}", "codec.name=auto",
            ],
        )  # fmt: skip
        torch.manual_seed(1)
        model = models.build("mlp", task.features, task.classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = data.Batches(task, 32, seed=1, rank=comm.rank, ranks=comm.size, sharded=False)
        training = Decentralized(model, optimizer, config=settings, environment=environment)
        while not training.finished:
            x, y = batches.batch(training.local.local_step)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            training.step(len(x))
        training.finish()
        training.average()
        accuracy = (model(task.test_x).argmax(1) == task.test_y).float().mean().item()
        found[variant] = {
            "accuracy": accuracy,
            "steps": comm.gather(training.local.local_step),
            "waited": comm.allreduce(training.wait_seconds),
            "messages": comm.allreduce(training.counters["messages"]),
        }
        training.close()
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
