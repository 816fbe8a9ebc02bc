"""Blocking variants on real windows: conservation of the sum, then the death of a rank.

As in `conservation.py`, every step changes the model by something known that keeps the models
apart, and at the end the models must add up to what they were plus all changes. Each part ends as
`Decentralized` does. In the last two parts the last rank is killed in the middle of the first, and
is dead all through the second: the others must go on. Rank 0 prints JSON; ranks end without
MPI_Finalize, which would wait for the dead.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

from mpi_dasgd import algorithms, codecs, topology
from mpi_dasgd.algorithms.records import ExchangeRecord
from mpi_dasgd.config.schema import AlgorithmConfig, CodecConfig, TransportConfig
from mpi_dasgd.transport.membership import FINISHED, RUNNING
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint

ELEMENTS = 2048
NAMES = {"bipartite": "adpsgd", "blocking": "swarm"}


class Local:
    """Training without gradients; `change` is the sum of all changes that its steps made."""

    def __init__(self, x: np.ndarray, rng: np.random.Generator) -> None:
        self.local_step = 0
        self.gradient = np.zeros(0)
        self.change = np.zeros(x.size)
        self._x = x
        self._rng = rng

    def fused_update(self, lr_scale: float = 1.0) -> None:
        """Return None: steps are made by `apply`."""

    def apply(self, lr_scale: float = 1.0) -> None:
        """One step: pull the model back, and add noise."""
        before = self._x.copy()
        self._x *= np.float32(0.9)
        self._x += self._rng.normal(size=self._x.size).astype(np.float32)
        self.change += self._x.astype(np.float64) - before


class Part:
    """One run of one variant."""

    def __init__(self, comm: MPI.Intracomm, variant: str, path: str, codec: str) -> None:
        self.name = f"{variant} {path} {codec}"
        graph = topology.build("ring" if variant == "bipartite" else "complete", comm.size)
        rng = np.random.default_rng([7, comm.rank])
        self.x = rng.normal(size=ELEMENTS).astype(np.float32)
        self.before = self.x.astype(np.float64)
        self.local = Local(self.x, rng)
        made = codecs.make(CodecConfig(name=codec), ELEMENTS, self.x.dtype, seed=1, rank=comm.rank)
        self.endpoint = RmaEndpoint(
            comm, made.layout, graph, TransportConfig(mode=path, heartbeat_timeout=2.0)
        )
        self.records: list[ExchangeRecord] = []
        settings = AlgorithmConfig(name=NAMES[variant], variant=variant)
        self.algorithm = algorithms.find(NAMES[variant], variant)(
            self.endpoint, made, self.x, settings, random.Random(comm.rank), self.records.append
        )
        self.algorithm.start()
        comm.Barrier()

    def run(self, steps: int, dies_at: int = 0) -> None:
        """Make `steps` steps and end; be killed at step `dies_at`."""
        local, membership = self.local, self.endpoint.membership
        dice = random.Random(membership._rank)
        while local.local_step < steps:
            local.local_step += 1
            for pending in self.algorithm.step(local):
                self._wait(pending.test)
            if local.local_step == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(dice.expovariate(1e4))
            self.endpoint.refresh_membership()
        for pending in self.algorithm.finalize():
            self._wait(pending.test)
        self._wait(self.endpoint.is_flushed)
        membership.publish_status(FINISHED)
        while not (self._quiet() and self.algorithm.is_drained):
            self.algorithm.absorb(local.local_step)
            self.endpoint.refresh_membership()
            time.sleep(0.0005)
        self.algorithm.absorb(local.local_step)

    def _wait(self, done) -> None:  # type: ignore[no-untyped-def]
        while not done():
            self.endpoint.refresh_membership()
            time.sleep(0.0001)

    def _quiet(self) -> bool:
        membership = self.endpoint.membership
        return all(
            status != RUNNING or rank in membership.dead
            for rank, status in enumerate(membership.status)
        )


def main() -> None:
    """Run all parts; arguments: steps of a rank, in the parts without and with a death."""
    comm = MPI.COMM_WORLD
    steps, steps_until_end = map(int, sys.argv[1:])
    reports = {}
    for variant in NAMES:
        for path, codec in (("auto", "lattice8"), ("rma", "none")):
            part = Part(comm, variant, path, codec)
            start = time.monotonic()
            part.run(steps)
            seconds = time.monotonic() - start
            part.endpoint.close()
            total = np.zeros(ELEMENTS)
            comm.Allreduce(part.x.astype(np.float64) - part.before - part.local.change, total)
            reports[part.name] = {
                "error": float(np.abs(total).max()),
                "apart": comm.allreduce(float(np.abs(part.x - comm.bcast(part.x)).max()), MPI.MAX),
                "exchanges": comm.allreduce(sum(r.kind == 0 for r in part.records)),
                "steps": comm.gather(part.local.local_step),
                "seconds": seconds,
            }
    last = [Part(comm, variant, "auto", "none") for variant in NAMES]
    victim = comm.size - 1
    for part in last:
        part.run(steps_until_end, dies_at=steps_until_end // 2 if comm.rank == victim else 0)
        reports[f"{part.name}, a death"] = {
            "dead": sorted(part.endpoint.membership.dead),
            "with others": sum(r.partner not in (-1, victim) for r in part.records),
        }
    if comm.rank == 0:
        print(json.dumps(reports), flush=True)
    # No rank may end while others use its memory; the dead cannot take part in a barrier.
    time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main()
