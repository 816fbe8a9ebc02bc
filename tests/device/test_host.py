"""The host as a device: everything is done when its call returns."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from mpi_dasgd.device.host import HOST


def test_a_vector_is_the_tensors_memory():
    tensor = torch.arange(4.0)
    HOST.vector(tensor)[1] = 7
    assert tensor[1] == 7


def test_copies_to_the_host_and_back_need_no_memory():
    array = np.arange(3.0)
    assert HOST.to_host(array) is array
    HOST.assign(array, np.ones(3))
    np.testing.assert_array_equal(array, 1)


def test_everything_is_done_at_once():
    HOST.bind()
    with HOST.current_stream():
        mark = HOST.mark()
    assert mark.is_done
    mark.wait()
    called = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(called.append)
    HOST.run_after(ctypes.cast(callback, ctypes.c_void_p).value, 12)
    assert called == [12]
    HOST.close()


def test_what_the_device_writes_the_host_reads():
    device, host = HOST.mapped((2, 3), np.dtype(np.float64))
    device[1, 2] = 5
    assert host[1, 2] == 5
    assert host.sum() == 5


def test_slots_of_the_host_are_in_windows():
    with pytest.raises(NotImplementedError):
        HOST.allocate(64)
    with pytest.raises(NotImplementedError):
        HOST.open_region(bytes(64), 64)
