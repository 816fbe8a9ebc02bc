"""The GPU as a device, on a CUDA of host memory (`fake_cuda`): every line of it runs, on no GPU."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpi_dasgd.device import cuda_memory
from mpi_dasgd.device.base import HANDLE_BYTES
from mpi_dasgd.device.cuda import CudaDevice
from mpi_dasgd.device.cuda_memory import GRANULARITY
from mpi_dasgd.errors import DeviceFailed, UserError
from tests.support.fake_cuda import FakeCuda, FakeStream, build_libcuda

DATA = 0x1234_5678_9ABC  # an address of more than 32 bits


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_libcuda(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture
def cuda(libcuda: Path) -> Iterator[FakeCuda]:
    """A machine with a GPU; after the test its host functions have run."""
    with FakeCuda(libcuda).installed() as fake:
        fake.runtime.libcuda.fake_cuda_delay(1000)
        yield fake
        fake.runtime.libcuda.fake_cuda_hold(0)
        fake.runtime.libcuda.fake_cuda_drain()
        fake.runtime.libcuda.fake_cuda_fail(0)


@pytest.fixture
def device(cuda: FakeCuda) -> CudaDevice:
    return CudaDevice(0)


class HostFunction:
    """A native function that notes its argument; as ctypes makes it, it may take the GIL."""

    def __init__(self) -> None:
        self.called: list[int] = []
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.called.append)

    @property
    def address(self) -> int:
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        return address


def test_both_runtimes_are_told_the_device_in_every_thread(cuda: FakeCuda) -> None:
    device = CudaDevice(2)
    assert (device.name, device.xp, device.is_asynchronous) == ("cuda:2", cuda, True)
    cuda.runtime.calls.clear()
    thread = threading.Thread(target=device.bind)
    thread.start()
    thread.join()
    assert cuda.runtime.calls == [("torch.set_device", 2), ("setDevice", 2)]


def test_work_joins_torchs_current_stream(cuda: FakeCuda, device: CudaDevice) -> None:
    for handle in (77, 78, 78, 0):
        cuda.stream = handle
        with device.current_stream():
            assert FakeStream.current[-1].ptr == (handle or 1)  # that of no thread
            with device.current_stream():  # as within a step
                assert FakeStream.current[-1].ptr == (handle or 1)
        assert not FakeStream.current
    made = FakeStream.made
    for handle in (78, 77):
        cuda.stream = handle
        with device.current_stream():
            assert FakeStream.current[-1].ptr == handle
    assert made == FakeStream.made


def test_torchs_streams_outlive_a_device(cuda: FakeCuda) -> None:
    FakeStream.destroyed.clear()
    for _ in range(2):
        device = CudaDevice(0)
        with device.current_stream():
            pass
        del device
        gc.collect()
    assert not FakeStream.destroyed


def test_work_comes_behind_that_of_another_stream(cuda: FakeCuda, device: CudaDevice) -> None:
    """As of a loop on a stream of the user's, and of `close` on the default one."""
    for handle in (77, 77, 0, 78, 78):
        cuda.stream = handle
        with device.current_stream():
            cuda.runtime.calls.append(("work", handle))
    names = ("eventRecord", "streamWaitEvent", "work")
    calls = [call for call in cuda.runtime.calls if call[0] in names]
    events = [call[1] for call in calls if call[0] == "eventRecord"]
    assert calls == [
        ("work", 77), ("work", 77),
        ("eventRecord", events[0], 77), ("streamWaitEvent", 0, events[0]), ("work", 0),
        ("eventRecord", events[1], 0), ("streamWaitEvent", 78, events[1]), ("work", 78),
        ("work", 78),
    ]  # fmt: skip


def test_a_thread_with_another_device_works_on_this_one(cuda: FakeCuda) -> None:
    device, function = CudaDevice(2), HostFunction()
    found: list[int] = []

    def work() -> None:
        before = cuda.runtime.device
        with device.current_stream():
            device.run_after(function.address, DATA)
            found.append(cuda.runtime.device)
        device.assign(device.vector(torch.zeros(3)), np.ones(3))
        device.close()
        found.extend((cuda.runtime.device, before))

    with device.current_stream():  # its stream is kept
        pass
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [2, 0, 0]
    assert cuda.runtime.synchronized == [2]
    assert function.called == [DATA]


def test_a_stream_that_is_captured_is_refused(cuda: FakeCuda, device: CudaDevice) -> None:
    cuda.is_capturing = True
    message = r"captured into a CUDA graph.*step\(\) outside"
    with pytest.raises(UserError, match=message), device.current_stream():
        pass


def test_a_vector_is_the_tensors_memory(device: CudaDevice) -> None:
    tensor = torch.arange(6.0, requires_grad=True)
    vector = device.vector(tensor)
    vector[1] = 7
    assert tensor[1] == 7
    assert vector.data.ptr == tensor.data_ptr()
    assert device.vector(torch.empty(0)).size == 0
    for wrong in (torch.zeros(2, 3), torch.zeros(6)[::2]):
        with pytest.raises(ValueError, match="a contiguous vector is needed"):
            device.vector(wrong)


def test_a_copy_is_no_vector(cuda: FakeCuda, device: CudaDevice) -> None:
    cuda.__dict__["from_dlpack"] = lambda tensor: cuda.zeros(tensor.numel())
    with pytest.raises(ValueError, match="the tensor is on cpu, not on cuda:0"):
        device.vector(torch.zeros(6))


def test_copies_to_the_host_and_back_wait(cuda: FakeCuda, device: CudaDevice) -> None:
    array = device.vector(torch.arange(4.0))
    host = device.to_host(array)
    assert type(host) is np.ndarray
    device.assign(array, host[::-1] * 2)  # neither contiguous nor
    device.assign(array[:2], np.array([9, 8]))  # of the same type
    np.testing.assert_array_equal(device.to_host(array), [9, 8, 2, 0])
    assert len(cuda.runtime.of("eventSynchronize")) == 2


def test_a_region_is_an_allocation_of_its_own(cuda: FakeCuda, device: CudaDevice) -> None:
    region = device.allocate(GRANULARITY + 5)
    assert (region.array.shape, region.array.dtype) == ((GRANULARITY + 5,), np.uint8)
    assert not region.array.any()
    assert cuda.runtime.of("malloc") == [[2 * GRANULARITY]]
    address = region.array.data.ptr
    assert cuda.runtime.of("memset") == [[address, 0, 2 * GRANULARITY]]
    assert cuda.runtime.of("deviceSynchronize") == [[]]
    region.close()
    region.close()
    assert cuda.runtime.of("free") == [[address]]


@pytest.mark.parametrize("kept", [GRANULARITY, 0], ids=["freed by torch and CuPy", "twice"])
def test_out_of_memory(cuda: FakeCuda, device: CudaDevice, kept: int) -> None:
    cuda.runtime.free_bytes, cuda.kept_bytes = GRANULARITY, kept
    if kept:
        device.allocate(2 * GRANULARITY)
    else:
        message = r"payload slots need 4,194,304 bytes on cuda:0, of which 2,097,152 of .*slots"
        with pytest.raises(UserError, match=message):
            device.allocate(2 * GRANULARITY)
    assert cuda.runtime.of("malloc") == [[2 * GRANULARITY]] * 2
    assert (cuda.emptied, len(cuda.runtime.of("torch.empty_cache"))) == (1, 1)
    assert device.mark().is_done  # it is not a failure of the device


def test_other_ranks_open_a_region_once(
    cuda: FakeCuda, device: CudaDevice, libcuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = device.allocate(10)
    handle = region.export()
    assert len(handle) == HANDLE_BYTES
    with pytest.raises(ValueError, match="not opened in the process that has allocated it"):
        device.open_region(handle, 10)
    monkeypatch.setattr(cuda_memory, "_exported", set())  # as in another process
    with FakeCuda(libcuda).installed() as other:
        neighbour = CudaDevice(0)
        first, second = (neighbour.open_region(handle, 10) for _ in range(2))
        first.array[3] = 42
        first.close()
        first.close()
        assert second.array[3] == 42
        assert not other.runtime.of("ipcCloseMemHandle")
        with pytest.raises(NotImplementedError):
            second.export()
        second.close()
        assert len(other.runtime.of("ipcOpenMemHandle")) == 1
        assert len(other.runtime.of("ipcCloseMemHandle")) == 1
        assert region.array.tolist() == [0, 0, 0, 42, 0, 0, 0, 0, 0, 0]
        region.close()
        with pytest.raises(DeviceFailed, match=r"opening another rank's region.*invalid arg"):
            neighbour.open_region(handle, 10)
        assert neighbour.mark().is_done  # it is not a failure of the device


def test_what_cannot_be_exported_leaves_the_device_as_it_was(
    cuda: FakeCuda, device: CudaDevice
) -> None:
    region = device.allocate(10)
    cuda.runtime.status = 1
    with pytest.raises(DeviceFailed, match="exporting a region.*cudaErrorInvalidValue"):
        region.export()
    cuda.runtime.status = 0
    region.export()


def test_mapped_memory_has_one_address(cuda: FakeCuda, device: CudaDevice) -> None:
    on_device, host = device.mapped((2, 3), np.float64)
    assert (host.shape, host.dtype, host.any()) == ((2, 3), np.float64, False)
    on_device[1, 2] = 5
    assert host[1, 2] == 5
    assert on_device.data.ptr == host.ctypes.data
    assert cuda.runtime.of("hostAlloc") == [[48, 3]]  # mapped, for all devices


def test_marks(cuda: FakeCuda, device: CudaDevice) -> None:
    cuda.runtime.not_ready = 2
    mark = device.mark()
    assert [mark.is_done for _ in range(4)] == [False, False, True, True]
    assert len(cuda.runtime.of("eventQuery")) == 3  # what is passed stays passed
    mark.wait()
    assert not cuda.runtime.of("eventSynchronize")
    device.mark().wait()
    assert len(cuda.runtime.of("eventSynchronize")) == 1
    [_, stream], _ = cuda.runtime.of("eventRecord")
    assert stream == cuda.stream
    # Who waits sleeps (1), and it measures no time (2).
    assert cuda.runtime.of("eventCreateWithFlags")[0] == [3]


def test_steps_create_no_events(cuda: FakeCuda, device: CudaDevice) -> None:
    function = HostFunction()

    def step() -> None:
        begin, end = device.mark(), device.mark()
        begin.wait()
        device.run_after(function.address, DATA)
        assert end.is_done

    step()
    created = len(cuda.runtime.of("eventCreateWithFlags"))
    for _ in range(10):
        step()
    assert len(cuda.runtime.of("eventCreateWithFlags")) == created <= 3


def test_host_functions_run_late_in_order_and_after_the_work(
    cuda: FakeCuda, device: CudaDevice
) -> None:
    function = HostFunction()
    cuda.runtime.libcuda.fake_cuda_hold(1)
    for i in range(3):
        device.run_after(function.address, DATA + i)
    assert not function.called
    cuda.runtime.libcuda.fake_cuda_hold(0)
    device.close()
    assert function.called == [DATA, DATA + 1, DATA + 2]
    order = [
        call[0] for call in cuda.runtime.calls if call[0] in ("eventRecord", "streamWaitEvent")
    ]
    assert order == ["eventRecord", "streamWaitEvent"] * 3
    side = {stream for stream, _ in cuda.runtime.of("streamWaitEvent")}
    assert len(side) == 1 and side != {cuda.stream}
    recorded = [event for event, _ in cuda.runtime.of("eventRecord")]
    assert [event for _, event in cuda.runtime.of("streamWaitEvent")] == recorded


def test_the_side_stream_does_not_wait_for_the_default_one(device: CudaDevice) -> None:
    assert device._side.is_non_blocking


@pytest.mark.parametrize("status", [700, 719])
def test_a_failed_device_stays_failed(cuda: FakeCuda, device: CudaDevice, status: int) -> None:
    name = {700: "cudaErrorIllegalAddress", 719: "cudaErrorLaunchFailure"}[status]
    function, region, mark = HostFunction(), device.allocate(1), device.mark()
    cuda.runtime.libcuda.fake_cuda_hold(1)
    device.run_after(function.address, DATA)
    cuda.runtime.fail(status)
    with pytest.raises(DeviceFailed, match=f"cuda:0: the work before an event failed: {name}"):
        mark.is_done  # noqa: B018
    cuda.runtime.status = 0  # whatever CUDA says later
    calls = [
        mark.wait, lambda: mark.is_done, device.mark, device.bind, device.close, region.close,
        region.export, lambda: device.allocate(1), lambda: device.open_region(b"", 1),
        lambda: device.run_after(function.address, DATA), device.current_stream().__enter__,
        lambda: device.mapped((1,), np.float32),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(DeviceFailed, match=f"the work before an event failed: {name}"):
            call()
    cuda.runtime.libcuda.fake_cuda_hold(0)
    cuda.runtime.libcuda.fake_cuda_drain()
    assert not function.called  # no memory is given away


def test_every_call_that_fails_is_noticed(cuda: FakeCuda) -> None:
    devices = [CudaDevice(0) for _ in range(7)]
    marks, region = [device.mark() for device in devices], devices[6].allocate(1)
    cuda.runtime.status = 719
    calls = [
        devices[0].mark, devices[1].close, marks[2].wait, devices[3].bind,
        lambda: devices[4].allocate(1), lambda: devices[5].mapped((1,), np.uint8), region.close,
        lambda: CudaDevice(0),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(DeviceFailed, match="cuda:0: .* failed: cudaErrorLaunchFailure"):
            call()


def test_a_launch_of_a_host_function_that_fails(cuda: FakeCuda, device: CudaDevice) -> None:
    function = HostFunction()
    cuda.runtime.libcuda.fake_cuda_fail(719)
    message = "launching a host function failed: CUDA_ERROR_L"
    for _ in range(2):
        with pytest.raises(DeviceFailed, match=message):
            device.run_after(function.address, DATA)
    time.sleep(0.01)
    assert not function.called


def test_an_error_of_a_kernel_or_of_torch_within_a_step(cuda: FakeCuda) -> None:
    for error in (cuda.cuda.driver.CUDADriverError(719), torch.AcceleratorError("CUDA error: x")):
        work = CudaDevice(0).current_stream()
        with pytest.raises(DeviceFailed, match="work on the device failed"), work:
            raise error
    with pytest.raises(KeyError), CudaDevice(0).current_stream():  # what is not CUDA's
        raise KeyError


def test_no_driver(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> SimpleNamespace:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(DeviceFailed, match=r"driver cannot be used: libcuda\.so\.1: cannot open"):
        CudaDevice(0)
