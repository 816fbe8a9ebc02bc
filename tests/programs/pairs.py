"""Stress of `RmaEndpoint` as algorithms use it: begin, commit or abort an exchange, and end a run.

Each rank publishes, exchanges with any free neighbour and sends a stamped message back, until all
ranks together have exchanged often enough. The end is that of `Decentralized`: no barrier, but the
status words. Rank 0 prints what was found and done as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[2]))
from mpi_dasgd import topology
from mpi_dasgd.config.schema import TransportConfig
from mpi_dasgd.transport.endpoint import ExchangeRequest
from mpi_dasgd.transport.membership import FINISHED, RUNNING
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
from tests.programs.ledger import Ledger, fill, layout, staging
from tests.support.sleeping_rank import SleepingRank


class Rank:
    """One rank of the stress.

    Args:
        comm: communicator of all ranks.
        options: arguments of the program.
    """

    def __init__(self, comm: MPI.Intracomm, options: argparse.Namespace) -> None:
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.options = options
        self.most = 50 * options.exchanges  # versions of a rank, many of which no rank claims
        self.ledger = Ledger(self.rank, self.size, self.most)
        self.random = random.Random(1000 * options.seed + self.rank)
        self.endpoint = RmaEndpoint(
            comm,
            layout(options.elements),
            topology.build("complete", self.size),
            TransportConfig(mode=options.path, heartbeat_timeout=60.0),
        )
        self.request: ExchangeRequest | None = None
        self.out = staging(options.elements)
        self.slept = not (options.sleep and self.rank == self.size - 1)
        self.sleeping = SleepingRank(options.until_read)
        self.asleep = (0.0, 0.0)
        self.touched: list[float] = []  # when a read of the last rank was complete

    def run(self) -> dict:
        """Exchange until all have done so often enough, then return what all ranks found."""
        endpoint, membership = self.endpoint, self.endpoint.membership
        self.publish()
        self.comm.Barrier()
        start = time.monotonic()
        deadline = start + self.options.limit
        while membership.total_samples < self.options.exchanges and time.monotonic() < deadline:
            self.turn()
        self.ledger.found["stalled"] += membership.total_samples < self.options.exchanges
        while self.request is not None and not self.request.is_settled:
            time.sleep(0.0005)
        if self.request is not None:
            endpoint.abort_exchange(self.request)
        while not endpoint.is_flushed():
            time.sleep(0.0005)
        membership.publish_status(FINISHED)
        while RUNNING in membership.status:
            endpoint.refresh_membership()
            self.receive()
            self.read()
            time.sleep(0.0005)
        self.receive()
        seconds = time.monotonic() - start
        endpoint.close()
        found, done = self.ledger.balance(self.comm)
        sleep = self.comm.bcast(self.asleep, root=self.size - 1)
        totals = self.comm.gather(endpoint.total_counters().as_dict())
        during = sum(sleep[0] < moment < sleep[1] for moment in self.touched)
        return {
            "found": dict(found),
            "done": dict(done),
            "counters": {k: sum(t[k] for t in totals) for k in totals[0]} if totals else {},
            "touched": self.comm.allreduce(during),
            "seconds": seconds,
            "path": endpoint.transfer_mode,
        }

    def turn(self) -> None:
        """One turn of the loop, in the order of `ADPSGD`."""
        endpoint, chance = self.endpoint, self.random.random
        self.receive()
        if self.request is None:
            neighbours = list(endpoint.neighbours())
            self.random.shuffle(neighbours)
            self.request = endpoint.begin_exchange(neighbours)
        if self.request.is_settled:
            self.end_exchange(self.request)
            self.request = None
        elif chance() < 0.5:
            time.sleep(1e-4)  # a rank that waits for its progress thread computes gradients
        self.publish()
        if chance() < 0.2:
            self.read()
        endpoint.membership.report_samples(self.ledger.done["sent"])
        endpoint.refresh_membership()
        if not self.slept and 4 * endpoint.membership.total_samples > self.options.exchanges:
            self.slept = True
            self.asleep = self.sleeping.sleep(self.options.sleep)

    def rest(self) -> None:
        """Rest in the middle of a slot, mostly not at all."""
        if self.random.random() < self.options.pause:
            time.sleep(0.0005)

    def publish(self) -> None:
        """Publish the next version, if there is a slot."""
        message = self.endpoint.publication.reserve()
        if message is not None and self.ledger.published < self.most:
            fill(message, self.rank, self.ledger.version(), self.rest)
            self.endpoint.publication.publish()
            self.ledger.publish()

    def end_exchange(self, request: ExchangeRequest) -> None:
        """Check the partner's publication, and commit or abort the exchange."""
        claim, model, delta = request.claim, request.partner_model, request.partner_delta
        if claim is None or model is None or delta is None:
            self.ledger.done["alone"] += 1
            time.sleep(5e-5)  # on few cores the others need this one
            return
        self.ledger.claim(claim, model)
        if self.random.random() < 0.1:
            fill(delta, self.rank, self.ledger.cancelled(), self.rest)
            self.ledger.check_claimed(claim, model)
            self.endpoint.abort_exchange(request)
            self.ledger.done["aborted"] += 1
        else:
            fill(delta, self.rank, self.ledger.message(claim.rank), self.rest)
            self.ledger.check_claimed(claim, model)
            self.endpoint.commit_exchange(request)
            self.ledger.send(claim.rank)

    def receive(self) -> None:
        """Receive the messages that have arrived."""
        for received in self.endpoint.inbox.receive():
            self.ledger.receive(received.sender, received.message)
            self.endpoint.inbox.free(received)

    def read(self) -> None:
        """Copy the newest version of another rank, unclaimed."""
        other = self.random.choice([rank for rank in range(self.size) if rank != self.rank])
        is_last = other == self.size - 1
        with self.sleeping.reading() if is_last else nullcontext():
            if self.endpoint.publication.read(other, self.out):
                self.ledger.read(other, self.out)
            if is_last:
                self.touched.append(time.monotonic())


def main() -> None:
    """Stress the endpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--exchanges", type=int, default=10_000, help="of all ranks together")
    parser.add_argument(
        "--elements", type=int, default=1016, help="elements of a message, 8 bytes each"
    )
    parser.add_argument("--path", default="auto", help="auto, shared_memory or rma")
    parser.add_argument("--pause", type=float, default=0.002, help="fraction of slots to rest in")
    parser.add_argument(
        "--sleep", type=float, default=0.0, help="seconds outside MPI of the last rank"
    )
    parser.add_argument("--until-read", help="folder; it sleeps on until others have read of it")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds in all")
    parser.add_argument("--seed", type=int, default=0)
    comm = MPI.COMM_WORLD
    report = Rank(comm, parser.parse_args()).run()
    if comm.rank == 0:
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
