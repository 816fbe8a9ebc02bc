"""A rank of three ends while swaps of it wait for its device: the others must not wait for them.

Argument: how the last rank ends: `killed`, `fails` (its device does, in a step), `fails in close`.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI

from mpi_dasgd import Decentralized
from tests.support.late_training import late_training

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
LAST = Path(f"/proc/{MPI.COMM_WORLD.bcast(os.getpid(), root=SIZE - 1)}/stat")
STEPS = 60


def has_ended() -> bool:
    """Return whether the process of the last rank has."""
    try:
        return LAST.read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def main(end: str) -> None:
    """Train; the last rank claims, publishes and sends, and ends before its device has passed."""
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with late_training((0.002, 0.004), RANK):
        training = Decentralized(
            model, optimizer, config={"transport.heartbeat_timeout": 2, "codec.name": "none"}
        )
    device, release = training.endpoint._device, training.endpoint.release
    claims = 0
    for step in itertools.count():
        if RANK != SIZE - 1 and step >= STEPS and has_ended():
            break
        if RANK == SIZE - 1 and step == STEPS // 2:
            device._delays = (600.0, 600.0)
            training.endpoint.run_ahead.begin_step = lambda: None  # it claims all the same
            while not (release.is_pending and training.endpoint.counters.messages > claims):
                claims = training.endpoint.counters.messages
                train(model, training)
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "fails":
                device.fail()
                train(model, training)
            break
        train(model, training)
        time.sleep(0.002)
    if RANK == SIZE - 1:
        device.fail()
        device.close = device.check
        training.endpoint.close()
        raise AssertionError("not reached")
    training.close()
    print(f"rank {RANK} has finished")


def train(model: torch.nn.Module, training: Decentralized) -> None:
    """One step."""
    training.optimizer.zero_grad()
    (model(torch.randn(8, 8)) - RANK).pow(2).mean().backward()
    training.step(8)


if __name__ == "__main__":
    main(sys.argv[1])
