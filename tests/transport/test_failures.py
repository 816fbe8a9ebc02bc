"""Ranks that pause or die in the middle of something: the others neither hang nor lose what is theirs."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import Unreachable
from mpi_dasgd.transport.control_words import CLAIMED, FREE, READY
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import ExchangeRequest
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.membership import DEPARTED, Membership
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.rma.progress_context import ProgressContext
from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from mpi_dasgd.transport.rma.remote_peers import RemotePeers
from mpi_dasgd.transport.virtual.memory import SharedMemory
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import run_ranks

LAYOUT = Layout(codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8)
SILENCE = 1.5
PATIENCE = SILENCE / 3


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Wire:
    """The words and slots of all ranks as rank 0 sees them: calls to the others may block, or fail."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.dead: set[int] = set()
        self._stopped: dict[tuple[int, str], threading.Event] = {}

    def stop(self, rank: int, *calls: str) -> None:
        """Have these calls to `rank` block, or all."""
        for call in calls or ("read", "swap", "get", "put"):
            self._stopped[rank, call] = threading.Event()

    def resume(self) -> None:
        """Let all calls return."""
        stopped, self._stopped = self._stopped, {}
        for event in stopped.values():
            event.set()

    def _call(self, rank: int, call: str) -> None:
        if (event := self._stopped.get((rank, call))) is not None:
            assert event.wait(20)
        if rank in self.dead:
            raise Unreachable(rank)

    def read(self, rank: int, index: int) -> int:
        self._call(rank, "read")
        return self.memory.read(rank, index)

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        self._call(rank, "swap")
        return self.memory.swap(rank, index, expected, new)

    def view(self, rank: int, index: int) -> Message | None:
        return self.memory.view(rank, index) if rank == 0 else None

    def get(self, rank: int, index: int, out: Message) -> None:
        self._call(rank, "get")
        self.memory.get(rank, index, out)

    def put(self, rank: int, index: int, message: Message) -> None:
        self._call(rank, "put")
        self.memory.put(rank, index, message)

    def fence(self) -> None:
        pass


class Far:
    """Rank 0, and the far ranks 1 and 2, which live in the test's thread."""

    def __init__(self, *, watches: bool) -> None:
        self.memory = SharedMemory(LAYOUT, 3)
        self.wire = Wire(self.memory)
        self.board = Membership(self.wire, 0, 3, SILENCE)
        self.boards = [Membership(self.memory, rank, 3, SILENCE) for rank in range(3)]
        shared = self.memory, self.memory, self.memory.word_map
        self.publications = [Publication(*shared, rank, Counters(), 2) for rank in range(3)]
        self.inboxes = [Inbox(*shared, rank, Counters()) for rank in range(3)]
        sent: defaultdict[int, int] = defaultdict(int)

        def views(counters: Counters) -> tuple[Publication, Inbox]:
            mine = self.wire, self.wire, self.memory.word_map, 0, counters
            return Publication(*mine, 2), Inbox(*mine, sent)

        def chore(hands: ProgressContext) -> None:
            if hands.switch_to(0):
                self.board.send_heartbeat(self.wire)
            self.board.detect_failures(hands.iterate_peers(range(3)), self.wire, hands.quarantined)

        def courier(hands: ProgressContext) -> ProgressThread:
            return ProgressThread(chore if watches else lambda _: None, 0.01, None, 1.0, (hands,))

        self.ranks = RemotePeers(0, (1, 2), views, self.wire, LAYOUT, self.board, courier)

    def publish(self, rank: int) -> None:
        """Publish a version that shows whose it is."""
        message = self.publications[rank].reserve()
        assert message is not None
        message.payload[:] = rank
        message.stamp(rank=rank, step=1, time_ns=0)
        self.publications[rank].publish()

    def received(self, rank: int) -> list[float]:
        """Values of what has come to `rank`."""
        values = []
        for arrival in self.inboxes[rank].receive():
            values.append(float(arrival.message.payload[0]))
            self.inboxes[rank].free(arrival)
        return values

    def send(self, rank: int, value: float) -> None:
        posting = self.ranks.acquire_send_buffer(rank)
        assert posting is not None
        posting.message.payload[:] = value
        self.ranks.send(posting)

    def pair(self, *candidates: int) -> ExchangeRequest:
        pairing = ExchangeRequest()
        self.ranks.begin_exchange(pairing, candidates)
        return pairing

    def replace(self) -> None:
        """Wait until the courier is stuck, and was replaced."""
        before = self.ranks._context

        def replaced() -> bool:
            self.ranks.check(0.1)
            return self.ranks._context is not before

        wait_for(replaced)

    def states(self, rank: int) -> tuple[set[int], set[int]]:
        """States of the slots of publication and inbox."""
        where = self.memory.word_map
        read = functools.partial(self.memory.read, rank)
        return {read(i) & 3 for i in where.publication}, {read(i) & 3 for i in where.inbox}


@pytest.fixture
def far(request: pytest.FixtureRequest) -> Iterator[Far]:
    """Far ranks, whose heartbeats are read if the parameter says so."""
    made = Far(watches=getattr(request, "param", False))
    yield made
    made.wire.resume()
    assert made.ranks.close(5.0)


watched = pytest.mark.parametrize("far", [True], indirect=True)


# A message to a rank that dies


def test_a_message_that_cannot_be_sent_is_not_waited_for(far: Far) -> None:
    far.wire.dead.add(1)
    far.send(1, 5)
    wait_for(far.ranks.is_flushed)
    assert far.board.dead == {1}
    for value in range(3):  # nor are later ones
        far.send(1, value)
    wait_for(far.ranks.is_flushed)
    far.send(2, 7)
    wait_for(far.ranks.is_flushed)
    assert far.received(2) == [7]


@pytest.mark.parametrize("call", ["swap", "put"])
@pytest.mark.parametrize("left", [False, True])
def test_a_message_that_got_stuck_is_waited_for_until_its_rank_is_gone(
    far: Far, call: str, left: bool
) -> None:
    far.wire.stop(1, call)
    far.send(1, 5)
    far.send(2, 6)
    far.replace()
    wait_for(lambda: far.received(2) == [6])
    assert not far.ranks.is_flushed(), "it may yet arrive"
    if left:
        far.board.status[1] = DEPARTED
    else:
        far.board.dead.add(1)
    wait_for(far.ranks.is_flushed)
    far.ranks.check(PATIENCE)
    assert not far.ranks._outgoing


@pytest.mark.parametrize("call", ["swap", "put"])
def test_a_message_that_got_stuck_arrives_once_after_a_pause(far: Far, call: str) -> None:
    far.send(1, 4)
    wait_for(far.ranks.is_flushed)
    far.wire.stop(1, call)
    far.send(1, 5)
    far.replace()
    assert far.ranks.acquire_send_buffer(1) is None
    far.wire.resume()
    wait_for(far.ranks.is_flushed)
    far.send(1, 6)
    wait_for(far.ranks.is_flushed)
    assert far.received(1) == [4, 5, 6], "and the count of messages goes on"
    assert sum(counters.messages for counters in far.ranks.counters) == 3


# A pause shorter than `silence`


@watched
def test_a_pause_kills_nobody_and_the_own_heart_beats_on(far: Far) -> None:
    far.boards[1].send_heartbeat(far.memory)
    wait_for(lambda: far.board._heartbeats[1] == 1)
    far.wire.stop(1)
    far.replace()
    beat = far.board._own_values[0]
    until = time.monotonic() + SILENCE / 3
    while time.monotonic() < until:
        far.boards[2].send_heartbeat(far.memory)
        far.ranks.check(0.1)
        assert far.board.dead == set() and far.ranks._context.quarantined == {1}
        time.sleep(0.01)
    assert far.board._own_values[0] > beat + 3
    far.boards[1].report_samples(33)
    far.boards[1].send_heartbeat(far.memory)
    far.wire.resume()
    wait_for(lambda: far.board.samples[1] == 33)
    assert far.board.dead == set() and far.ranks._context.quarantined == set()


@watched
def test_an_avoided_rank_is_dead_after_its_silence(far: Far) -> None:
    far.wire.stop(1)
    begun = time.monotonic()

    def dead() -> bool:
        far.boards[2].send_heartbeat(far.memory)
        far.ranks.check(PATIENCE)
        return far.board.dead == {1}

    wait_for(dead)
    assert SILENCE - 0.1 < time.monotonic() - begun < SILENCE + 0.25


def test_an_avoided_rank_is_not_asked_for_anything(far: Far) -> None:
    for rank in (1, 2):
        far.publish(rank)
    held = far.pair(1)
    wait_for(held.test)
    far.wire.stop(1)
    stuck = far.ranks.read(1, None)
    far.replace()
    assert stuck.test() and stuck.message is None
    assert far.ranks.acquire_send_buffer(1) is None
    newest, version = far.ranks.read(1, None), far.ranks.read(1, 1)
    assert held.partner_delta is not None
    held.partner_delta.payload[:] = 11
    far.ranks.commit_exchange(held)
    other = far.pair(1, 2)
    wait_for(other.test)
    assert other.claim is not None and other.claim.rank == 2 and other.failed_attempts == 1
    assert other.partner_delta is not None
    other.partner_delta.payload[:] = 22  # into another staging area than the reply that waits
    far.ranks.commit_exchange(other)
    wait_for(lambda: far.received(2) == [22])
    assert newest.test() and newest.message is None
    assert not version.test() and not far.ranks.is_flushed()
    far.wire.resume()
    wait_for(lambda: version.test() and far.ranks.is_flushed())
    assert version.message is not None and (version.message.payload == 1).all()
    assert far.received(1) == [11]
    assert CLAIMED not in far.states(1)[0] | far.states(2)[0]


# What a courier does that was left behind


@pytest.mark.parametrize("call", ["read", "swap", "get"])
def test_a_courier_that_was_left_behind_gives_back_and_ends(far: Far, call: str) -> None:
    for rank in (1, 2):
        far.publish(rank)
    far.wire.stop(1, call)
    old = far.ranks._context.thread
    pairing = far.pair(1, 2)
    far.replace()
    assert pairing.test() and pairing.claim is None
    far.wire.resume()
    wait_for(lambda: not old.alive)
    assert pairing.claim is None and pairing.partner_model is None
    assert far.states(1)[1] == {FREE} and CLAIMED not in far.states(1)[0]
    assert far.states(2) == ({FREE, READY}, {FREE}), "the next candidate was not asked"
    again = far.pair(2)
    wait_for(again.test)
    assert again.claim is not None
    far.ranks.abort_exchange(again)


def test_a_courier_that_was_left_behind_asks_nobody_else(far: Far) -> None:
    far.publish(2)
    far.wire.stop(1)
    old = far.ranks._context.thread
    far.pair(1, 2)  # of which the first has nothing to offer
    far.replace()
    far.wire.resume()
    wait_for(lambda: not old.alive)
    assert far.states(2) == ({FREE, READY}, {FREE})


def test_a_late_copy_does_not_tear_a_later_read(far: Far) -> None:
    for rank in (1, 2):
        far.publish(rank)
    far.wire.stop(1, "get")
    old = far.ranks._context.thread
    first = far.ranks.read(1, None)
    far.replace()
    second = far.ranks.read(2, None)
    wait_for(second.test)
    far.wire.resume()
    wait_for(lambda: not old.alive)
    assert second.message is not None and (second.message.payload == 2).all()
    assert first.test() and first.message is None


def test_a_question_to_a_rank_that_dies_is_answered(far: Far) -> None:
    far.publish(1)
    far.wire.stop(1)
    version = far.ranks.read(1, 1)
    far.replace()
    time.sleep(0.05)
    assert not version.test()
    far.board.dead.add(1)
    wait_for(version.test)
    assert version.message is None
    pairing = far.pair(1)
    wait_for(pairing.test)
    assert pairing.claim is None


def test_a_courier_that_is_stuck_with_mpi_itself_is_not_replaced(far: Far) -> None:
    hands = far.ranks._context
    release = threading.Event()
    hands.thread.submit(lambda hands: hands.switch_to(0) and release.wait(10))
    wait_for(lambda: hands.thread.busy_seconds > 0.05)
    far.ranks.check(0.01)
    assert far.ranks._context is hands and far.board.dead == set()
    release.set()


def test_no_task_is_lost_when_a_courier_is_replaced() -> None:
    release = threading.Event()
    ran: list[int] = []
    old, new = (ProgressThread(lambda: None, 0.01) for _ in range(2))
    old.submit(lambda: release.wait(10) and old.submit(lambda: ran.append(99)))
    wait_for(lambda: old.busy_seconds > 0)
    for i in range(20):
        old.submit(lambda i=i: ran.append(i))
    old.replace(new)
    old.submit(lambda: ran.append(20))
    wait_for(lambda: new.idle)
    assert ran == list(range(21))
    release.set()
    wait_for(lambda: len(ran) == 22)
    assert ran[21] == 99 and not old.alive
    assert new.close()


# Real processes

PROGRAM = """\
import os, signal, time
import numpy as np
from mpi4py import MPI
from mpi_dasgd import topology
from mpi_dasgd.codecs import Layout
from mpi_dasgd.errors import PeerLost
from mpi_dasgd.transport.membership import FINISHED
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
N = 200_000
layout = Layout(codec=0, elements=N, payload_dtype=np.dtype("f4"), payload_items=N)
endpoint = RmaEndpoint(comm, layout, topology.build("complete", size), heartbeat_timeout=1.0)
comm.Barrier()
begun = time.monotonic()
"""


def test_the_others_deliver_when_a_rank_of_another_host_is_killed(two_hosts: Hosts) -> None:
    program = """
if rank == 3:  # receives nothing: when it dies the others try to send
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
while time.monotonic() - begun < 2.5:
    for other in range(size):
        posting = endpoint.acquire_send_buffer(other) if other != rank else None
        if posting is not None:
            posting.message.stamp(rank=rank, step=0, time_ns=0)
            endpoint.send(posting)
    for arrival in endpoint.inbox.receive():
        endpoint.inbox.free(arrival)
    endpoint.refresh_membership()
while not endpoint.is_flushed():
    assert time.monotonic() - begun < 12, f"not delivered: {endpoint.membership.dead}"
    for arrival in endpoint.inbox.receive():
        endpoint.inbox.free(arrival)
    endpoint.refresh_membership()
    time.sleep(0.001)
endpoint.membership.publish_status(FINISHED)
membership = endpoint.membership
while not all(s == FINISHED or r in membership.dead for r, s in enumerate(membership.status)):
    for arrival in endpoint.inbox.receive():
        endpoint.inbox.free(arrival)
    endpoint.refresh_membership()
    time.sleep(0.001)
assert 3 in endpoint.membership.dead
os._exit(0)
"""
    done = run_ranks(4, PROGRAM + program, hosts=two_hosts, check=False, timeout=30)
    assert done.codes[:3] == [0, 0, 0], done.report()


@pytest.mark.mpi
def test_a_rank_that_was_given_up_ends_too() -> None:
    program = """
victim = comm.bcast(os.getpid(), root=2)
if rank == 2:
    os.kill(victim, signal.SIGSTOP)
else:
    while 2 not in endpoint.membership.dead:
        endpoint.refresh_membership()
        time.sleep(0.001)
    time.sleep(0.5)
    os.kill(victim, signal.SIGCONT)
try:
    endpoint.close()
except PeerLost as error:
    print(rank, error, flush=True)
    os._exit(0)
"""
    done = run_ranks(3, PROGRAM + program, timeout=20)
    assert done.stdout.count("ranks [2] are gone") == 2
    assert "2 the others have given this rank up" in done.stdout, done.report()


@pytest.mark.mpi
def test_a_death_inside_a_sum_ends_the_others() -> None:
    program = """
def add():
    pending = endpoint.allreduce(np.ones(1000))
    while not pending.test():
        time.sleep(1e-4)
add()
time.sleep(1.5)  # longer than the silence: a sum alone ends nobody
add()
if rank == 2:  # has come, and does not add
    endpoint._allreduce._add = lambda array: os.kill(os.getpid(), signal.SIGKILL)
add()
"""
    done = run_ranks(3, PROGRAM + program, check=False, timeout=20)
    assert done.codes == [4, 4, 137], done.report()
    assert done.stderr.count("ranks [2] are gone, inside a sum over all ranks") == 2
