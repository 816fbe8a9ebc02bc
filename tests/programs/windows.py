"""Tests of the windows and of the endpoint itself on two ranks or more. Run by `test_stress`.

Each case is a function of the communicator; all ranks run all of those that are named.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
from mpi4py import MPI

from mpi_dasgd import topology
from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.config.schema import TransportConfig
from mpi_dasgd.doctor.contention import count_up
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.membership import DEPARTED
from mpi_dasgd.transport.rma import windows
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
from mpi_dasgd.transport.rma.shared_memory import NodeWords
from mpi_dasgd.transport.rma.windows import WindowSlots, WindowWords
from tests.support.mpi_ranks import parallel_assert

SLOTS = 3
SECONDS = 5.0  # without the window's hint Open MPI lost 14 and 16 swaps of 680,000 in 10


def _layout(elements: int) -> Layout:
    return Layout(
        codec=0, elements=elements, payload_dtype=np.dtype(np.uint8), payload_items=elements
    )


def _content(rank: int, slot: int, nbytes: int) -> np.ndarray:
    """What slot `slot` of `rank` holds."""
    return np.random.default_rng([rank, slot]).integers(0, 256, nbytes).astype(np.uint8)


def _slots(comm: MPI.Intracomm, layout: Layout, path: str) -> WindowSlots:
    node = cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED))
    slots = WindowSlots(comm, node, layout, SLOTS, path)
    node.Free()
    return slots


def raises(error: type[BaseException], call: Callable[..., object], *args: object) -> bool:
    """Return whether `call` raises this error."""
    try:
        call(*args)
    except error:
        return True
    return False


def sizes(comm: MPI.Intracomm) -> None:
    """Slots of any size are where other ranks access them, in place and not."""
    right = (comm.rank + 1) % comm.size
    left = (comm.rank - 1) % comm.size
    for path in ("auto", "rma"):
        for elements in (1, 64, 1000, 4000, 5555, 100_001):
            layout = _layout(elements)
            slots = _slots(comm, layout, path)
            for slot in range(SLOTS):
                in_place = slots.view(right, slot)
                message = in_place or Message(np.empty(layout.nbytes, np.uint8), layout)
                message.buffer[:] = _content(right, slot, layout.nbytes)
                if in_place is None:
                    slots.put(right, slot, message)
            slots.fence()
            comm.Barrier()
            slots.fence()
            good = True
            for rank in (comm.rank, left):
                for slot in range(SLOTS):
                    out = slots.view(rank, slot)
                    if out is None:
                        out = Message(np.empty(layout.nbytes, np.uint8), layout)
                        slots.get(rank, slot, out)
                    good &= np.array_equal(out.buffer, _content(rank, slot, layout.nbytes))
            parallel_assert(comm, good, f"{path}, {layout.nbytes} bytes")
            comm.Barrier()
            slots.close()


def pieces(comm: MPI.Intracomm) -> None:
    """A message that is longer than one Get or Put moves in pieces."""
    other = (comm.rank + 1) % comm.size
    layout = _layout(3930)  # 62 times 64 bytes, with the header 63
    assert layout.nbytes == 4032
    for piece in (64, 999, 2016, 4031, 4032, 4033, 1 << 30):
        windows.PIECE = piece
        slots = _slots(comm, layout, "rma")
        comm.Barrier()
        for slot in range(SLOTS):
            message = Message(_content(other, slot, layout.nbytes), layout)
            slots.put(other, slot, message)
        comm.Barrier()
        good = True
        for slot in range(SLOTS):
            mine = slots.view(comm.rank, slot)
            assert mine is not None
            out = Message(np.zeros(layout.nbytes, np.uint8), layout)
            slots.get(other, slot, out)
            good &= np.array_equal(mine.buffer, _content(comm.rank, slot, layout.nbytes))
            good &= np.array_equal(out.buffer, _content(other, slot, layout.nbytes))
        parallel_assert(comm, good, f"pieces of {piece} bytes")
        comm.Barrier()
        slots.close()


def contended(comm: MPI.Intracomm) -> None:
    """No swap is lost when a word's owner and another rank count it up."""
    words = WindowWords(comm, 1)
    swaps, lost = count_up(comm, words, 1, SECONDS)
    parallel_assert(comm, swaps > 1000 and lost == 0, f"{lost} of {swaps} swaps were lost")
    words.close()


def closed(comm: MPI.Intracomm) -> None:
    """Closed windows refuse to work, and closing them again does nothing."""
    other = (comm.rank + 1) % comm.size
    library = native.load()
    implementations: list[WindowWords | NodeWords] = [WindowWords(comm, 4)]
    if library is not None:
        implementations.append(NodeWords(comm, 4, library))
    for words in implementations:
        first = words.swap(comm.rank, 2, 0, 5 + comm.rank)
        comm.Barrier()
        good = first and words.read(other, 2) == 5 + other and not words.swap(other, 2, 0, 1)
        comm.Barrier()
        words.close()
        words.close()
        good &= raises(RuntimeError, words.read, comm.rank, 2)
        good &= raises(RuntimeError, words.swap, other, 2, 0, 1)
        parallel_assert(comm, good, type(words).__name__)
    layout = _layout(100)
    message = Message(np.zeros(layout.nbytes, np.uint8), layout)
    for path in ("auto", "rma"):
        slots = _slots(comm, layout, path)
        slots.close()
        slots.close()
        good = raises(RuntimeError, slots.get, other, 0, message)
        good &= raises(RuntimeError, slots.put, other, 0, message)
        good &= slots.view(comm.rank, 0) is None
        slots.fence()
        parallel_assert(comm, good, path)


def endpoint(comm: MPI.Intracomm) -> None:
    """`close` waits for ranks that still exchange; afterwards everything raises."""
    graph = topology.build("complete", comm.size)
    layout = _layout(100)
    for path in ("auto", "rma"):
        endpoint = RmaEndpoint(comm, layout, graph, TransportConfig(mode=path))
        assert endpoint.publication.reserve() is not None
        endpoint.publication.publish()
        comm.Barrier()
        good = True
        if comm.rank == 0:
            # The others are in `close` already: their windows must still exist.
            time.sleep(0.3)
            request = endpoint.begin_exchange([1])
            while not request.is_settled:
                time.sleep(0.001)
            good = request.partner_model is not None
            endpoint.abort_exchange(request)
            while not endpoint.is_flushed():
                time.sleep(0.001)
        endpoint.close()
        good &= endpoint.membership.status[comm.rank] == DEPARTED
        if comm.rank == 0:
            endpoint.close()  # alone: a second call must not wait for other ranks
        for name, call in {
            "reserve": endpoint.publication.reserve,
            "receive": endpoint.inbox.receive,
            "claim": partial(endpoint.publication.claim, 1 - min(1, comm.rank)),
            "pair": partial(endpoint.begin_exchange, [1 - min(1, comm.rank)]),
        }.items():
            raised = raises(RuntimeError, call)
            if not raised:
                print(f"rank {comm.rank}, {path}: {name} after close did not raise", flush=True)
            good &= raised
        parallel_assert(comm, good, path)


def silent(comm: MPI.Intracomm) -> None:
    """Algorithms that send no messages have windows without slots."""
    graph = topology.build("complete", comm.size)
    endpoint = RmaEndpoint(comm, _layout(100), graph, publication_slots=0, inbox_slots=0)
    array = np.full(1000, float(comm.rank))
    pending = endpoint.allreduce(array)
    while not pending.test():
        time.sleep(0.001)
    parallel_assert(comm, bool((array == comm.size * (comm.size - 1) / 2).all()), "sum")
    endpoint.close()


def shared_memory(comm: MPI.Intracomm) -> None:
    """The mode `shared_memory` is refused by all ranks if they are on several hosts."""
    found = raises(UserError, _slots, comm, _layout(100), "shared_memory")
    parallel_assert(comm, found, "no UserError")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name](MPI.COMM_WORLD)
