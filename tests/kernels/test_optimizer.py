"""The step of a local optimizer: the same bits on every back end, those of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from mpi_dasgd.kernels import cpu, native, optimizer, optimizer_reference
from mpi_dasgd.kernels.optimizer import OptimizerStep
from tests.support.optimizer_cases import OptimizerCase, cases

NATIVE = native.load() is not None
needs_native = pytest.mark.skipif(not NATIVE, reason=native.status())
SETS = cpu.instruction_sets() if NATIVE else []


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make the native library use each of its instruction sets."""
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(SETS[0])


def test_scalars_of_sgd_and_adam() -> None:
    sgd = dict(
        zip(
            optimizer.GROUP.names or (),
            optimizer.sgd_group(0.1, 0.9, 0.25, 0.01, nesterov=True, first=True),
            strict=True,
        )
    )
    expected = optimizer.NESTEROV | optimizer.DECAY | optimizer.MOMENTUM | optimizer.FIRST
    assert sgd["kind"] == optimizer.SGD and sgd["flags"] == expected
    assert (sgd["rate"], sgd["fresh"], sgd["momentum"]) == (-0.1, 0.75, 0.9)
    adam = dict(
        zip(
            optimizer.GROUP.names or (),
            optimizer.adam_group(0.1, (0.5, 0.75), 1e-8, 0.5, 2, decoupled=True),
            strict=True,
        )
    )
    assert adam["kind"] == optimizer.ADAM
    assert adam["flags"] == optimizer.DECAY | optimizer.DECOUPLED
    assert (adam["decay"], adam["rate"]) == (1 - 0.1 * 0.5, -(0.1 / 0.75))
    assert adam["root"] == (1 - 0.75**2) ** 0.5


# --- the same bits ---


def _outcome(
    case: OptimizerCase, run: Callable[[OptimizerStep, np.ndarray], None]
) -> dict[str, bytes]:
    """Return all arrays of a step behind it."""
    x, step = case.make()
    run(step, x)
    state = {name: getattr(step, name) for name in ("first", "second", "third", "nonfinite")}
    return {name: array.tobytes() for name, array in {"x": x, **state}.items()}


@needs_native
def test_native_library_and_numpy_agree_bit_for_bit(instruction_set: str) -> None:
    for case in cases():
        assert _outcome(case, optimizer.run) == _outcome(case, optimizer_reference.update), str(
            case
        )


@needs_native
def test_parts_and_threads_do_not_matter() -> None:
    def by_parts(step: OptimizerStep, x: np.ndarray) -> None:
        for begin in range(0, x.size, 999):
            optimizer.run_part(step, x[begin : begin + 999], begin)

    for case in list(cases((200_000,)))[::9]:
        whole = _outcome(case, optimizer.run)
        assert _outcome(case, lambda step, x: optimizer.run(step, x, threads=3)) == whole, str(case)
        assert _outcome(case, by_parts) == whole, str(case)


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(3000).astype(np.float32) for _ in range(2))
    c = (-a * b * rng.choice([1, 1 + 1e-7, 1e-3, 1e9], a.size)).astype(np.float32)
    # Halfway between two numbers but for a little that float64 does not see beside the sum.
    a[:4], b[:4] = [1 + 2**-12] * 2 + [2**-60] * 2, [1 + 2**-12] * 2 + [1, -1]
    c[:4] = [2**-30, -(2**-30), 1 + 2**-23, 1 + 2**-23]
    a[4:6], b[4:6], c[4:6] = 2**-100, [2**-46, -(2**-46)], 2**-126
    rounded = optimizer_reference.fma(a, b, c)
    below, above = (np.nextafter(rounded, np.float32(end)) for end in (-np.inf, np.inf))
    for i in range(a.size):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        error = abs(exact - Fraction(float(rounded[i])))
        for other in (below[i], above[i]):
            distance = abs(exact - Fraction(float(other)))
            even = rounded[i : i + 1].view(np.uint32)[0] & 1 == 0
            assert error < distance or (error == distance and even), i
