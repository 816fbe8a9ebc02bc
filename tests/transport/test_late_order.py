"""The order of control words on a late device, proved on the virtual clock and on real ranks."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.codecs import ExchangeBuffers, Message, NoCodec
from mpi_dasgd.device.base import HANDLE_BYTES
from mpi_dasgd.errors import DeviceFailed
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.release import Immediate, Release
from mpi_dasgd.transport.virtual.network import Network
from tests.support.late_codec import LateCodec
from tests.support.late_device import LateDevice
from tests.support.late_faults import (
    AT_ONCE,
    Collects,
    CountsSlots,
    Hasty,
    HeadFirst,
    RetiresFirst,
    WritesNewest,
)
from tests.support.late_release import QueuedRelease
from tests.support.late_simulation import (
    LateSimulation,
    VirtualQueue,
    simulate_late,
)

DELAYS = (2e-3, 5e-3)


def messages(codec: NoCodec, count: int) -> list[Message]:
    made = [Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout) for _ in range(count)]
    for message in made:
        message.stamp(rank=0, step=0, time_ns=0)
    return made


@pytest.mark.parametrize("delays", [(0.0, 0.0), DELAYS])
def test_the_device_does_its_work_late_and_in_order(delays: tuple[float, float]) -> None:
    device = LateDevice(delays)
    done: list[int] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(done.append)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    with device.held():
        for number in range(20):
            device.submit(lambda number=number: done.append(number))
        mark = device.mark()
        device.run_after(address, 20)
        assert mark.is_done == bool(done) == (max(delays) == 0)
    mark.wait()
    assert mark.is_done and done[:20] == list(range(20))
    asked = time.monotonic()
    device.mark().wait()
    assert time.monotonic() - asked >= min(delays)
    device.close()
    assert done == list(range(21))
    tensor = torch.arange(3.0)
    device = LateDevice()
    device.vector(tensor)[1] = 7
    copy = device.to_host(device.vector(tensor))
    copy[0] = 1
    assert tensor.tolist() == [0, 7, 2]
    device.close()


def test_a_device_that_has_failed_does_nothing_more() -> None:
    device = LateDevice(DELAYS)
    done: list[int] = []
    with device.held():
        device.submit(lambda: done.append(1))
        mark = device.mark()
        device.fail()
    run_after = functools.partial(device.run_after, 0, 0)
    for call in (mark.wait, device.mark, lambda: mark.is_done, run_after, device.close):
        with pytest.raises(DeviceFailed):
            call()
    assert not done


def test_regions_are_shared_by_their_handles() -> None:
    device = LateDevice((0.0, 0.0))
    left_over = Path("/dev/shm/mpi-dasgd-late-999999999-0")
    left_over.touch()
    region = device.allocate(4096)
    assert not left_over.exists(), "of a process that was killed"
    handle = region.export()
    assert len(handle) == HANDLE_BYTES
    other = device.open_region(handle, 4096)
    other.array[7] = 9
    assert region.array[7] == 9 and region.array.sum() == 9
    other.close()
    region.close()
    with pytest.raises(DeviceFailed):
        device.open_region(handle, 4096)


def test_outputs_are_there_when_they_are_due() -> None:
    """And the model at once, as the codec makes it; with delay 0 nothing is late."""
    inner = NoCodec(64, np.dtype(np.float32))
    for delays in ((0.0, 0.0), DELAYS):
        device = LateDevice(delays)
        codec = LateCodec(inner, device)
        partner, reply, publication, delta = messages(inner, 4)
        partner.payload[:], delta.payload[:] = 3, 1
        x = np.zeros(64, np.float32)
        with device.held():
            codec.average_pair(x, ExchangeBuffers([delta], partner, 0.5, reply, publication))
            assert (x == 2).all()
            assert (publication.payload == 2).all() == (max(delays) == 0)
        device.close()
        assert (publication.payload == 2).all() and (reply.payload == -1).all()
        assert (codec.work.launches, codec.work.wrong, codec.work.outside) == (1, 0, 1)


def test_memory_that_is_given_away_too_early_is_seen() -> None:
    codec = LateCodec(NoCodec(64, np.dtype(np.float32)), device := LateDevice(DELAYS))
    x = np.zeros(64, np.float32)
    with device.held():
        for case in range(3):
            partner, reply, publication = messages(codec.inner, 3)
            with device.current_stream():
                codec.average_pair(x, ExchangeBuffers((), partner, 0.5, reply, publication))
            (partner, reply, publication)[case].payload[5] = 1
    device.close()
    assert (codec.work.given_back, codec.work.taken_away, codec.work.outside) == (1, 2, 0)


def faulty(
    at_once: str = "", order: type[HeadFirst] | None = None
) -> Callable[[int, Network, VirtualQueue], Release]:
    """Return a release with one fault."""

    def make(rank: int, network: Network, queue: VirtualQueue) -> Release:
        inner, words = QueuedRelease(network.memory, queue), network.memory
        if order is not None:
            return order(inner, rank, words.word_map)
        return Hasty(inner, words, AT_ONCE[at_once], rank, words.word_map.inbox)

    return make


def immediate(rank: int, network: Network, queue: VirtualQueue) -> Release:
    return Immediate(network.memory)


SWARM = ("algorithm.name=swarm", "algorithm.local_steps=4")
EQUAL = ("simulation.compute_time=constant",)


@pytest.mark.parametrize(
    ("settings", "delay"),
    [
        *[((), delay) for delay in (0.0, 0.02, 0.25, 1.0, 1.5)],
        *[(("codec.name=none",), 0.25), (EQUAL, 0.0), (EQUAL, 0.9)],
        *[(SWARM, 0.05), (SWARM, 1.0), ((*SWARM, "codec.name=none"), 0.25)],
    ],
)
def test_what_is_given_away_late_is_never_used_too_early(
    settings: tuple[str, ...], delay: float
) -> None:
    found = simulate_late(*settings, delay=delay)
    assert found["launches"] > 300 and found["exchanges"] > (100 if delay < 0.9 else 50)
    assert found["given back"] == found["taken away"] == found["failed"] == 0
    assert (
        found["overwritten"]
        == found["head before ready"]
        == found["freed before the head moved"]
        == 0
    )
    assert found["sum off"] < 2e-5 and found["corrupt"] == found["pending"] == 0
    assert found["rejected"] < 0.1
    if delay < 0.5:
        assert found["unpublished"] < 0.1 * found["publications"]


@pytest.mark.parametrize(
    ("faults", "sign", "least"),
    [
        ({"release": immediate}, "given back", 100),
        ({"release": immediate}, "sum off", 0.1),
        ({"release": faulty("all")}, "given back", 100),
        ({"release": faulty("publish")}, "given back", 50),
        ({"release": faulty("publish")}, "rejected", 0.3),
        ({"release": faulty("send")}, "sum off", 0.1),
        ({"release": faulty("release")}, "given back", 10),
        ({"release": faulty("free")}, "given back", 3),
        ({"release": faulty(order=HeadFirst)}, "head before ready", 100),
        ({"release": faulty(order=RetiresFirst)}, "freed before the head moved", 30),
        ({"publication": Collects}, "failed", 5),
        ({"publication": WritesNewest}, "overwritten", 30),
    ],
    ids=lambda value: str(value)[:30],
)
def test_each_fault_is_seen(faults: dict[str, Any], sign: str, least: float) -> None:
    """The test above can fail."""
    assert simulate_late(delay=0.25, **faults)[sign] >= least


def test_slots_whose_swap_is_pending_are_not_claims() -> None:
    right, wrong = (
        simulate_late(delay=1.0, publication=cls)["unpublished"]
        for cls in (Publication, CountsSlots)
    )
    assert wrong > 1.5 * right


@pytest.mark.parametrize("flush", [True, False])
def test_a_rank_has_finished_once_its_swaps_are_made(flush: bool) -> None:
    """Else the others absorb for the last time before its last delta is there."""
    late = LateSimulation(delay=0.25)
    late.run()
    for _ in range(2):
        while late.simulator.clock.advance():
            pass
        late.step()
    assert not all(endpoint.is_flushed() for endpoint in late.simulator.endpoints)
    late.end(flush=flush)
    assert (late.sum_off(in_flight=False) < 2e-5) == flush
