"""The kernels on a real GPU, with CuPy and with torch: the same bits as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.kernels import cuda, lattice, optimizer, optimizer_reference, reference
from mpi_dasgd.kernels.cuda.pair_average import pair_average
from mpi_dasgd.kernels.cuda.scale import BucketScales
from mpi_dasgd.kernels.encoded import BITS, BUCKET, BUCKET_STATS, EncodedVector, buckets_of
from mpi_dasgd.kernels.optimizer import OptimizerStep
from tests.support.average_cases import (
    FORMATS,
    AverageCase,
    average_cases,
    expected_average,
    found_average,
    plain,
)
from tests.support.lattice_cases import cases, outcomes
from tests.support.optimizer_cases import cases as optimizer_cases
from tests.support.scale_cases import compare_scales

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> ModuleType:
    module: ModuleType = pytest.importorskip("cupy")
    if not module.cuda.is_available():
        pytest.skip("no CUDA device")
    return module


@pytest.fixture(scope="module")
def device(cupy: ModuleType) -> Callable[[np.ndarray], Any]:
    """Copies an array to the device; structures, too."""
    return lambda array: cupy.asarray(array.view(np.uint8)).view(array.dtype)


@pytest.fixture(scope="module")
def host(cupy: ModuleType) -> Callable[[Any], np.ndarray]:
    """Copies it back."""
    return lambda array: cupy.asnumpy(array.view(np.uint8)).view(array.dtype)


@pytest.mark.parametrize("nearest", [False, True], ids=["dither", "nearest"])
@pytest.mark.parametrize("bits", BITS)
def test_same_bits_as_the_reference(device: Any, host: Any, bits: int, nearest: bool) -> None:
    for case in cases(bits, nearest):
        expected = outcomes(case, reference.run)
        results = outcomes(case, cuda.run, device, host)
        assert not [name for name in results if results[name] != expected[name]], case


def test_steps_of_optimizers_are_those_of_numpy(device: Any, host: Any) -> None:
    for case in list(optimizer_cases((5000,)))[::2]:
        (x, expected), (y, found) = case.make(), case.make()
        optimizer_reference.update(expected, x)
        gradients = [device(gradient) for gradient in found.gradients]
        at = np.array([gradient.data.ptr for gradient in gradients], np.uint64)
        found.segments["gradient"] = np.where(found.segments["gradient"], at, 0)
        state = [device(array) for array in (found.first, found.second, found.third)]
        model, step = device(y), OptimizerStep(found.segments, found.groups, *state)
        optimizer.run(step, model)
        pairs = zip(
            (x, expected.first, expected.second, expected.third), (model, *state), strict=True
        )
        assert [a.tobytes() == host(b).tobytes() for a, b in pairs] == [True] * 4, str(case)


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_those_of_the_host(device: Any, host: Any, bits: int) -> None:
    for elements, rounds in ((300 * BUCKET - 37, 25), (15 * BUCKET, 60), (40_000 * BUCKET, 8)):
        for name, expected, found in compare_scales(bits, rounds, device, host, elements):
            assert expected == found, (elements, name)


@pytest.mark.parametrize("codec", FORMATS)
def test_averages_are_those_of_the_host(device: Any, host: Any, codec: str) -> None:
    for case in average_cases(codec):
        (expected, distance), (found, square) = (
            expected_average(case),
            found_average(case, device, host),
        )
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name], f"{case}: {name}")
        if case.x.size and case.partner_model is not None and np.isfinite(distance):
            assert square**0.5 == pytest.approx(distance, rel=1e-4), case


@pytest.mark.parametrize("codec", ["none", "bf16"])
@pytest.mark.parametrize("size", [25_000_000, 2**31 + 5])  # the second needs 64-bit indices
def test_averages_and_ranges_of_large_models(cupy: ModuleType, size: int, codec: str) -> None:
    block = cupy.random.default_rng(1).standard_normal(min(size, 1 << 24), dtype=np.float32)
    x = cupy.zeros(size, np.float32)
    partner, reply, publication = (cupy.zeros(size, FORMATS[codec]) for _ in range(3))
    places = [slice(0, 5000), slice(size // 2, size // 2 + 5000), slice(size - 5000, size)]
    _repeat(block, x)
    theirs = [cupy.asnumpy(x[place]) for place in places]
    pair_average(x, publication=partner)
    _repeat(block * np.float32(1.25), x)
    before = [cupy.asnumpy(x[place]) for place in places]
    scales = BucketScales(buckets_of(size), 0.02, 0.9, True)
    scales.measure(x)
    last = before[-1][-((size - 1) % BUCKET + 1) :]  # of the last bucket
    floor = np.abs(last).max() * np.float32(2.0**-21)
    assert float(scales.floor[-1]) == max(floor, np.float32(1e-30))
    square = cupy.zeros(1, np.float64)
    pair_average(x, (), partner, 0.5, reply, publication, square)
    for place, own, other in zip(places, before, theirs, strict=True):
        case = AverageCase(codec, own, (), other, True, True, 0.5)
        expected = expected_average(case)[0]
        for name, array in (("x", x), ("reply", reply), ("publication", publication)):
            found = plain(cupy.asnumpy(array[place]), codec)
            np.testing.assert_array_equal(expected[name], found, name)
    assert float(square[0]) == pytest.approx(size / 16, rel=0.01)  # of N(0, 1) / 4
    del x, partner, reply, publication
    cupy.get_default_memory_pool().free_all_blocks()


def _repeat(block: Any, target: Any) -> None:
    for start in range(0, target.size, block.size):
        part = target[start : start + block.size]
        part[:] = block[: part.size]


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
    in_cupy = cupy.cuda.Stream.from_external(_CudaStream(stream.cuda_stream))
    with torch.cuda.stream(stream), in_cupy:
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


class _CudaStream:
    """A stream in CUDA's stream protocol, which not all versions of torch speak."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle
