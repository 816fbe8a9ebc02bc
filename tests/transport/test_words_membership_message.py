"""The parts under Publication and Inbox: words, Board, Message and Courier, in one process."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.transport import membership
from mpi_dasgd.transport.control_words import (
    CLAIMED,
    ERROR_REPORTER,
    FREE,
    GRADIENTS,
    HEAD,
    HEARTBEAT,
    LAST_STEP,
    READY,
    SAMPLES,
    STATUS,
    WordMap,
    holder_of,
    pack_slot_word,
)
from mpi_dasgd.transport.membership import DEPARTED, FAILED, FINISHED, RUNNING, Membership
from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from mpi_dasgd.transport.virtual.memory import SharedMemory

LAYOUT = Layout(codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8)


def make_memory(ranks: int) -> SharedMemory:
    return SharedMemory(LAYOUT, ranks)


def staging() -> Message:
    return Message(np.zeros(LAYOUT.nbytes, np.uint8), LAYOUT)


# Words


def test_word_keeps_state_holder_and_version_apart() -> None:
    for state in (FREE, READY, CLAIMED):
        for holder in (0, 1, 65_535, (1 << 20) - 1):
            for version in (0, 1, (1 << 40) - 1):
                value = pack_slot_word(state, holder, version)
                assert (value & 3, holder_of(value), value >> 22) == (state, holder, version)
                assert 0 <= value < 1 << 63


def test_word_map_gives_each_word_its_own_place() -> None:
    where = WordMap(5, 7)
    fixed = [HEARTBEAT, SAMPLES, STATUS, LAST_STEP, ERROR_REPORTER, GRADIENTS, HEAD]
    indices = [*fixed, *where.publication, *where.inbox]
    assert sorted(indices) == list(range(where.count))
    assert (len(where.publication), len(where.inbox)) == (5, 7)
    assert WordMap(0, 0).count == len(fixed)


# Board


def test_board_shows_what_others_report() -> None:
    memory = make_memory(3)
    boards = [Membership(memory, rank, 3, heartbeat_timeout=1.0) for rank in range(3)]
    boards[1].report_samples(40)
    boards[2].report_samples(2)
    boards[2].publish_status(FINISHED)
    boards[0].report_samples(100)
    assert boards[0].total_samples == 100
    boards[0].refresh(range(3))
    assert boards[0].samples == [100, 40, 2] and boards[0].total_samples == 142
    assert boards[0].status == [RUNNING, RUNNING, FINISHED]
    boards[1].publish_last_step(17)
    assert [boards[0].read_last_step(rank) for rank in range(3)] == [0, 17, 0]
    assert [one.claim_error_report() for one in reversed(boards)] == [True, False, False]


def test_a_silent_rank_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(membership, "time", SimpleNamespace(monotonic=lambda: now[0]))
    memory = make_memory(6)
    boards = [Membership(memory, rank, 6, heartbeat_timeout=1.0) for rank in range(6)]
    boards[2].publish_status(FINISHED)
    boards[3].publish_status(FAILED)
    boards[4].publish_status(DEPARTED)
    for moment in range(31):
        now[0] = 0.1 * moment
        boards[1].send_heartbeat(memory)
        if moment < 5:
            boards[5].send_heartbeat(memory)
        boards[0].detect_failures(range(6), memory)
        expected = {2} if moment > 10 else set()
        expected |= {5} if moment > 14 else set()
        assert boards[0].dead == expected, moment


def test_a_pause_of_the_watcher_itself_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(membership, "time", SimpleNamespace(monotonic=lambda: now[0]))
    memory = make_memory(2)
    watcher = Membership(memory, 0, 2, heartbeat_timeout=1.0)
    for _ in range(4):
        watcher.detect_failures(range(2), memory)
        now[0] += 100
    assert watcher.dead == set()


# Message


LAYOUTS = [
    Layout(
        codec=0, elements=n, payload_dtype=np.dtype(dtype), payload_items=n, scales=s, checksums=c
    )
    for n in (1, 16, 1000)
    for dtype in ("f4", "f8", "u1")
    for s, c in ((0, 0), (1, 1), (17, 33))
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_of_a_message_are_aligned_and_apart(layout: Layout) -> None:
    offsets = [0, layout.scales_at, layout.checksums_at, layout.payload_at, layout.nbytes]
    assert offsets == sorted(offsets) and all(offset % 64 == 0 for offset in offsets)
    message = Message(np.zeros(layout.nbytes, np.uint8), layout)
    message.stamp(rank=3, step=5, time_ns=7)
    message.sequence = 11
    message.scales[:] = 1.5
    message.checksums[:] = 99
    message.payload[:] = 42
    assert message.header.rank == 3 and message.sequence == 11
    assert (message.scales == 1.5).all() and (message.checksums == 99).all()
    sizes = message.scales.size, message.checksums.size, message.payload.size
    assert sizes == (layout.scales, layout.checksums, layout.payload_items)
    assert (message.payload == 42).all() and message.payload.dtype == layout.payload_dtype


def test_sizes_beyond_2_gib() -> None:
    n = 3_000_000_001
    layout = Layout(
        codec=0,
        elements=n,
        payload_dtype=np.dtype("f4"),
        payload_items=n,
        scales=n // 64,
        checksums=7,
    )
    assert layout.nbytes >= 4 * n + 4 * (n // 64) + 4 * 7 + 64
    assert layout.nbytes - (4 * n + 4 * (n // 64) + 4 * 7 + 64) < 3 * 64
    assert layout.nbytes % 64 == 0 and layout.payload_at > 2**27


def test_a_buffer_of_the_wrong_size_or_type_is_refused() -> None:
    for buffer in (
        np.zeros(LAYOUT.nbytes - 1, np.uint8),
        np.zeros(LAYOUT.nbytes + 64, np.uint8),
        np.zeros(LAYOUT.nbytes, np.int8),
        np.zeros((1, LAYOUT.nbytes), np.uint8),
    ):
        with pytest.raises(MpiDasgdError, match=f"expected {LAYOUT.nbytes} bytes"):
            Message(buffer, LAYOUT)


def test_header_is_64_bytes_little_endian_with_the_sequence_last() -> None:
    message = staging()
    message.stamp(rank=1_000_000, step=2**40, time_ns=-5)
    message.sequence = 2**50
    message.seed = 2**64 - 2
    message.stamp(rank=7, step=2**41, time_ns=2**62)
    assert message.sequence == 2**50, "a stamp leaves the sequence alone"
    assert message.seed == 2**64 - 2, "and the seed"
    assert not message.payload.any()
    header = message.header
    assert (header.rank, header.step, header.time_ns) == (7, 2**41, 2**62)
    assert (header.elements, header.nbytes, header.seed) == (8, LAYOUT.nbytes, 2**64 - 2)
    fields = struct.unpack("<IHHi4xqqqqQ", message.buffer[:56].tobytes())
    assert fields == tuple(header)
    assert struct.unpack("<q", message.buffer[56:64].tobytes()) == (2**50,)


@pytest.mark.parametrize("offset", [0, 3, 4, 6, 32, 40], ids=str)
def test_a_foreign_header_is_refused(offset: int) -> None:
    """At these bytes: magic (2), version, codec, elements, length."""
    message = staging()
    with pytest.raises(MpiDasgdError, match="message header: expected"):
        _ = message.header  # a slot that was never written
    message.stamp(rank=0, step=0, time_ns=0)
    assert message.header.rank == 0
    message.buffer[offset] ^= 1
    with pytest.raises(MpiDasgdError, match="message header: expected"):
        _ = message.header


def test_a_message_of_another_model_is_refused() -> None:
    other = Layout(codec=0, elements=9, payload_dtype=np.dtype("f4"), payload_items=9)
    assert other.nbytes == LAYOUT.nbytes
    message = staging()
    Message(message.buffer, other).stamp(rank=0, step=0, time_ns=0)
    with pytest.raises(MpiDasgdError, match="got .*9"):
        _ = message.header


# Courier


@pytest.fixture
def couriers() -> Iterator[Callable[..., ProgressThread]]:
    """Makes couriers that are closed at the end of the test."""
    made: list[ProgressThread] = []

    def make(*args: object, **options: object) -> ProgressThread:
        made.append(ProgressThread(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    assert all(courier.close() for courier in made)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_courier_runs_tasks_in_order_in_one_thread(couriers: Callable[..., ProgressThread]) -> None:
    courier = couriers(lambda: None, 60.0)
    ran: list[tuple[int, int]] = []
    for i in range(100):
        courier.submit(lambda i=i: ran.append((i, threading.get_ident())))
    wait_for(lambda: courier.idle)
    assert [i for i, _ in ran] == list(range(100))
    assert {thread for _, thread in ran} != {threading.get_ident()}
    assert len({thread for _, thread in ran}) == 1
    assert courier.busy_seconds == 0.0


def test_courier_finishes_its_tasks_before_it_ends() -> None:
    courier = ProgressThread(lambda: None, 60.0)
    ran: list[int] = []
    for i in range(3):
        courier.submit(lambda i=i: (time.sleep(0.02), ran.append(i)))
    assert courier.close()
    assert ran == [0, 1, 2] and courier.idle
    assert courier.close(), "again does nothing"


def test_courier_calls_for_progress_and_chores_at_intervals(
    couriers: Callable[..., ProgressThread],
) -> None:
    chores: list[float] = []
    calls: list[float] = []
    couriers(
        lambda: chores.append(time.monotonic()),
        0.05,
        lambda: calls.append(time.monotonic()),
        progress_interval=0.001,
    )
    wait_for(lambda: len(chores) >= 4)
    assert len(calls) > 2 * len(chores)
    assert min(np.diff(chores)) >= 0.05
    assert chores[0] - calls[0] < 0.05, "the first chore is due at once"


def test_what_fails_in_the_courier_is_raised_by_check(
    couriers: Callable[..., ProgressThread],
) -> None:
    courier = couriers(lambda: None, 60.0)
    courier.check()
    courier.submit(lambda: [][0])
    wait_for(lambda: courier._error is not None)
    with pytest.raises(IndexError):
        courier.check()
    assert not courier.idle


def test_a_stuck_courier_is_left_behind() -> None:
    courier = ProgressThread(lambda: None, 60.0)
    release = threading.Event()
    courier.submit(release.wait)
    wait_for(lambda: courier.busy_seconds > 0.05)
    assert not courier.idle
    assert not courier.close(timeout=0.05)
    release.set()
    assert courier.close()
