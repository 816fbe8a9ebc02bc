"""Training on a late device has the bits of training on the host, if the ranks step in turn.

    late_bits.py [ALGORITHM CODEC]...

Each case trains on the host, on a `LateDevice` without a delay, and on one whose work comes later,
where the turn passes on when the device is done: on all three the same models must come out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpi_dasgd import Decentralized, world
from tests.support.late_training import late_training

STEPS = 12
DELAYS = (None, (0.0, 0.0), (2e-4, 2e-3))


def train(environment: world.World, settings: dict[str, Any], delays: Any) -> list[np.ndarray]:
    """Train in turn; return the parameters after each step, after the end, and their mean."""
    comm, rank = environment.comm, environment.rank
    torch.manual_seed(1)
    # Parameters of other lengths lie elsewhere on a device, where they begin at multiples of 4.
    model = torch.nn.Sequential(torch.nn.Linear(40, 52), torch.nn.Tanh(), torch.nn.Linear(52, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = torch.Generator().manual_seed(100 + rank)
    rows: list[np.ndarray] = []

    def note() -> None:
        rows.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy())

    def build() -> Decentralized:
        return Decentralized(model, optimizer, config=settings, environment=environment)

    if delays is None:
        training, codecs = build(), []
    else:
        with late_training(delays, rank) as codecs:
            training = build()
    training.codec.settle()
    comm.Barrier()
    for _ in range(STEPS):
        for turn in range(comm.size):
            if turn == rank:
                optimizer.zero_grad()
                x = torch.randn(16, 40, generator=batches)
                model(x).square().mean().backward()
                training.step(16)
                training.codec.settle()
                while not training.endpoint.is_flushed():
                    pass
                note()
            comm.Barrier()
    training.finish()
    note()
    training.average()
    note()
    exchanges = comm.allreduce(training.counters["messages"])
    training.close()
    assert exchanges > 2 * comm.size, "hardly any exchange"
    for codec in codecs:
        assert codec.work.launches and not codec.work.wrong and not codec.work.outside
    return rows


def main() -> None:
    """Compare each case."""
    torch.set_num_threads(1)
    environment = world.start()
    for algorithm, codec in zip(*[iter(sys.argv[1:])] * 2, strict=True):
        settings = {"algorithm.name": algorithm, "codec.name": codec}
        if algorithm == "swarm":
            settings |= {"algorithm.local_steps": "2"}
        host, *others = [train(environment, settings, delays) for delays in DELAYS]
        for delays, rows in zip(DELAYS[1:], others, strict=True):
            for step, (row, expected) in enumerate(zip(rows, host, strict=True)):
                differ = int((row.view(np.uint32) != expected.view(np.uint32)).sum())
                assert not differ, f"{algorithm} {codec} {delays} {step}: {differ} elements differ"


if __name__ == "__main__":
    main()
