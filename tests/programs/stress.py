"""Stress of Publication and Inbox by real processes, at random and as fast as they go.

    mpiexec -n 4 python tests/programs/stress.py --publications 100000

All ranks publish, read, claim, send, cancel and receive in a loop until their shares of the
publications and messages are done. Owners rest in mid-slot, receivers let their inbox fill up, and
the last rank makes no MPI call for a while. With --late each rank has a `LateDevice`, which writes
and reads the payload some milliseconds after it was asked to. Rank 0 prints what was found and done
as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import cast

from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[2]))
from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.control_words import WordMap
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.release import await_release
from mpi_dasgd.transport.rma.launched_release import make_release
from mpi_dasgd.transport.rma.native_inbox import NativeInbox
from mpi_dasgd.transport.rma.native_publication import NativePublication
from mpi_dasgd.transport.rma.native_rank import NativeRank
from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from mpi_dasgd.transport.rma.shared_memory import NodeWords
from mpi_dasgd.transport.rma.windows import WindowSlots, WindowWords
from tests.programs.faults import FAULTS
from tests.programs.late_player import LatePlayer
from tests.programs.ledger import Ledger, layout
from tests.programs.player import Player
from tests.support.late_device import LateDevice
from tests.support.sleeping_rank import SleepingRank


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
        where = WordMap(options.slots, options.slots)
        node = cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED))
        library = native.load()
        self.words: NodeWords | WindowWords
        if options.words != "window" and library is not None:
            self.words = NodeWords(comm, where.count, library)
        else:
            self.words = WindowWords(comm, where.count)
        self.slots = WindowSlots(
            comm, node, layout(options.elements), 2 * options.slots, options.path
        )
        node.Free()
        shared = self.words, self.slots, where, self.rank, self.counters
        self.device: Device = HOST
        if options.late is not None:
            self.device = LateDevice(tuple(options.late), seed=self.rank)
        self.release = make_release(comm, self.words, self.device)
        views: tuple[Publication, Inbox] = (
            publication(*shared, max_claims=options.slots - 2, release=self.release),
            inbox(*shared, release=self.release),
        )
        if options.words == "native":
            assert isinstance(self.words, NodeWords) and library is not None
            state = NativeRank.on_node(
                library, self.rank, self.words, self.slots, where, options.slots - 2
            )
            of_rank = state, self.words, self.slots, where, self.rank
            views = NativePublication(*of_rank), NativeInbox(*of_rank)
            self.counters = state.counters
        parts = (
            *views,
            self.slots,
            self.ledger,
            options.elements,
            random.Random(1000 * options.seed + self.rank),
            self.rest,
        )
        self.player = (
            LatePlayer(self.device, *parts)
            if isinstance(self.device, LateDevice)
            else Player(*parts)
        )
        self.deaf_turns = 0  # turns for which nothing is received
        self.sleeping = SleepingRank(options.until_read)
        self.asleep = (0.0, 0.0)
        self.touched: list[float] = []  # when a read of the last rank was complete
        self.longest = 0.0

    def run(self) -> dict:
        """Do this rank's share, wait for the others, and return what all ranks found."""
        progress_thread = None
        if len(self.slots.node_ranks) < self.size:
            sys.setswitchinterval(0.0005)
            progress_thread = ProgressThread(lambda: None, 1.0, self.comm.Iprobe)
        self.comm.Barrier()
        start = time.monotonic()
        deadline = start + self.options.limit
        while not self.is_done() and time.monotonic() < deadline:
            self.turn()
            self.release.flush()
        self.ledger.found["stalled"] += not self.is_done()
        while self.player.claims:
            self.player.release()
        self.settle()
        barrier = self.comm.Ibarrier()
        while not barrier.Test():
            self.player.receive()
            self.release.flush()
            self.read(self.player.other())
            time.sleep(0.0005)
        seconds = time.monotonic() - start
        while self.player.receive():
            self.settle()
        for owner, version in enumerate(self.comm.allgather(self.ledger.published)):
            if owner != self.rank:
                self.player.read(owner)
                self.ledger.newest(owner, version)
        self.comm.Barrier()
        if progress_thread is not None:
            progress_thread.check()
            progress_thread.close()
        self.device.close()
        if isinstance(self.player, LatePlayer):
            self.ledger.found.update(self.player.late.found)
        found, done = self.ledger.balance(self.comm)
        sleeps = self.comm.bcast(self.asleep, root=self.size - 1)
        during = sum(sleeps[0] < moment < sleeps[1] for moment in self.touched)
        report = {
            "found": dict(found),
            "done": dict(done),
            "inbox_full": self.comm.allreduce(self.counters.inbox_full),
            "claims_lost": self.comm.allreduce(self.counters.claims_lost),
            "torn_reads": self.comm.allreduce(self.counters.torn_reads),
            "skipped": self.comm.allreduce(self.counters.publications_skipped),
            "touched": self.comm.allreduce(during),
            "longest": self.comm.allreduce(self.longest, MPI.MAX),
            "seconds": seconds,
            "path": self.slots.transfer_mode,
            "words": type(self.words).__name__,
            "protocol": type(self.player.publication).__name__,
        }
        self.slots.close()
        self.words.close()
        return report

    def settle(self) -> None:
        """Wait until all that was given away has reached the others."""
        self.release.flush()
        await_release(self.release)

    def is_done(self) -> bool:
        """Whether this rank's share is done."""
        mine = self.ledger
        return mine.published >= self.publications and mine.done["sent"] >= self.messages

    def turn(self) -> None:
        """One turn of the loop: a little of everything."""
        player, chance = self.player, self.player.dice.random
        if self.ledger.published < self.publications:
            player.publish()
        if self.ledger.done["sent"] < self.messages and not player.send(player.other()):
            time.sleep(5e-5)  # on few cores the receiver needs this one
        if chance() < self.options.pause / 10:
            self.deaf_turns = 20
        if self.deaf_turns:
            self.deaf_turns -= 1
        else:
            player.receive()
        if chance() < 0.5:
            player.claim(player.other())
        if chance() < 0.3:
            self.read(player.other())
        if len(player.claims) > 2 or chance() < 0.5:
            player.release()
        third = 3 * self.ledger.published > self.publications
        if third and self.rank == self.size - 1 and not self.asleep[1]:
            self.asleep = self.sleeping.sleep(self.options.sleep)

    def rest(self) -> None:
        """Rest in the middle of a slot, mostly not at all."""
        if self.player.dice.random() < self.options.pause:
            time.sleep(0.0005)

    def read(self, other: int) -> None:
        """Copy the newest version of another rank, and record when."""
        # On another node, if there is one: there it takes the progress thread of the last rank.
        node_ranks = self.slots.node_ranks
        is_last = other == self.size - 1 and (
            len(node_ranks) == self.size or other not in node_ranks
        )
        start = time.monotonic()
        with self.sleeping.reading() if is_last else nullcontext():
            self.player.read(other)
            ended = time.monotonic()
            self.longest = max(self.longest, ended - start)
            if is_last:
                self.touched.append(ended)


def main() -> None:
    """Stress the protocols, or each faulty one that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--publications", type=int, default=20_000, help="of all ranks together")
    parser.add_argument("--messages", type=int, default=20_000, help="of all ranks together")
    parser.add_argument(
        "--elements", type=int, default=1016, help="elements of a message, 8 bytes each"
    )
    parser.add_argument("--path", default="auto", help="auto, shared_memory or rma")
    parser.add_argument("--words", default="window", choices=("window", "node", "native"))
    parser.add_argument(
        "--slots", type=int, default=4, help="slots of a publication, and of an inbox"
    )
    parser.add_argument("--pause", type=float, default=0.002, help="fraction of slots to rest in")
    parser.add_argument(
        "--sleep", type=float, default=0.0, help="seconds outside MPI of the last rank"
    )
    parser.add_argument("--until-read", help="folder; it sleeps on until others have read of it")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--late", type=float, nargs=2, help="shortest and longest delay of a device, seconds"
    )
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
