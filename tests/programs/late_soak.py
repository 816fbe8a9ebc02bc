"""Soak of training on late devices: the order of control words, under as much traffic as one likes.

    mpi-dasgd launch -n 4 tests/programs/late_soak.py --seconds 120

Each algorithm trains with each codec for its share of the time. Steps make known changes that keep
the models apart, so that their sum at the end tells whether every delta was added once; with the
codec `grid` no addition rounds, and the sum must be exact. A required swap that fails ends the
program. Rank 0 prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpi_dasgd import Decentralized, launch, world
from mpi_dasgd.codecs import Codec
from tests.programs.conservation import GridCodec
from tests.support.late_faults import AT_ONCE, make_hasty
from tests.support.late_training import GRID, GridSteps, late_training


class Vector(torch.nn.Module):
    """A model of one vector, at random multiples of `GRID`."""

    def __init__(self, elements: int, seed: int) -> None:
        super().__init__()
        values = np.random.default_rng(seed).integers(-256, 257, elements) * GRID
        self.x = torch.nn.Parameter(torch.tensor(values, dtype=torch.float32))


def soak(
    environment: world.World,
    options: argparse.Namespace,
    algorithm: str,
    codec: str,
    memory: str,
    longest: float,
) -> dict[str, Any]:
    """Train, and return what all ranks found. Collective.

    Args:
        environment: the ranks.
        options: of the program; `seconds` are those of this case.
        algorithm, codec, memory: what is trained with.
        longest: longest delay of a device, seconds.
    """
    comm, rank = environment.comm, environment.rank
    model = Vector(options.elements, seed=1)
    optimizer = GridSteps([model.x], seed=100 * options.seed + rank)
    model.x.grad = torch.zeros_like(model.x)

    def grid(elements: int, dtype: np.dtype) -> Codec:
        return GridCodec(elements, dtype)

    settings: dict[str, Any] = {
        "algorithm.name": algorithm,
        "codec.name": "none" if codec == "grid" else codec,
        "run.seed": options.seed,
        "transport.publication_slots": 6,
        "transport.heartbeat_timeout": 60.0,
    }
    if algorithm == "swarm":
        settings |= {"algorithm.local_steps": 3}
    make_codec = grid if codec == "grid" else None
    with late_training(
        (longest / 20, longest), rank, memory=memory, make_codec=make_codec
    ) as codecs:
        training = Decentralized(model, optimizer, config=settings, environment=environment)
    if options.at_once:
        make_hasty(training.endpoint, options.at_once)
    before = model.x.detach().double().clone()
    comm.Barrier()
    started, largest, rounds = time.monotonic(), 0.0, 0
    # On a busy machine one rank may be alone for all of that time.
    while rounds < 20 and comm.allreduce(training.counters["messages"]) < options.exchanges:
        rounds += 1
        ends = time.monotonic() + options.seconds
        while time.monotonic() < ends:
            training.step()
            largest = max(largest, float(model.x.detach().abs().max()))
    training.finish()
    seconds = time.monotonic() - started
    error = (model.x.detach().double() - before - optimizer.change).numpy()
    total = np.zeros_like(error)
    comm.Allreduce(error, total)
    counters, (late,) = training.counters, codecs
    training.close()
    steps = comm.allreduce(training.local.local_step)
    largest = comm.allreduce(largest, MPI.MAX)
    roundings = 2 * comm.allreduce(counters["messages"]) + 4 * steps
    return {
        "algorithm": algorithm,
        "codec": codec,
        "memory": memory,
        "path": training.endpoint.transfer_mode,
        "longest": longest,
        "seconds": round(seconds, 1),
        "steps": steps,
        "launches": comm.allreduce(late.work.launches),
        "exchanges": int(comm.allreduce(counters["messages"])),
        "absorbed": int(comm.allreduce(counters["absorbed"])),
        "skipped": int(comm.allreduce(counters["skipped"])),
        "unpublished": int(comm.allreduce(counters["publications_skipped"])),
        "given_back": comm.allreduce(late.work.given_back),
        "taken_away": comm.allreduce(late.work.taken_away),
        "outside": comm.allreduce(late.work.outside),
        "corrupt": int(comm.allreduce(counters.get("buckets_corrupt", 0))),
        "error": float(np.abs(total).max()),
        "tolerance": roundings * float(np.finfo(np.float32).eps) * largest,
        "size": comm.allreduce(float(model.x.detach().abs().mean())) / comm.size,
    }


def main() -> None:
    """Soak each algorithm with each codec."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="in all")
    parser.add_argument(
        "--exchanges", type=int, default=20, help="of a case; it goes on until there are as many"
    )
    parser.add_argument("--algorithms", nargs="+", default=["adpsgd", "swarm"])
    parser.add_argument("--codecs", nargs="+", default=["grid", "lattice8", "none"])
    parser.add_argument("--memories", nargs="+", default=["host", "ipc"])
    parser.add_argument(
        "--longest", type=float, nargs="+", default=[3e-3, 20e-3], help="delays, seconds"
    )
    parser.add_argument("--elements", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", choices=AT_ONCE, help="a mistake: see late_faults.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    launch.setting_up()
    environment = world.start()
    launch.ready()
    choices = options.algorithms, options.codecs, options.memories, options.longest
    cases = list(itertools.product(*choices))
    options.seconds /= len(cases)
    reports = [soak(environment, options, *case) for case in cases]
    if environment.rank == 0:
        print(json.dumps(reports), flush=True)


if __name__ == "__main__":
    main()
