"""Stress of Publication and Inbox by real processes, at random and as fast as they go.

    mpi-dasgd's launcher, or mpiexec -n 4 python tests/transport/stress.py --publications 100000

All ranks publish, read, claim, send, cancel and receive in a loop until their shares of the
publications and messages are done. Owners rest in mid-slot, receivers let their inbox fill up, and
the last rank makes no MPI call for a while. Rank 0 prints what was found and done as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[1]))
from transport.faults import FAULTS
from transport.ledger import Ledger, fill, layout, staging

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.courier import Courier
from mpi_dasgd.transport.inbox import Inbox, Reservation
from mpi_dasgd.transport.publication import Claim, Publication
from mpi_dasgd.transport.windows import WindowSlots, WindowWords
from mpi_dasgd.transport.words import WordMap


class Rank:
    """One rank of the stress.

    Args:
        comm: communicator of all ranks.
        options: arguments of the program.
        publication, inbox: the protocols to stress.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        options: argparse.Namespace,
        publication: type[Publication] = Publication,
        inbox: type[Inbox] = Inbox,
    ) -> None:
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.options = options
        self.publications = -(-options.publications // self.size)
        self.messages = -(-options.messages // self.size)
        self.ledger = Ledger(self.rank, self.size, max(self.publications, self.messages) + 1)
        self.counters = Counters()
        self.random = random.Random(1000 * options.seed + self.rank)
        where = WordMap(options.slots, options.slots)
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.words = WindowWords(comm, where.count)
        self.slots = WindowSlots(
            comm, node, layout(options.elements), 2 * options.slots, options.path
        )
        node.Free()
        self.publication = publication(
            self.words, self.slots, where, self.rank, self.counters, held=options.slots - 2
        )
        self.inbox = inbox(self.words, self.slots, where, self.rank, self.counters)
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.out, self.theirs, self.reply = (staging(options.elements) for _ in range(3))
        self.claims: list[Claim] = []
        self.deaf = 0  # turns for which nothing is received
        self.asleep = (0.0, 0.0)
        self.touched: list[float] = []  # when a read of the last rank was complete
        self.longest = 0.0

    def run(self) -> dict:
        """Do this rank's share, wait for the others, and return what all ranks found."""
        courier = None
        if len(self.slots.near) < self.size:
            sys.setswitchinterval(0.0005)
            courier = Courier(lambda: None, 1.0, self.comm.Iprobe)
        self.comm.Barrier()
        begun = time.monotonic()
        deadline = begun + self.options.limit
        while not self.through() and time.monotonic() < deadline:
            self.turn()
        self.ledger.found["stalled"] += not self.through()
        while self.claims:
            self.release()
        everyone = self.comm.Ibarrier()
        while not everyone.Test():
            self.receive()
            self.read(self.random.choice(self.others))
            time.sleep(0.0005)
        seconds = time.monotonic() - begun
        while self.receive():
            pass
        for owner, version in enumerate(self.comm.allgather(self.ledger.published)):
            if owner != self.rank:
                self.read(owner)
                self.ledger.newest(owner, version)
        self.comm.Barrier()
        if courier is not None:
            courier.check()
            courier.close()
        found, done = self.ledger.balance(self.comm)
        sleeps = self.comm.bcast(self.asleep, root=self.size - 1)
        during = sum(sleeps[0] < moment < sleeps[1] for moment in self.touched)
        report = {
            "found": dict(found),
            "done": dict(done),
            "refusals": self.comm.allreduce(self.counters.refusals),
            "taken": self.comm.allreduce(self.counters.taken),
            "retries": self.comm.allreduce(self.counters.retries),
            "skipped": self.comm.allreduce(self.counters.publications_skipped),
            "touched": self.comm.allreduce(during),
            "longest": self.comm.allreduce(self.longest, MPI.MAX),
            "seconds": seconds,
            "path": self.slots.describe,
        }
        self.slots.close()
        self.words.close()
        return report

    def through(self) -> bool:
        """Whether this rank's share is done."""
        mine = self.ledger
        return mine.published >= self.publications and mine.done["sent"] >= self.messages

    def turn(self) -> None:
        """One turn of the loop: a little of everything."""
        chance = self.random.random
        self.publish()
        if self.ledger.done["sent"] < self.messages:
            self.send(self.random.choice(self.others))
        if chance() < self.options.pause / 10:
            self.deaf = 20
        if self.deaf:
            self.deaf -= 1
        else:
            self.receive()
        if chance() < 0.5:
            self.claim(self.random.choice(self.others))
        if chance() < 0.3:
            self.read(self.random.choice(self.others))
        if self.claims and (len(self.claims) > 2 or chance() < 0.5):
            self.release()
        third = 3 * self.ledger.published > self.publications
        if third and self.rank == self.size - 1 and not self.asleep[1]:
            begun = time.monotonic()
            time.sleep(self.options.sleep)
            self.asleep = begun, time.monotonic()

    def rest(self) -> float:
        """How long to rest in the middle of a slot: mostly not at all."""
        return 0.0005 if self.random.random() < self.options.pause else 0.0

    def publish(self) -> None:
        """Publish the next version, if there is a slot."""
        if self.ledger.published >= self.publications:
            return
        message = self.publication.reserve()
        if message is not None:
            fill(message, self.rank, self.ledger.version(), self.rest())
            self.publication.publish()
            self.ledger.publish()

    def read(self, other: int) -> None:
        """Copy the newest version of another rank."""
        begun = time.monotonic()
        whole = self.publication.read(other, self.out)
        ended = time.monotonic()
        self.longest = max(self.longest, ended - begun)
        if other == self.size - 1:
            self.touched.append(ended)
        if whole:
            self.ledger.read(other, self.out)

    def claim(self, other: int) -> None:
        """Claim the newest version of another rank, and keep it."""
        claim = self.publication.claim(other)
        if claim is not None:
            self.ledger.claim(claim, self.look(claim, self.theirs))
            self.claims.append(claim)

    def release(self) -> None:
        """Release one of the claims, after another look."""
        claim = self.claims.pop(self.random.randrange(len(self.claims)))
        self.ledger.held(claim, self.look(claim, self.theirs))
        self.publication.release(claim)

    def look(self, claim: Claim, out: Message) -> Message:
        """Return a claimed version: in place, or got."""
        there = self.slots.at(claim.rank, claim.slot)
        if there is None:
            self.slots.get(claim.rank, claim.slot, out)
        return there or out

    def send(self, other: int) -> None:
        """Send one message or two in the reverse order of their slots; at times cancel one."""
        first = self.inbox.reserve(other)
        if first is None:
            time.sleep(5e-5)  # on few cores the receiver needs this one
            return
        if self.random.random() < 0.2:
            second = self.inbox.reserve(other)
            if second is not None:
                if self.random.random() < 0.5:
                    self.deliver(second)
                else:
                    self.write(second, self.ledger.cancelled())
                    self.inbox.cancel(second)
                    self.ledger.done["cancelled"] += 1
        self.deliver(first)

    def deliver(self, reservation: Reservation) -> None:
        """Fill a slot of another rank's inbox."""
        message = self.write(reservation, self.ledger.message(reservation.rank))
        self.inbox.send(reservation, message)
        self.ledger.send(reservation.rank)

    def write(self, reservation: Reservation, stamp: int) -> Message:
        """Write a message in place, or to a staging area."""
        message = self.inbox.place(reservation) or self.reply
        fill(message, self.rank, stamp, self.rest())
        return message

    def receive(self) -> bool:
        """Take the messages that have arrived; return whether there were any."""
        arrivals = self.inbox.receive()
        for arrival in arrivals:
            self.ledger.arrived(arrival.sender, arrival.message)
            self.inbox.free(arrival)
        return bool(arrivals)


def main() -> None:
    """Stress the protocols, or each faulty one that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--publications", type=int, default=20_000, help="of all ranks together")
    parser.add_argument("--messages", type=int, default=20_000, help="of all ranks together")
    parser.add_argument("--elements", type=int, default=1016, help="of a message, 8 bytes each")
    parser.add_argument("--path", default="auto", help="auto, node or remote")
    parser.add_argument("--slots", type=int, default=4, help="of a publication, and of an inbox")
    parser.add_argument("--pause", type=float, default=0.002, help="share of slots to rest in")
    parser.add_argument("--sleep", type=float, default=0.0, help="seconds without a call of MPI")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for all of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, action="append", default=[])
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    reports = {
        name: Rank(comm, options, FAULTS[name].publication, FAULTS[name].inbox).run()
        for name in options.fault
    }
    report = reports or Rank(comm, options).run()
    if comm.rank == 0:
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
