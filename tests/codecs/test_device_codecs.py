"""The codecs on a GPU: the same bits as on the host, through hundreds of random exchanges.

The whole path is that of a GPU, with the kernels in the shim and the bodies of messages outside of
their envelopes, but for CuPy and the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import codecs
from mpi_dasgd.algorithms.records import INITIATED, ExchangeRecord, ExchangeRecorder
from mpi_dasgd.codecs import ExchangeBuffers, ExchangeOutcome, Message
from mpi_dasgd.codecs.late_totals import LateTotals
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.errors import MpiDasgdError, UserError
from tests.support.cuda_build import shared_library
from tests.support.exchange_worlds import FLOAT32, HostMemory, Memory, Turn, World, make
from tests.support.fake_cupy import installed
from tests.support.late_cuda_device import GuardedArray, LateCudaDevice, LateCupy, allocate

pytestmark = pytest.mark.slow

NAMES = ("lattice4", "lattice8", "lattice16", "none", "bf16", "fp16")


@pytest.fixture
def cupy() -> Iterator[LateCupy]:
    fake = LateCupy(shared_library())
    with installed(fake):
        yield fake


class FakeMemory:
    """Memory of a device that is late, which only kernels use in an exchange."""

    def __init__(self, cupy: LateCupy, seed: int = 0) -> None:
        self.device: Any = LateCudaDevice(cupy, seed=seed)

    def allocate(self, nbytes: int) -> GuardedArray:
        return allocate(nbytes)

    def read(self, array: Any) -> np.ndarray:
        return np.array(array.view(np.ndarray))

    def write(self, array: Any, values: np.ndarray) -> None:
        array.view(np.ndarray)[...] = values

    def exchange(self) -> AbstractContextManager[None]:
        return GuardedArray.guarded()


class GpuMemory:
    """Memory of a GPU."""

    def __init__(self) -> None:
        from mpi_dasgd.device.cuda import CudaDevice

        self.device: Any = CudaDevice(0)

    def allocate(self, nbytes: int) -> Any:
        return self.device.xp.zeros(nbytes, np.uint8)

    def read(self, array: Any) -> np.ndarray:
        return self.device.to_host(array)

    def write(self, array: Any, values: np.ndarray) -> None:
        self.device.assign(array, values)

    def exchange(self) -> AbstractContextManager[None]:
        return self.device.current_stream()


def _compare(name: str, elements: int, memory: Memory) -> World:
    """Assert that hundreds of exchanges have the same bits there and on the host."""
    host, device = World(name, elements, HostMemory()), World(name, elements, memory)
    rng = np.random.default_rng(7)
    absorbed = set()
    for number in range(600):
        turn = Turn(rng, number, host)
        absorbed.add(turn.absorbed)
        with np.errstate(invalid="ignore", over="ignore"):
            expected, found = host.exchange(turn), device.exchange(turn)
        for ours, theirs in zip(expected, found, strict=True):
            assert host.content(ours) == device.content(theirs), number
        assert host.model(turn.rank) == device.model(turn.rank), number
        assert host.scales(turn.rank) == device.scales(turn.rank), number
    assert absorbed == set(range(7))
    for own, other in zip(host.codecs, device.codecs, strict=True):
        other.settle()
        assert own.counters == other.counters
        assert min(own.counters.values(), default=1) > 0
    for ours, theirs in zip(host.outcomes, device.outcomes, strict=True):
        assert theirs.is_ready
        assert ours.value().rejected == theirs.value().rejected
        np.testing.assert_allclose(theirs.value().distance, ours.value().distance, rtol=1e-5)
    return device


@pytest.mark.parametrize(("name", "elements"), [*((n, 5000) for n in NAMES), ("lattice8", 12_288)])
def test_hundreds_of_exchanges_have_the_bits_of_the_host(
    cupy: LateCupy, name: str, elements: int
) -> None:
    device = _compare(name, elements, FakeMemory(cupy, seed=elements))
    assert device.copies == device.waits == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "elements"),
    [*((n, 5000) for n in NAMES), ("lattice8", 307_200), ("bf16", 307_200)],  # 10 s each
)
def test_hundreds_of_exchanges_have_the_bits_of_the_host_on_a_gpu(name: str, elements: int) -> None:
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    _compare(name, elements, GpuMemory())


@pytest.mark.parametrize("name", NAMES)
def test_deltas_are_those_of_the_host(cupy: LateCupy, name: str) -> None:
    results = []
    for memory in (HostMemory(), FakeMemory(cupy)):
        world = World(name, 3000, memory)  # type: ignore[arg-type]
        publication, reply = world.message(0), world.message(1)
        memory.write(world.models[1], memory.read(world.models[1]) + np.float32(0.01))
        world.codecs[0].encode(world.models[0], publication)
        world.codecs[1].average_pair(
            world.models[1], ExchangeBuffers(partner_model=publication, reply_delta=reply)
        )
        results.append(memory.read(world.codecs[1].delta(reply)).tobytes())
    assert results[0] == results[1] and any(results[0])


def test_state_goes_from_device_to_host_and_back(cupy: LateCupy) -> None:
    memory = FakeMemory(cupy)
    world = World("lattice8", 5000, memory)
    rng = np.random.default_rng(0)
    for number in range(80):
        world.exchange(Turn(rng, number, world))
    state = world.codecs[0].state()
    assert type(state["estimate"]) is np.ndarray and memory.device.copies == 1
    host, device = make("lattice8", 5000, 0), make("lattice8", 5000, 0, memory.device)
    whole, apart = Message(np.zeros(host.layout.nbytes, np.uint8), host.layout), world.message(0)
    whole.stamp(rank=0, step=0, time_ns=0)
    for codec, model, message in (
        (host, memory.read(world.models[0]), whole),
        (device, world.models[0], apart),
    ):
        codec.load_state(state)
        codec.encode(model, message)
    assert memory.read(apart.body).tobytes() == whole.body.tobytes()
    assert apart.seed == whole.seed


def test_messages_of_another_codec_are_refused(cupy: LateCupy) -> None:
    for name in ("lattice8", "bf16", "none"):
        world, other = (World(n, 3000, FakeMemory(cupy)) for n in (name, "fp16"))
        message = world.message(0)
        message.envelope[:] = other.message(0).envelope
        with pytest.raises(MpiDasgdError, match="message header"):
            world.codecs[1].average_pair(world.models[1], ExchangeBuffers(partner_model=message))


def test_who_runs_on_a_device(cupy: LateCupy) -> None:
    device = LateCudaDevice(cupy)
    for name in codecs.CODECS:
        assert codecs.runs_on_device(name, FLOAT32) == (name in NAMES)
        assert not codecs.runs_on_device(name, np.dtype(np.float64))
    for name in NAMES:
        assert make(name, 2000, 0, device).name == name
    with pytest.raises(UserError, match=r"codec\.name: 'qsgd8' does not run on cuda:0"):
        make("qsgd8", 2000, 0, device)
    with pytest.raises(UserError, match=r"'none' does not run on cuda:0 for models of float64"):
        config = CodecConfig(name="none")
        codecs.make(config, 2000, np.dtype(np.float64), seed=1, rank=0, device=device)


# --- late outcomes ---


def _distance(numbers: np.ndarray) -> ExchangeOutcome:
    assert not np.isnan(numbers).any(), "read before the device had written it"
    return ExchangeOutcome(float(numbers[0]), int(numbers[1]))


def _exchanges(
    totals: LateTotals, count: int, resolve: Callable[[np.ndarray], ExchangeOutcome] = _distance
) -> Iterator[Any]:
    for number in range(count):
        slot = totals.reserve()
        slot[:] = (number, number % 7)
        yield totals.add(resolve)


def test_totals_are_resolved_in_order_although_they_come_late(cupy: LateCupy) -> None:
    device = LateCudaDevice(cupy, seed=3)
    order: list[float] = []

    def resolve(numbers: np.ndarray) -> ExchangeOutcome:
        order.append(numbers[0])
        return _distance(numbers)

    late = 0
    outcomes = []
    for outcome in _exchanges(LateTotals(device, 2), 1000, resolve):
        outcomes.append(outcome)
        late += not outcome.is_ready
        _ = outcomes[len(outcomes) // 2].is_ready
    assert late > 100 and device.waits == 0
    assert outcomes[-1].value() == ExchangeOutcome(999.0, 999 % 7)
    assert order == list(range(1000))
    assert [o.value().distance for o in outcomes] == order


def test_a_full_ring_waits_for_the_first(cupy: LateCupy) -> None:
    device = LateCudaDevice(cupy, pace=0)
    totals = LateTotals(device, 2)
    outcomes = list(_exchanges(totals, 100))
    assert device.waits == 100 - 64
    assert [o.is_ready for o in outcomes] == [True] * 36 + [False] * 64
    totals.settle()
    assert [o.value().distance for o in outcomes] == list(range(100))


def test_records_of_a_late_device_are_in_the_order_of_the_exchanges(cupy: LateCupy) -> None:
    device = LateCudaDevice(cupy, seed=5, pace=0.2)
    records: list[ExchangeRecord] = []

    class Endpoint:
        now = 0

        def time_ns(self) -> int:
            self.now += 1000
            return self.now

        class counters:  # noqa: N801
            skipped = 0

    recorder = ExchangeRecorder(Endpoint(), records.append)  # type: ignore[arg-type]
    for number, outcome in enumerate(_exchanges(LateTotals(device, 2), 200)):
        recorder.exchange(INITIATED, number, partner=1, partner_step=0, sent_ns=0, outcome=outcome)
        if number % 3 == 0:
            recorder.skipped(number)
    assert 0 < len(records) < 267 and device.waits == 0
    recorder.flush()
    assert len(records) == 267
    assert [r.step for r in records] == sorted(r.step for r in records)
    measured = [r for r in records if r.partner == 1]
    assert [r.distance for r in measured] == list(range(200))
    assert max(r.late_s for r in records) > 0
