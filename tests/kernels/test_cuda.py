"""The kernels on a real GPU, with CuPy and with torch: the same bits as on the CPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.kernels import cuda, lattice, reference
from mpi_dasgd.kernels.encoded import BITS, BUCKET_STATS, EncodedVector, buckets_of
from tests.support.lattice_cases import cases, outcomes

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> ModuleType:
    module: ModuleType = pytest.importorskip("cupy")
    if not module.cuda.is_available():
        pytest.skip("no CUDA device")
    return module


@pytest.mark.parametrize("nearest", [False, True], ids=["dither", "nearest"])
@pytest.mark.parametrize("bits", BITS)
def test_same_bits_as_the_reference(cupy: ModuleType, bits: int, nearest: bool) -> None:
    def device(array: np.ndarray) -> Any:
        return cupy.asarray(array.view(np.uint8)).view(array.dtype)  # works for BUCKET_STATS, too

    def host(array: Any) -> np.ndarray:
        return cupy.asnumpy(array.view(np.uint8)).view(array.dtype)

    for case in cases(bits, nearest):
        expected = outcomes(case, reference.run)
        results = outcomes(case, cuda.run, device, host)
        assert not [name for name in results if results[name] != expected[name]], case


@pytest.mark.parametrize("size", [25_000_000, 2**29 + 5])  # the second exceeds 2 GiB
def test_large_models(cupy: ModuleType, size: int) -> None:
    x = cupy.random.default_rng(1).standard_normal(size, dtype=np.float32)
    y = x + cupy.random.default_rng(2).standard_normal(size, dtype=np.float32) * np.float32(1e-3)
    assert y.dtype == np.float32
    partner_model, reply_delta, publication = (
        EncodedVector.empty(size, 8, seed, xp=cupy) for seed in (1, 2, 3)
    )
    for message in (partner_model, publication):
        message.scales[:] = 1e-4
    start = cupy.asnumpy(y)
    stats = cupy.zeros(buckets_of(size) * BUCKET_STATS.itemsize, np.uint8).view(BUCKET_STATS)
    lattice.encode(x, partner_model)
    lattice.fused(y, (), partner_model, 0.5, reply_delta, publication, stats=stats)
    codes, scales, checksums = map(
        cupy.asnumpy, (partner_model.codes, partner_model.scales, partner_model.checksums)
    )
    expected = EncodedVector(size, 8, codes, scales, checksums, seed=1)
    back, forward = EncodedVector.empty(size, 8, seed=2), EncodedVector.empty(size, 8, seed=3)
    forward.scales[:] = 1e-4
    lattice.fused(start, (), expected, 0.5, back, forward, threads=8)
    assert np.array_equal(start.view(np.uint32), cupy.asnumpy(y).view(np.uint32))
    for host, device in ((back, reply_delta), (forward, publication)):
        assert np.array_equal(host.codes, cupy.asnumpy(device.codes))
        assert np.array_equal(host.scales, cupy.asnumpy(device.scales))
        assert np.array_equal(host.checksums, cupy.asnumpy(device.checksums))
    assert not cupy.asnumpy(stats.view(np.uint32))[::4].any()  # nothing was rejected


@pytest.mark.parametrize("way", ["dlpack", "cuda_array_interface"])
def test_torch_tensors_in_place_on_torchs_stream(cupy: ModuleType, way: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch was built without CUDA")
    rng = np.random.default_rng(3)
    size = 1_000_000
    x = rng.normal(size=size).astype(np.float32)
    y = x + rng.uniform(-1e-2, 1e-2, size).astype(np.float32)
    partner_model = EncodedVector.empty(size, 8, seed=4)
    partner_model.scales[:] = 1e-3
    lattice.encode(x, partner_model)
    stream = torch.cuda.Stream()
    source = torch.from_numpy(y).cuda()
    tensor = torch.zeros(size, device="cuda", requires_grad=True)
    message = EncodedVector(
        size,
        8,
        *map(cupy.asarray, (partner_model.codes, partner_model.scales, partner_model.checksums)),
        partner_model.seed,
    )
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would overtake this
        with torch.no_grad():
            tensor.copy_(source)
        detached = tensor.detach()
        array = cupy.from_dlpack(detached) if way == "dlpack" else cupy.asarray(detached)
        assert array.data.ptr == tensor.data_ptr()
        lattice.exchange(array, message, 0.5)
        result = tensor.detach().clone()
    stream.synchronize()
    lattice.exchange(y, partner_model, 0.5)
    assert np.array_equal(result.cpu().numpy().view(np.uint32), y.view(np.uint32))
