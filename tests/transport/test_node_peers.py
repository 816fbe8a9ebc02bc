"""Operations on ranks of the same node: all complete at once, in the memory of the other rank."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from mpi_dasgd.codecs import Layout
from mpi_dasgd.transport.control_words import CLAIMED, FREE, READY
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import ExchangeRequest
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.rma.node_peers import NodePeers
from mpi_dasgd.transport.rma.peer_views import PeerViews
from mpi_dasgd.transport.virtual.memory import SharedMemory

LAYOUT = Layout(codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8)
INBOX_SLOTS = 2


class Node:
    """Two ranks that share a memory, each with its views and its access to the other."""

    def __init__(self) -> None:
        self.memory = SharedMemory(LAYOUT, 2, inbox_slots=INBOX_SLOTS)
        self.views = [self._views(rank) for rank in range(2)]
        self.peers = [NodePeers(views, self.memory) for views in self.views]

    def _views(self, rank: int) -> PeerViews:
        counters = Counters()
        shared = self.memory, self.memory, self.memory.word_map, rank, counters
        return PeerViews(Publication(*shared), Inbox(*shared, defaultdict(int)), counters)

    def publish(self, rank: int, value: float) -> None:
        message = self.views[rank].publication.reserve()
        assert message is not None
        message.payload[:] = value
        self.views[rank].publication.publish()

    def states(self, rank: int) -> tuple[set[int], set[int]]:
        """States of the slots of the publication and of the inbox of `rank`."""
        word_map = self.memory.word_map
        publication, inbox = (
            {self.memory.read(rank, index) & 3 for index in indices}
            for indices in (word_map.publication, word_map.inbox)
        )
        return publication, inbox


@pytest.fixture
def node() -> Node:
    return Node()


def begin(node: Node) -> ExchangeRequest:
    """Rank 0 begins an exchange with rank 1, which has published."""
    request = ExchangeRequest()
    assert node.peers[0].begin_exchange(request, 1) and request.is_settled
    return request


def test_without_a_publication_nothing_is_claimed(node: Node) -> None:
    request = ExchangeRequest()
    assert not node.peers[0].begin_exchange(request, 1)
    assert not request.is_settled and node.states(1) == ({FREE}, {FREE})


def test_an_exchange_reads_and_writes_in_place(node: Node) -> None:
    node.publish(1, 3.0)
    request = begin(node)
    assert node.states(1) == ({FREE, CLAIMED}, {FREE, CLAIMED})
    model, delta = request.partner_model, request.partner_delta
    assert model is not None and delta is not None
    assert (model.payload == 3).all() and model is node.memory.view(1, request.claim.slot)  # type: ignore[union-attr]
    delta.payload[:] = -1
    node.peers[0].commit_exchange(request)
    assert node.states(1) == ({FREE}, {FREE, READY})
    (received,) = node.views[1].inbox.receive()
    assert received.sender == 0 and (received.message.payload == -1).all()
    counters = node.views[0].counters
    assert (counters.bytes_received, counters.bytes_sent) == (LAYOUT.nbytes, LAYOUT.nbytes)


def test_an_aborted_exchange_frees_both_slots(node: Node) -> None:
    node.publish(1, 3.0)
    node.peers[0].abort_exchange(begin(node))
    assert node.states(1) == ({FREE}, {FREE})
    assert node.views[1].inbox.receive() == []


def test_the_newest_version_is_copied_and_a_given_one_is_read_in_place(node: Node) -> None:
    second = node.peers[0].read(1, 2)
    assert node.peers[0].read(1, None).message is None and not second.test()
    node.publish(1, 1.0)
    newest = node.peers[0].read(1, None)
    assert newest.test() and newest.message is not None and not second.test()
    node.publish(1, 2.0)
    assert second.test() and second.message is not None
    assert (newest.message.payload == 1).all() and (second.message.payload == 2).all()
    addresses = {m.payload.ctypes.data for m in (node.memory.view(1, slot) for slot in range(4))}
    assert second.message.payload.ctypes.data in addresses
    assert newest.message.payload.ctypes.data not in addresses
    assert node.views[0].counters.bytes_received == 2 * LAYOUT.nbytes


def test_messages_go_into_the_inbox_until_it_is_full(node: Node) -> None:
    buffers = [node.peers[0].acquire_send_buffer(1) for _ in range(INBOX_SLOTS + 1)]
    assert buffers[-1] is None
    for value, buffer in enumerate(buffers[:-1]):
        assert buffer is not None
        buffer.message.payload[:] = value
        node.peers[0].send(buffer)
    messages = node.views[1].inbox.receive()
    assert [message.message.payload[0] for message in messages] == [0, 1]
