"""Ranks that pause or die inside an operation: the others neither hang nor lose a message."""

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
from mpi_dasgd.transport.rma.peer_views import PeerViews
from mpi_dasgd.transport.rma.progress_context import ProgressContext
from mpi_dasgd.transport.rma.progress_engine import ProgressEngine
from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from mpi_dasgd.transport.rma.remote_peers import RemotePeers
from mpi_dasgd.transport.virtual.memory import SharedMemory
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import run_ranks

LAYOUT = Layout(codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8)
HEARTBEAT_TIMEOUT = 1.5
STALL_TIMEOUT = HEARTBEAT_TIMEOUT / 3


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Wire:
    """Words and slots of all ranks as rank 0 sees them: calls to the others may block, or fail."""

    def __init__(self, memory: SharedMemory) -> None:
        self.layout = memory.layout
        self.memory = memory
        self.dead: set[int] = set()
        self._stopped: dict[tuple[int, str], threading.Event] = {}

    def stop(self, rank: int, *calls: str) -> None:
        """Let these calls to `rank` block, or all."""
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


class Remote:
    """Rank 0, and the remote ranks 1 and 2, which run in the test's thread.

    Args:
        polls: whether the progress thread exchanges heartbeats.
    """

    def __init__(self, *, polls: bool) -> None:
        self.memory = SharedMemory(LAYOUT, 3)
        self.wire = Wire(self.memory)
        self.membership = Membership(self.wire, 0, 3, HEARTBEAT_TIMEOUT)
        self.memberships = [
            Membership(self.memory, rank, 3, HEARTBEAT_TIMEOUT) for rank in range(3)
        ]
        shared = self.memory, self.memory, self.memory.word_map
        self.publications = [Publication(*shared, rank, Counters()) for rank in range(3)]
        self.inboxes = [Inbox(*shared, rank, Counters()) for rank in range(3)]
        sent: defaultdict[int, int] = defaultdict(int)

        def new_context(superseded: ProgressContext | None) -> ProgressContext:
            counters = Counters()
            shared = self.wire, self.wire, self.memory.word_map, 0, counters
            views = PeerViews(Publication(*shared), Inbox(*shared, sent), counters)
            context = ProgressContext(0, views, LAYOUT, superseded)
            task = poll if polls else lambda _: None
            context.thread = ProgressThread(task, 0.01, None, 1.0, (context,))
            return context

        def poll(context: ProgressContext) -> None:
            context.exchange_heartbeats(self.membership, self.wire)

        self.engine = ProgressEngine(self.membership, new_context)
        self.peers = RemotePeers(self.wire, self.membership, self.engine)

    def publish(self, rank: int) -> None:
        """Publish a version that shows whose it is."""
        message = self.publications[rank].reserve()
        assert message is not None
        message.payload[:] = rank
        message.stamp(rank=rank, step=1, time_ns=0)
        self.publications[rank].publish()

    def received(self, rank: int) -> list[float]:
        """Values of the messages that have arrived at `rank`."""
        values = []
        for received in self.inboxes[rank].receive():
            values.append(float(received.message.payload[0]))
            self.inboxes[rank].free(received)
        return values

    def send(self, rank: int, value: float) -> None:
        buffer = self.peers.acquire_send_buffer(rank)
        assert buffer is not None
        buffer.message.payload[:] = value
        self.peers.send(buffer)

    def pair(self, *candidates: int) -> ExchangeRequest:
        request = ExchangeRequest()
        self.peers.begin_exchange(request, candidates)
        return request

    def replace(self) -> None:
        """Wait until the progress thread is stalled and has been replaced."""
        before = self.engine._context

        def replaced() -> bool:
            self.peers.check(0.1)
            return self.engine._context is not before

        wait_for(replaced)

    def states(self, rank: int) -> tuple[set[int], set[int]]:
        """States of the slots of the publication and of the inbox of `rank`."""
        word_map = self.memory.word_map
        read = functools.partial(self.memory.read, rank)
        return {read(i) & 3 for i in word_map.publication}, {read(i) & 3 for i in word_map.inbox}


@pytest.fixture
def remote(request: pytest.FixtureRequest) -> Iterator[Remote]:
    """Remote ranks, whose heartbeats are polled if the parameter is True."""
    made = Remote(polls=getattr(request, "param", False))
    yield made
    made.wire.resume()
    assert made.engine.close(5.0)


polled = pytest.mark.parametrize("remote", [True], indirect=True)


# A message to a rank that dies


def test_a_message_that_cannot_be_sent_is_not_waited_for(remote: Remote) -> None:
    remote.wire.dead.add(1)
    remote.send(1, 5)
    wait_for(remote.peers.is_flushed)
    assert remote.membership.dead == {1}
    for value in range(3):  # nor are later ones
        remote.send(1, value)
    wait_for(remote.peers.is_flushed)
    remote.send(2, 7)
    wait_for(remote.peers.is_flushed)
    assert remote.received(2) == [7]


@pytest.mark.parametrize("call", ["swap", "put"])
@pytest.mark.parametrize("departed", [False, True])
def test_a_message_that_stalled_is_waited_for_until_its_rank_is_gone(
    remote: Remote, call: str, departed: bool
) -> None:
    remote.wire.stop(1, call)
    remote.send(1, 5)
    remote.send(2, 6)
    remote.replace()
    wait_for(lambda: remote.received(2) == [6])
    assert not remote.peers.is_flushed(), "it may yet arrive"
    if departed:
        remote.membership.status[1] = DEPARTED
    else:
        remote.membership.dead.add(1)
    wait_for(remote.peers.is_flushed)
    remote.peers.check(STALL_TIMEOUT)
    assert not remote.peers._outgoing


@pytest.mark.parametrize("call", ["swap", "put"])
def test_a_message_that_stalled_arrives_once_after_a_pause(remote: Remote, call: str) -> None:
    remote.send(1, 4)
    wait_for(remote.peers.is_flushed)
    remote.wire.stop(1, call)
    remote.send(1, 5)
    remote.replace()
    assert remote.peers.acquire_send_buffer(1) is None
    remote.wire.resume()
    wait_for(remote.peers.is_flushed)
    remote.send(1, 6)
    wait_for(remote.peers.is_flushed)
    assert remote.received(1) == [4, 5, 6], "and the sequence numbers go on"
    assert sum(counters.messages for counters in remote.engine.counters) == 3


# A pause shorter than the heartbeat timeout


@polled
def test_a_pause_kills_no_rank_and_the_own_heartbeat_goes_on(remote: Remote) -> None:
    remote.memberships[1].send_heartbeat(remote.memory)
    wait_for(lambda: remote.membership._heartbeats[1] == 1)
    remote.wire.stop(1)
    remote.replace()
    heartbeat = remote.membership._own_values[0]
    ends = time.monotonic() + HEARTBEAT_TIMEOUT / 3

    def has_paused() -> bool:
        remote.memberships[2].send_heartbeat(remote.memory)
        remote.peers.check(0.1)
        assert remote.membership.dead == set() and remote.engine._context.quarantined == {1}
        return time.monotonic() > ends and remote.membership._own_values[0] > heartbeat + 3

    wait_for(has_paused)
    remote.memberships[1].report_samples(33)
    remote.memberships[1].send_heartbeat(remote.memory)
    remote.wire.resume()
    wait_for(lambda: remote.membership.samples[1] == 33)
    assert remote.membership.dead == set() and remote.engine._context.quarantined == set()


@polled
def test_a_quarantined_rank_is_dead_after_the_heartbeat_timeout(remote: Remote) -> None:
    remote.wire.stop(1)
    moments = [time.monotonic()]

    def dead() -> bool:
        moments.append(time.monotonic())
        remote.memberships[2].send_heartbeat(remote.memory)
        remote.peers.check(STALL_TIMEOUT)
        return remote.membership.dead == {1}

    wait_for(dead)
    stood_still = sum(pause for pause in np.diff(moments) if pause > 0.05)  # this process itself
    seconds = time.monotonic() - moments[0]
    assert HEARTBEAT_TIMEOUT - 0.1 < seconds < HEARTBEAT_TIMEOUT + 0.25 + stood_still


def test_no_request_is_sent_to_a_quarantined_rank(remote: Remote) -> None:
    for rank in (1, 2):
        remote.publish(rank)
    claimed = remote.pair(1)
    wait_for(claimed.test)
    remote.wire.stop(1)
    stalled = remote.peers.read(1, None)
    remote.replace()
    assert stalled.test() and stalled.message is None
    assert remote.peers.acquire_send_buffer(1) is None
    newest, version = remote.peers.read(1, None), remote.peers.read(1, 1)
    assert claimed.partner_delta is not None
    claimed.partner_delta.payload[:] = 11
    remote.peers.commit_exchange(claimed)
    other = remote.pair(1, 2)
    wait_for(other.test)
    assert other.claim is not None and other.claim.rank == 2 and other.failed_attempts == 1
    assert other.partner_delta is not None
    other.partner_delta.payload[:] = 22  # into another staging buffer than the delta that waits
    remote.peers.commit_exchange(other)
    wait_for(lambda: remote.received(2) == [22])
    assert newest.test() and newest.message is None
    assert not version.test() and not remote.peers.is_flushed()
    remote.wire.resume()
    wait_for(lambda: version.test() and remote.peers.is_flushed())
    assert version.message is not None and (version.message.payload == 1).all()
    assert remote.received(1) == [11]
    assert CLAIMED not in remote.states(1)[0] | remote.states(2)[0]


# What a superseded progress thread does


@pytest.mark.parametrize("call", ["read", "swap", "get"])
def test_a_superseded_thread_frees_its_claims_and_ends(remote: Remote, call: str) -> None:
    for rank in (1, 2):
        remote.publish(rank)
    remote.wire.stop(1, call)
    old = remote.engine._context.thread
    request = remote.pair(1, 2)
    remote.replace()
    assert request.test() and request.claim is None
    remote.wire.resume()
    wait_for(lambda: not old.alive)
    assert request.claim is None and request.partner_model is None
    assert remote.states(1)[1] == {FREE} and CLAIMED not in remote.states(1)[0]
    assert remote.states(2) == ({FREE, READY}, {FREE}), "the next candidate was not tried"
    again = remote.pair(2)
    wait_for(again.test)
    assert again.claim is not None
    remote.peers.abort_exchange(again)


def test_a_superseded_thread_tries_no_other_candidate(remote: Remote) -> None:
    remote.publish(2)
    remote.wire.stop(1)
    old = remote.engine._context.thread
    remote.pair(1, 2)  # of which the first has published nothing
    remote.replace()
    remote.wire.resume()
    wait_for(lambda: not old.alive)
    assert remote.states(2) == ({FREE, READY}, {FREE})


def test_a_late_copy_does_not_tear_a_later_read(remote: Remote) -> None:
    for rank in (1, 2):
        remote.publish(rank)
    remote.wire.stop(1, "get")
    old = remote.engine._context.thread
    first = remote.peers.read(1, None)
    remote.replace()
    second = remote.peers.read(2, None)
    wait_for(second.test)
    remote.wire.resume()
    wait_for(lambda: not old.alive)
    assert second.message is not None and (second.message.payload == 2).all()
    assert first.test() and first.message is None


def test_a_request_to_a_rank_that_dies_is_settled(remote: Remote) -> None:
    remote.publish(1)
    remote.wire.stop(1)
    version = remote.peers.read(1, 1)
    remote.replace()
    time.sleep(0.05)
    assert not version.test()
    remote.membership.dead.add(1)
    wait_for(version.test)
    assert version.message is None
    request = remote.pair(1)
    wait_for(request.test)
    assert request.claim is None


def test_a_thread_that_is_blocked_in_mpi_itself_is_not_replaced(remote: Remote) -> None:
    context = remote.engine._context
    release = threading.Event()
    context.thread.submit(lambda context: context.switch_to(0) and release.wait(10))
    wait_for(lambda: context.thread.busy_seconds > 0.05)
    remote.peers.check(0.01)
    assert remote.engine._context is context and remote.membership.dead == set()
    release.set()


def test_no_task_is_lost_when_a_thread_is_replaced() -> None:
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
from mpi_dasgd.config.schema import TransportConfig
comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
N = 200_000
layout = Layout(codec=0, elements=N, payload_dtype=np.dtype("f4"), payload_items=N)
graph = topology.build("complete", size)
endpoint = RmaEndpoint(comm, layout, graph, TransportConfig(heartbeat_timeout=2.0))
comm.Barrier()
start = time.monotonic()
"""


def test_the_others_deliver_when_a_rank_of_another_host_is_killed(two_hosts: Hosts) -> None:
    program = """
if rank == 3:  # receives nothing: when it dies the others try to send
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
while time.monotonic() - start < 3.5:
    for other in range(size):
        buffer = endpoint.acquire_send_buffer(other) if other != rank else None
        if buffer is not None:
            buffer.message.stamp(rank=rank, step=0, time_ns=0)
            endpoint.send(buffer)
    for received in endpoint.inbox.receive():
        endpoint.inbox.free(received)
    endpoint.refresh_membership()
while not endpoint.is_flushed():
    assert time.monotonic() - start < 20, f"not delivered: {endpoint.membership.dead}"
    for received in endpoint.inbox.receive():
        endpoint.inbox.free(received)
    endpoint.refresh_membership()
    time.sleep(0.001)
endpoint.membership.publish_status(FINISHED)
membership = endpoint.membership
while not all(s == FINISHED or r in membership.dead for r, s in enumerate(membership.status)):
    for received in endpoint.inbox.receive():
        endpoint.inbox.free(received)
    endpoint.refresh_membership()
    time.sleep(0.001)
assert 3 in endpoint.membership.dead
os._exit(0)
"""
    done = run_ranks(4, PROGRAM + program, hosts=two_hosts, check=False)
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
    done = run_ranks(3, PROGRAM + program)
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
time.sleep(2.5)  # longer than the heartbeat timeout: a sum alone ends no rank
add()
if rank == 2:  # has come to the barrier, and dies in the sum
    endpoint._allreduce._reduce = lambda array: os.kill(os.getpid(), signal.SIGKILL)
add()
"""
    done = run_ranks(3, PROGRAM + program, check=False)
    assert done.codes == [4, 4, 137], done.report()
    assert done.stderr.count("ranks [2] are gone, inside a sum over all ranks") == 2
