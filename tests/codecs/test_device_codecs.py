"""The codecs on a GPU: the same bits as on the host, through hundreds of random exchanges.

The whole path is that of a GPU, with the kernels in the shim and the bodies of messages outside of
their envelopes, but for CuPy and the device.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import codecs
from mpi_dasgd.algorithms.records import INITIATED, ExchangeRecord, ExchangeRecorder
from mpi_dasgd.codecs import Codec, ExchangeBuffers, ExchangeOutcome, Message
from mpi_dasgd.codecs.late_totals import LateTotals
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.device.host import HOST
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.kernels.cuda import pair_average, scale
from tests.support.cuda_build import build
from tests.support.fake_cupy import install
from tests.support.late_cuda_device import GuardedArray, LateCudaDevice, LateCupy, allocate

pytestmark = pytest.mark.slow
with_kernels = pytest.mark.skipif(  # until they are there
    any(
        "raise NotImplementedError" in inspect.getsource(module) for module in (scale, pair_average)
    ),
    reason="the kernels are not written yet",
)

NAMES = ("lattice4", "lattice8", "lattice16", "none", "bf16", "fp16")
F32 = np.dtype(np.float32)
RANKS = 3
POISON = 400  # exchange from which a model is NaN and another has infinities


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "kernels.so"
    build(library)
    return library


@pytest.fixture
def cupy(library: Path) -> Iterator[LateCupy]:
    before = sys.modules.get("cupy")
    fake = LateCupy(library)
    install(fake)
    yield fake
    del sys.modules["cupy"]
    if before is not None:
        sys.modules["cupy"] = before


def _make(name: str, elements: int, rank: int, device: Any = HOST, **settings: Any) -> Codec:
    config = CodecConfig(name=name, **settings)  # type: ignore[arg-type]
    return codecs.make(config, elements, F32, seed=1, rank=rank, trailer_words=3, device=device)


class World:
    """The ranks of a run, with all that they have sent: on the host, or on the device."""

    def __init__(self, name: str, elements: int, cupy: LateCupy | None, **settings: Any) -> None:
        self.device: Any = HOST if cupy is None else LateCudaDevice(cupy, seed=elements)
        self.codecs = [_make(name, elements, r, self.device, **settings) for r in range(RANKS)]
        rng = np.random.default_rng(elements)
        start = rng.normal(size=elements)
        self.models = [self._array(start.astype(np.float32)) for _ in range(RANKS)]
        self.publications: list[Message | None] = [None] * RANKS
        self.deltas: list[deque[Message]] = [deque() for _ in range(RANKS)]
        self.outcomes: list[Any] = []

    def _array(self, values: np.ndarray) -> np.ndarray:
        if self.device is HOST:
            return values
        array = allocate(values.nbytes).view(values.dtype)
        array[:] = values
        return array

    def message(self, rank: int) -> Message:
        layout = self.codecs[rank].layout
        if self.device is HOST:
            message = Message(np.zeros(layout.nbytes, np.uint8), layout)
        else:
            envelope = np.zeros(layout.envelope_nbytes, np.uint8)
            message = Message(envelope, layout, body=allocate(layout.body_nbytes))
        message.stamp(rank=rank, step=0, time_ns=0)
        return message

    def exchange(self, turn: Turn) -> list[Message]:
        """Do one exchange; return the messages that it wrote."""
        rank, partner = turn.rank, turn.partner
        own, x = self.codecs[rank], self.models[rank]
        values = x.view(np.ndarray)
        values += turn.update
        if turn.poison is not None:
            values[turn.poison] = turn.poison_value
        received = [self.deltas[rank].popleft() for _ in range(turn.absorbed)]
        theirs = None if partner is None else self.publications[partner]
        for message in (*received, theirs):
            if message is not None and turn.corrupt is not None:
                message.body.view(np.ndarray)[turn.corrupt % message.body.size] ^= 8
        reply = self.message(rank) if theirs is not None and turn.replies else None
        publication = self.message(rank) if turn.publishes else None
        buffers = ExchangeBuffers(received, theirs, turn.weight, reply, publication)
        with GuardedArray.guarded():
            self.outcomes.append(own.average_pair(x, buffers))
        if reply is not None and partner is not None:
            self.deltas[partner].append(reply)
        if publication is not None:
            self.publications[rank] = publication
        return [message for message in (reply, publication) if message is not None]


class Turn:
    """A random exchange, the same in both worlds."""

    def __init__(self, rng: np.random.Generator, number: int, world: World, name: str) -> None:
        elements = world.models[0].size
        self.rank = int(rng.integers(RANKS))
        others = [r for r in range(RANKS) if r != self.rank and world.publications[r] is not None]
        self.partner = int(rng.choice(others)) if others and rng.random() < 0.8 else None
        self.absorbed = min(int(rng.integers(0, 7)), len(world.deltas[self.rank]))
        if rng.random() < 0.5:
            self.absorbed = 0  # so that some absorb many at once
        self.replies, self.publishes = rng.random() < 0.9, rng.random() < 0.8
        self.weight = float(rng.choice([0.5, 0.3, 0.25]))
        self.corrupt = int(rng.integers(1 << 30)) if rng.random() < 0.1 else None
        size = 10.0 ** rng.uniform(-5, -1) if rng.random() < 0.9 else 10.0
        self.update = (rng.normal(size=elements) * size).astype(np.float32)
        self.update[rng.random(elements) < 0.5] = 0
        is_lattice = name.startswith("lattice")
        self.poison = None
        if number >= POISON and (is_lattice or number == POISON) and number % 10 == 0:
            self.poison = int(rng.integers(elements))
        if number == 0:  # buckets that are 0 at the start
            self.update[1024:2048] = 0
        self.poison_value = np.float32(np.nan if number % 20 else np.inf)


def _plain(array: Any) -> np.ndarray:
    """Return an array's numbers, with the same bits for all NaN: processors choose them freely."""
    values = np.array(array.view(np.ndarray))
    if values.dtype.kind == "f":
        values[np.isnan(values)] = np.nan
    return values


def _body(message: Message, name: str) -> bytes:
    if name in ("none", "fp16"):
        return _plain(message.payload).tobytes()
    body = np.array(message.body.view(np.ndarray))
    if name == "bf16":
        codes = body.view(np.uint16)
        codes[(codes & 0x7FFF) > 0x7F80] = 0x7FC0
    return body.tobytes()


@with_kernels
@pytest.mark.parametrize(
    ("name", "elements"), [*((name, 5000) for name in NAMES), ("lattice8", 12 * 1024)]
)
def test_hundreds_of_exchanges_have_the_bits_of_the_host(
    cupy: LateCupy, name: str, elements: int
) -> None:
    host, device = World(name, elements, None), World(name, elements, cupy)
    rng = np.random.default_rng(7)
    absorbed, allocations = set(), cupy.allocations
    for number in range(600):
        turn = Turn(rng, number, host, name)
        absorbed.add(turn.absorbed)
        with np.errstate(invalid="ignore", over="ignore"):
            expected, found = host.exchange(turn), device.exchange(turn)
        for ours, theirs in zip(expected, found, strict=True):
            assert np.array_equal(ours.envelope, theirs.envelope), number
            assert _body(ours, name) == _body(theirs, name), number
        models = host.models[turn.rank], device.models[turn.rank]
        assert _plain(models[0]).tobytes() == _plain(models[1]).tobytes(), number
        own, other = host.codecs[turn.rank], device.codecs[turn.rank]
        if isinstance(own, codecs.lattice.LatticeCodec):
            _compare_scales(own, other)
    assert absorbed == set(range(7))
    assert device.device.copies == 0 and device.device.waits == RANKS, "only to make codecs"
    assert cupy.allocations - allocations <= 6 * RANKS, "only statistics of more deltas"
    for own, other in zip(host.codecs, device.codecs, strict=True):
        other.settle()
        assert own.counters == other.counters
        if name.startswith("lattice"):
            assert min(own.counters.values()) > 0
    for ours, theirs in zip(host.outcomes, device.outcomes, strict=True):
        assert theirs.is_ready
        assert ours.value().rejected == theirs.value().rejected
        np.testing.assert_allclose(theirs.value().distance, ours.value().distance, rtol=1e-5)


def _compare_scales(own: Any, other: Any) -> None:
    estimate, last = own.scale.estimate, own.scale._last_scales
    found_estimate, _, found_last, *_ = other.scale._scales._state
    assert estimate.tobytes() == _plain(found_estimate).tobytes()
    assert last.tobytes() == _plain(found_last).tobytes()


@with_kernels
@pytest.mark.parametrize("name", NAMES)
def test_deltas_and_encodings_are_those_of_the_host(cupy: LateCupy, name: str) -> None:
    worlds = World(name, 3000, None), World(name, 3000, cupy)
    results = []
    for world in worlds:
        publication, reply = world.message(0), world.message(1)
        world.models[1].view(np.ndarray)[:] += np.float32(0.01)
        world.codecs[0].encode(world.models[0], publication)
        world.codecs[1].average_pair(
            world.models[1], ExchangeBuffers(partner_model=publication, reply_delta=reply)
        )
        results.append(_plain(world.codecs[1].delta(reply)).tobytes())
    assert results[0] == results[1] and any(results[0])


@with_kernels
def test_state_goes_from_device_to_host_and_back(cupy: LateCupy) -> None:
    device = World("lattice8", 5000, cupy)
    rng, model = np.random.default_rng(0), device.models[0]
    for number in range(80):
        device.exchange(Turn(rng, number, device, "lattice8"))
    state = device.codecs[0].state()
    assert type(state["estimate"]) is np.ndarray and device.device.copies == 1
    host = _make("lattice8", 5000, 0)
    host.load_state(state)
    again = _make("lattice8", 5000, 0, device.device)
    again.load_state(state)
    messages = [device.message(0), device.message(0)]
    whole = Message(np.zeros(host.layout.nbytes, np.uint8), host.layout)
    whole.stamp(rank=0, step=0, time_ns=0)
    again.encode(model, messages[0])
    host.encode(np.array(model.view(np.ndarray)), whole)
    assert messages[0].body.tobytes() == whole.body.tobytes()
    assert messages[0].seed == whole.seed


@with_kernels
def test_messages_of_another_codec_are_refused(cupy: LateCupy) -> None:
    for name in ("lattice8", "bf16", "none"):
        world, other = World(name, 3000, cupy), World("fp16", 3000, cupy)
        message = world.message(0)
        message.envelope[:] = other.message(0).envelope
        with pytest.raises(MpiDasgdError, match="message header"):
            world.codecs[1].average_pair(world.models[1], ExchangeBuffers(partner_model=message))


def test_who_runs_on_a_device(cupy: LateCupy) -> None:
    device = LateCudaDevice(cupy)
    for name in codecs.CODECS:
        assert codecs.runs_on_device(name, F32) == (name in NAMES)
        assert not codecs.runs_on_device(name, np.dtype(np.float64))
        assert _make(name, 2000, 0).runs_on_device == (name in NAMES)
    for name in NAMES:
        assert _make(name, 2000, 0, device).runs_on_device
    with pytest.raises(UserError, match=r"codec\.name: 'qsgd8' does not run on cuda:0"):
        _make("qsgd8", 2000, 0, device)
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
