"""Swaps made by native code in another thread, as a device's driver runs it: late, and in order."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from mpi_dasgd.errors import DeviceFailed, UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.release import Immediate, await_release
from mpi_dasgd.transport.rma import launched_release
from mpi_dasgd.transport.rma.launched_release import MAX_SWAPS, Launched, make_release
from tests.support.mpi_ranks import ROOT, run_ranks
from tests.support.rank_pool import run_pooled

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(
    not hasattr(LIBRARY, "mpd_release"), reason=f"without mpd_release: {native.status()}"
)


class Words:
    """Control words of two ranks, in memory of this process."""

    def __init__(self) -> None:
        self.values = np.zeros((2, 8), np.int64)

    def address(self, rank: int, index: int) -> int:
        return self.values.ctypes.data + 8 * (8 * rank + index)


class Device:
    """Runs functions when told, in another thread, as a driver does."""

    name = "late"
    is_asynchronous = True

    def __init__(self) -> None:
        self.asked: deque[tuple[int, int]] = deque()
        self.has_failed = False

    def run_after(self, function: int, data: int) -> None:
        self.asked.append((function, data))

    def mark(self) -> Device:
        return self

    @property
    def is_done(self) -> bool:
        if self.has_failed:
            raise DeviceFailed("out of order")
        return not self.asked

    def pass_by(self, count: int | None = None) -> None:
        """Run the next functions, without the GIL, in a thread of its own."""
        for _ in range(len(self.asked) if count is None else count):
            function, data = self.asked.popleft()
            call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
            thread = threading.Thread(target=call, args=(data,))
            thread.start()
            thread.join()


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def device() -> Device:
    return Device()


def launched(words: Words, device: Device, **settings: float) -> Launched:
    assert LIBRARY is not None
    return Launched(words, device, LIBRARY, **settings)  # type: ignore[arg-type]


def test_swaps_are_made_when_the_device_passes_and_not_before(words: Words, device: Device) -> None:
    """Fails if `swap` or `flush` swaps, or if a batch is not done in order."""
    release = launched(words, device)
    release.flush()
    assert not device.asked, "nothing to do"
    assert release.swap(0, 3, 0, 1) is None  # type: ignore[func-returns-value]
    release.swap(0, 3, 1, 2, required=True)
    release.swap(1, 7, 0, 1 << 61, required=True)
    assert release.is_pending, "not flushed"
    release.flush()
    assert release.is_pending and not words.values.any()
    release.swap(0, 3, 2, 3)
    release.flush()
    device.pass_by(1)
    assert words.values[0, 3] == 2 and words.values[1, 7] == 1 << 61
    assert release.is_pending, "the second batch"
    device.pass_by()
    assert words.values[0, 3] == 3
    assert not release.is_pending


def test_a_swap_that_finds_another_word_changes_nothing_and_is_told_if_required(
    words: Words, device: Device
) -> None:
    """Fails if `failed` is not read, or is read of swaps that may fail."""
    release = launched(words, device)
    release.swap(0, 1, 5, 6)
    release.flush()
    device.pass_by()
    release.swap(0, 1, 0, 2)
    release.swap(0, 1, 0x77, 0x88, required=True)
    release.swap(0, 2, 0, 9, required=True)
    release.flush()
    device.pass_by()
    assert list(words.values[0, :3]) == [0, 2, 9], "those behind it are made all the same"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="0x77, and could not become 0x88"):
            release.flush()
    with pytest.raises(RuntimeError, match="protocol"):
        await_release(release)


def test_the_ring_goes_round_and_never_overwrites_a_batch_on_its_way(
    words: Words, device: Device
) -> None:
    """Fails if batches are reused before they are done."""
    release = launched(words, device, batches=3, timeout=20.0)
    for value in range(10):
        release.swap(0, 0, value, value + 1, required=True)
        release.flush()
        device.pass_by()
    assert words.values[0, 0] == 10
    for value in range(10, 13):
        release.swap(0, 0, value, value + 1, required=True)
        release.flush()
    release.swap(0, 0, 13, 14, required=True)
    waiter = threading.Thread(target=release.flush)
    waiter.start()
    time.sleep(0.02)
    assert waiter.is_alive() and len(device.asked) == 3, "it waits for the first batch"
    device.pass_by(1)
    waiter.join(20)
    assert not waiter.is_alive()
    device.pass_by()
    await_release(release)
    assert words.values[0, 0] == 14


def test_a_long_batch_is_divided(words: Words, device: Device) -> None:
    """Fails if more swaps are written than a batch has place for."""
    release = launched(words, device)
    count = 2 * MAX_SWAPS + 1
    for value in range(count):
        release.swap(0, 0, value, value + 1, required=True)
    release.flush()
    assert len(device.asked) == 3
    device.pass_by()
    await_release(release)
    assert words.values[0, 0] == count


def test_a_device_that_has_failed_is_noticed_by_all_who_wait(words: Words, device: Device) -> None:
    """Fails if only the words are looked at: that wait would never end."""
    release = launched(words, device, batches=1, timeout=0.02)
    release.swap(0, 0, 0, 1)
    release.flush()
    release.swap(0, 0, 1, 2)
    with pytest.raises(DeviceFailed, match=r"not come to the end of a step for 0\.02 s"):
        release.flush()
    with pytest.raises(DeviceFailed, match=r"not done with its work after 0\.01 s"):
        await_release(release, timeout=0.01)
    device.has_failed = True
    with pytest.raises(DeviceFailed, match="out of order"):
        _ = release.is_pending
    with pytest.raises(DeviceFailed, match="out of order"):
        release.flush()
    device.pass_by()
    _ = release.is_pending


def test_what_is_on_its_way_outlives_its_owner(words: Words, device: Device) -> None:
    """Fails if the batches belong to the release alone: native code would read freed memory."""
    release = launched(words, device)
    alive = len(Launched._on_their_way)
    release.swap(0, 0, 0, 1)
    release.flush()
    del release
    gc.collect()
    assert len(Launched._on_their_way) == alive + 1
    (release,) = [r for r in Launched._on_their_way if r._device is device]  # type: ignore[comparison-overlap]
    device.pass_by()
    assert not release.is_pending and len(Launched._on_their_way) == alive


class Comm:
    """Communicator of two ranks, of which the other one answers `answer`."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer

    def allgather(self, value: bool) -> list[bool]:
        return [value, self.answer]


def test_an_older_library_is_refused_on_all_ranks(
    words: Words, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if `mpd_release` is looked up unasked (AttributeError), or on this rank alone."""
    monkeypatch.setitem(
        launched_release.__dict__, "_is_in_memory_of_the_node", lambda w: isinstance(w, Words)
    )
    host = SimpleNamespace(is_asynchronous=False)
    assert isinstance(make_release(Comm(), words, host), Immediate)  # type: ignore[arg-type]
    assert isinstance(make_release(Comm(), words, device), Launched)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"transport\.memory.*late.*older.*pip install"):
        make_release(Comm(False), words, device)  # type: ignore[arg-type]
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(mpd_word_read=None))
    with pytest.raises(UserError, match="older"):
        make_release(Comm(), words, device)  # type: ignore[arg-type]


@pytest.mark.mpi
def test_windows_are_freed_when_all_swaps_are_made() -> None:
    """Fails if `close` does not wait for the device: native code would write to freed words."""
    run_pooled(
        2,
        """
        import contextlib, threading
        import numpy as np
        from mpi4py import MPI
        from mpi_dasgd import topology
        from mpi_dasgd.codecs import Layout
        from mpi_dasgd.config.schema import TransportConfig
        from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
        from mpi_dasgd.transport.rma.launched_release import Launched
        from tests.support.late_device import LateDevice

        comm = MPI.COMM_WORLD
        layout = Layout(codec=0, elements=8, payload_dtype=np.dtype("f4"), payload_items=8)
        graph = topology.build("complete", 2)
        device = LateDevice((0.001, 0.001))
        held = contextlib.ExitStack()
        held.enter_context(device.held())
        endpoint = RmaEndpoint(comm, layout, graph, TransportConfig(), device=device)
        release, words = endpoint.release, endpoint._words
        assert isinstance(release, Launched)
        endpoint.publication.reserve()
        endpoint.publication.publish()
        assert not endpoint.is_flushed()
        found = []
        free = words.close
        words.close = lambda: (found.append(release.is_pending), free())
        threading.Timer(0.1, held.close).start()
        endpoint.close()
        assert found == [False], found
        """,
    )


@pytest.mark.mpi
@pytest.mark.parametrize("end", ["killed", "fails", "fails in close"])
def test_no_rank_waits_for_the_swaps_of_one_that_has_ended(end: str) -> None:
    """Fails if what is pending counts as given away, or a device that has failed is waited for."""
    program = ROOT / "tests" / "programs" / "late_death.py"
    job = run_ranks(3, program, end, check=False)
    if end == "killed":
        assert job.codes == [0, 0, 137], job.report()
        assert job.stdout.count("has finished") == 2
    else:
        assert job.code == 1 and "DeviceFailed: late:0" in job.stderr, job.report()
