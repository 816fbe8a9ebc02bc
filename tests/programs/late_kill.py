"""The last rank is killed by `kill -9` while its device writes: the others finish without it.

    late_kill.py host|ipc

Rank 0 prints JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpi_dasgd import Decentralized, world
from tests.programs.late_soak import Vector
from tests.support.late_codec import LateCodec
from tests.support.late_training import GridSteps, late_training

DELAYS = (1e-3, 4e-3)
STEPS_UNTIL_DEATH, EXCHANGES_AFTER = 20, 10


def kill_during(codec: LateCodec, launches: int) -> None:
    """Have this process killed when its device has written half of what launch `launches` does."""
    submit = codec._queue.submit

    def submit_and_die(work) -> None:  # type: ignore[no-untyped-def]
        def half() -> None:
            if codec.work.launches == launches:
                os.kill(os.getpid(), signal.SIGKILL)
            work()

        submit(half)

    codec._queue.submit = submit_and_die  # type: ignore[method-assign]


def main() -> None:
    """Train, and go on for a while after the death."""
    torch.set_num_threads(1)
    environment = world.start()
    rank, victim = environment.rank, environment.size - 1
    model = Vector(5000, seed=1)
    optimizer = GridSteps([model.x], seed=rank)
    model.x.grad = torch.zeros_like(model.x)
    settings = {"algorithm.name": "adpsgd", "transport.heartbeat_timeout": 2.5}
    with late_training(DELAYS, rank, memory=sys.argv[1]) as codecs:
        training = Decentralized(model, optimizer, config=settings, environment=environment)
    if rank == victim:
        kill_during(codecs[0], STEPS_UNTIL_DEATH)
    membership = training.endpoint.membership
    deadline = time.monotonic() + 30
    while not membership.dead and time.monotonic() < deadline:
        training.step(0)
    sent = training.counters["messages"]
    # As samples they tell each other their exchanges: each goes on until all have made enough.
    while min(membership.samples[:victim]) < EXCHANGES_AFTER and time.monotonic() < deadline:
        training.step(training.counters["messages"] - sent - training.samples)
        training.endpoint.refresh_membership()
    training.finish()
    report = {
        "dead": sorted(membership.dead),
        "sent": training.counters["messages"] - sent,
        "enough": EXCHANGES_AFTER,
        "wrong": codecs[0].work.wrong,
        "launches": codecs[0].work.launches,
    }
    print(json.dumps({str(rank): report}), flush=True)
    training.close()


if __name__ == "__main__":
    main()
