"""The order of control words on a late device, proved on the virtual clock and on real ranks."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from mpi_dasgd.codecs import ExchangeBuffers, Message, NoCodec
from mpi_dasgd.device.base import HANDLE_BYTES
from mpi_dasgd.errors import DeviceFailed
from tests.support.late_device import LateCodec, LateDevice

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
    for number in range(20):
        device.submit(lambda number=number: done.append(number))
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(done.append)
    mark = device.mark()
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    device.run_after(address, 20)
    assert mark.is_done == (max(delays) == 0)
    mark.wait()
    assert mark.is_done and done[:20] == list(range(20))
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
    device.submit(lambda: done.append(1))
    mark = device.mark()
    device.fail()
    for call in (mark.wait, device.mark, lambda: mark.is_done, lambda: device.run_after(0, 0)):
        with pytest.raises(DeviceFailed):
            call()
    device.close()
    assert not done


def test_regions_are_shared_by_their_handles() -> None:
    device = LateDevice((0.0, 0.0))
    region = device.allocate(4096)
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
        codec.average_pair(x, ExchangeBuffers([delta], partner, 0.5, reply, publication))
        assert (x == 2).all()
        assert (publication.payload == 2).all() == (max(delays) == 0)
        device.close()
        assert (publication.payload == 2).all() and (reply.payload == -1).all()
        assert (codec.work.launches, codec.work.wrong, codec.work.outside) == (1, 0, 1)


def test_memory_that_is_given_away_too_early_is_seen() -> None:
    codec = LateCodec(NoCodec(64, np.dtype(np.float32)), device := LateDevice(DELAYS))
    x = np.zeros(64, np.float32)
    for case in range(3):
        partner, reply, publication = messages(codec.inner, 3)
        with device.current_stream():
            codec.average_pair(x, ExchangeBuffers((), partner, 0.5, reply, publication))
        (partner, reply, publication)[case].payload[5] = 1
    device.close()
    assert (codec.work.given_back, codec.work.taken_away, codec.work.outside) == (1, 2, 0)
