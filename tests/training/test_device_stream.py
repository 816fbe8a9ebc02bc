"""Torch's current stream on a GPU: every line of it runs, on no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpi_dasgd.errors import DeviceFailed
from mpi_dasgd.training.device_stream import CudaStream, device_stream

MILLISECONDS = 4.0  # between two events of a busy device
IDLE_MILLISECONDS = 20.0  # where its clock is still slow


class Event:
    """An event of torch; its time is its number."""

    made = 0
    failure: Exception | None = None
    idle = 0  # how many are still made at the slow clock

    def __init__(self, **options: bool) -> None:
        assert options == {"enable_timing": True, "blocking": True}
        Event.made += 1
        slow = min(Event.made, Event.idle)
        self.time = MILLISECONDS * (Event.made - slow) + IDLE_MILLISECONDS * slow
        self.stream: Any = None

    def record(self, stream: Any) -> None:
        self.stream = stream

    def query(self) -> bool:
        if Event.failure is not None:
            raise Event.failure
        return self.stream == ("current stream of", "cpu")

    def synchronize(self) -> None:
        self.query()

    def elapsed_time(self, later: Event) -> float:
        return later.time - self.time


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch is asked for; the device is the host."""
    noted: list[Any] = []
    empty = torch.empty

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        noted.append("pin")
        return tensor

    def empty_pinned(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        assert pin_memory
        return empty(*shape, **options)

    Event.failure, Event.made, Event.idle = None, 0, 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("current stream of", device))
    monkeypatch.setattr(torch.cuda, "_sleep", noted.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch, "empty", empty_pinned)
    return noted


def test_copies_go_through_pinned_memory(calls: list[Any]) -> None:
    stream = CudaStream("cpu")
    tensor = torch.arange(3.0)
    assert torch.equal(stream.to_device(tensor), tensor) and calls == ["pin"]
    assert torch.equal(stream.to_host(tensor), tensor)
    assert stream.to_host(torch.tensor(2.5)).item() == 2.5


def test_marks_have_times(calls: list[Any]) -> None:
    stream = CudaStream("cpu")
    first, _, third = (stream.mark() for _ in range(3))
    third.wait()
    assert first.is_done and third.seconds_since(first) == pytest.approx(2 * MILLISECONDS / 1e3)


def test_a_failed_device_says_so(calls: list[Any]) -> None:
    mark = CudaStream("cpu").mark()
    Event.failure = RuntimeError("CUDA error: an illegal memory access was encountered")
    for look in (mark.wait, lambda: mark.is_done):
        with pytest.raises(DeviceFailed, match="cpu: CUDA error: an illegal memory access"):
            look()


def test_the_clock_is_measured_once_when_the_device_is_busy(calls: list[Any]) -> None:
    Event.idle = 6
    stream = CudaStream("cpu")
    for _ in range(2):
        stream.keep_busy(1e-3)
    cycles = CudaStream._CALIBRATION
    measured, used = calls[:-2], calls[-2:]
    assert used == [cycles // 4] * 2, "as many as of the last launch, in 4 ms"
    assert set(measured) == {cycles} and 3 < len(measured) < 60


def test_the_host_has_no_stream() -> None:
    assert device_stream("cpu") is None
    assert isinstance(device_stream("cuda:0"), CudaStream)
