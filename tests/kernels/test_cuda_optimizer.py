"""The optimizer's stage on a GPU, with the kernels in the shim, and what goes there for it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import cuda, optimizer_reference
from mpi_dasgd.kernels.cuda.pair_average import pair_average
from mpi_dasgd.kernels.cuda.table import DeviceTable
from mpi_dasgd.kernels.encoded import FusedStep
from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, OptimizerStep, adam_group, sgd_group
from tests.support.average_cases import FORMATS, HARD, HARD_BITS, plain
from tests.support.fake_cupy import DeviceArray, FakeCupy
from tests.support.optimizer_cases import OptimizerCase, cases

pytestmark = pytest.mark.slow

SHAPES = (None, (1, 32), (2, 96))
STATE = ("first", "second", "third")


def _made(case: OptimizerCase, hard: bool = False) -> tuple[np.ndarray, OptimizerStep]:
    """Return the model and the step of a case, with numbers at the ends of the range if wanted."""
    x, step = case.make()
    if hard:
        rng = np.random.default_rng(case.seed)
        numbers = np.concatenate([HARD, HARD_BITS])
        for array in (x, step.first, step.second, step.third, *step.gradients):
            if array.size:
                array[rng.integers(0, array.size, array.size // 3)] = rng.choice(numbers)
                places = rng.integers(0, array.size, array.size // 3)
                array[places] = rng.choice(numbers, places.size)
    return x, step


def _on_device(step: OptimizerStep) -> OptimizerStep:
    """Return the step with its state as an array of CuPy's, in place."""
    state = (getattr(step, name).view(DeviceArray) for name in STATE)
    copy = OptimizerStep(step.segments, step.groups, *state)
    copy.gradients = step.gradients
    return copy


def _bits(x: np.ndarray, step: OptimizerStep) -> dict[str, np.ndarray]:
    arrays = {"x": x, **{name: getattr(step, name) for name in STATE}}
    return {name: plain(np.asarray(array), "none") for name, array in arrays.items()}


def _require_equal(expected: Any, found: Any, case: object) -> None:
    assert list(expected) == list(found)
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], f"{case}: {name}")


@pytest.mark.parametrize("hard", [False, True], ids=["plain", "hard"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_step_alone_has_the_bits_of_numpy(fake: FakeCupy, hard: bool) -> None:
    for number, case in enumerate(cases((1, 17, 1025, 5000) if hard else (5000, 12_345))):
        fake.shape = SHAPES[number % len(SHAPES)]
        (x, step), (y, other) = _made(case, hard), _made(case, hard)
        optimizer_reference.update(step, x)
        alone = FusedStep(y.view(DeviceArray))
        alone.optimizer = other = _on_device(other)
        cuda.run(alone)
        _require_equal(_bits(x, step), _bits(y, other), case)


@pytest.mark.parametrize("codec", FORMATS)
def test_a_step_in_a_pair_average_is_the_step_before_it(fake: FakeCupy, codec: str) -> None:
    rng = np.random.default_rng(1)
    for number, case in enumerate(list(cases((5000,)))[::7]):
        fake.shape = SHAPES[number % len(SHAPES)]
        numbers = rng.standard_normal((7, 5000)).astype(np.float32)
        payloads = [fake.zeros(5000, FORMATS[codec]) for _ in numbers]
        for values, payload in zip(numbers, payloads, strict=True):
            pair_average(values.view(DeviceArray), publication=payload)
        deltas, partner = payloads[: number % 7], payloads[6] if number % 3 else None
        results = []
        for fused in (False, True):
            x, step = case.make()
            device, step = x.view(DeviceArray), _on_device(step)
            reply, publication = (fake.zeros(5000, FORMATS[codec]) for _ in range(2))
            if not fused:
                pair_average(device, update=step)
            fake.launched.clear()
            update = step if fused else None
            pair_average(device, deltas, partner, 0.5, reply, publication, None, update)
            written = {"reply": plain(np.asarray(reply), codec)}
            written["publication"] = plain(np.asarray(publication), codec)
            results.append(_bits(x, step) | written)
        _require_equal(*results, case)
        kind = case.name[:4].strip(",").lower()
        launches = 1 + (len(deltas) > 4)
        assert fake.launched[0] == "mpd_write_table"
        assert fake.launched[1] == f"mpd_average_{codec}_{kind}"
        assert len(fake.launched) == 1 + launches


def test_a_step_of_two_kinds(fake: FakeCupy) -> None:
    groups = [sgd_group(0.1, 0.9), adam_group(1e-2, (0.9, 0.99), 1e-8, 0.1, 2)]
    case = OptimizerCase("SGD and Adam", 5000, groups, seed=5)
    (x, step), (y, other) = case.make(), case.make()
    optimizer_reference.update(step, x)
    other = _on_device(other)
    publication = fake.zeros(5000, np.float32)
    pair_average(y.view(DeviceArray), publication=publication, update=other)
    _require_equal(_bits(x, step), _bits(y, other), case)
    assert publication.tobytes() == x.tobytes()
    assert fake.launched == ["mpd_write_table", "mpd_sgd", "mpd_average_none_adam"]


# --- what goes to the device ---


def _many(fake: FakeCupy, count: int) -> tuple[Any, OptimizerStep]:
    """Return a model of `count` parameters of 10 elements, and a step of SGD on it."""
    segments = np.zeros(count, SEGMENT)
    segments["offset"], segments["count"] = np.arange(count) * 10, 10
    gradients = np.ones(10 * count, np.float32)
    segments["gradient"] = gradients.ctypes.data + 4 * segments["offset"]
    groups = np.zeros(3, GROUP)  # of which two are not used
    groups[0] = sgd_group(0.5)
    step = OptimizerStep(segments, groups)
    step.gradients = gradients
    return fake.zeros(10 * count, np.float32), step


def _run(fake: FakeCupy, x: Any, step: OptimizerStep) -> int:
    """Make a step; return how many launches have written to its table."""
    fake.launched.clear()
    pair_average(x, update=step)
    assert fake.launched[-1] == "mpd_sgd"
    return fake.launched.count("mpd_write_table")


def test_only_what_has_changed_goes_to_the_device(fake: FakeCupy) -> None:
    x, step = _many(fake, 300)  # 9,720 bytes; a launch writes 4,000
    assert _run(fake, x, step) == 3
    assert _run(fake, x, step) == 0
    step.groups["rate"][0] = -0.25
    assert _run(fake, x, step) == 1
    np.testing.assert_array_equal(x, np.full(3000, -1.25, np.float32))
    step.segments["gradient"][[10, 290]] = 0
    assert _run(fake, x, step) == 2
    assert _run(fake, x, step) == 0
    expected = np.full(3000, -1.75, np.float32)
    expected[100:110] = expected[2900:2910] = -1.25
    np.testing.assert_array_equal(x, expected)


def test_gradients_may_be_elsewhere_in_each_step(fake: FakeCupy) -> None:
    x, step = _many(fake, 3)
    for number in range(1, 6):
        gradients = np.full(30 + number, number, np.float32)
        step.segments["gradient"] = gradients[number:].ctypes.data + 4 * step.segments["offset"]
        _run(fake, x, step)
        step.segments["gradient"] = 0
        gradients[:] = np.nan
        assert _run(fake, x, step) == 1
    np.testing.assert_array_equal(x, np.full(30, -7.5, np.float32))


def test_a_table_is_a_copy(fake: FakeCupy) -> None:
    rng, table = np.random.default_rng(2), DeviceTable()
    content = bytearray(rng.bytes(8 * 1234))
    for _ in range(20):
        content[rng.integers(len(content))] ^= 1
        table.update(bytes(content))
        assert ctypes.string_at(table.address, len(content)) == bytes(content)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("x", "x: expected memory aligned to 16 bytes, got an address that is 4 bytes past that"),
        ("second", "second: expected memory aligned to 16 bytes, got an address that is 4 bytes"),
        ("gradient", "gradient: expected memory that is aligned to its elements; make a copy"),
    ],
)
def test_memory_that_does_not_fit_is_refused(fake: FakeCupy, part: str, message: str) -> None:
    x, step = _many(fake, 3)
    x = np.zeros(31, np.float32)[1:].view(DeviceArray) if part == "x" else x
    if part == "second":
        step.second = np.zeros(31, np.float32)[1:].view(DeviceArray)
    if part == "gradient":
        step.segments["gradient"][1] += 2
    with pytest.raises(UserError, match=message):
        pair_average(x, update=step)
    assert not fake.launched


def test_an_empty_model(fake: FakeCupy) -> None:
    step = OptimizerStep(np.zeros(0, SEGMENT), np.zeros(0, GROUP))
    pair_average(fake.zeros(0, np.float32), update=step)
    pair_average(fake.zeros(5, np.float32), update=step)
    assert set(fake.launched) <= {"mpd_write_table"}
