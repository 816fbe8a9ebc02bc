"""The step of a local optimizer: the same bits on every back end, those of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.kernels import cpu, native, optimizer, optimizer_reference
from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, OptimizerStep
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
    assert adam["flags"] == optimizer.DECAY | optimizer.DECOUPLED | optimizer.TAIL
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


# --- those of torch ---

SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 100, 432, 1000, 4609, 33_001)
SGD_OPTIONS = (
    {},
    {"weight_decay": 0.01},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.03},
)
ADAM_OPTIONS = (
    {"weight_decay": 0.02},
    {"weight_decay": 0.02, "amsgrad": True},
    {"betas": (0.4, 0.99), "weight_decay": 0.1},
    {"betas": (0.5, 0.75), "maximize": True, "eps": 1e-6},
)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "fused", "options"),
    [
        *(("SGD", fused, options) for fused in (False, True) for options in SGD_OPTIONS),
        *((name, True, options) for name in ("Adam", "AdamW") for options in ADAM_OPTIONS),
    ],
)
def test_the_bits_are_those_of_torch(
    name: str, fused: bool, options: dict[str, Any], threads: int
) -> None:
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch has kernels of other bits for this processor")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _compare_with_torch(torch, name, fused, options)
    finally:
        torch.set_num_threads(before)


def _compare_with_torch(torch: Any, name: str, fused: bool, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    ends = np.cumsum(SIZES)
    x = (rng.standard_normal(ends[-1]) * 10.0 ** rng.integers(-4, 2, ends[-1])).astype(np.float32)
    parameters = [torch.nn.Parameter(torch.from_numpy(p)) for p in _split(x.copy(), ends)]
    torch_optimizer = getattr(torch.optim, name)(parameters, lr=0.037, fused=fused, **options)
    states = [np.zeros_like(x) for _ in range(3)]
    step = OptimizerStep(np.zeros(len(SIZES), SEGMENT), np.zeros(1, GROUP), *states)
    for number in range(1, 5):
        gradients = [
            (rng.standard_normal(n) * 10.0 ** rng.integers(-8, 1, n)).astype(np.float32)
            for n in SIZES
        ]
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            parameter.grad = torch.from_numpy(gradient.copy())
            step.segments[i] = ends[i] - SIZES[i], SIZES[i], gradient.ctypes.data, 0
        torch_optimizer.step()
        step.groups[0] = _group(torch_optimizer.param_groups[0], name, number, fused)
        optimizer.run(step, x)
        assert b"".join(p.detach().numpy().tobytes() for p in parameters) == x.tobytes(), number
    for field, state in zip(
        ("momentum_buffer",) if name == "SGD" else ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        states, strict=False,
    ):  # fmt: skip
        for parameter, ours in zip(parameters, _split(state, ends), strict=True):
            theirs = torch_optimizer.state[parameter].get(field)
            assert (
                (ours == 0).all() if theirs is None else theirs.numpy().tobytes() == ours.tobytes()
            )


def _split(x: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return np.split(x, ends[:-1])


def _group(options: dict[str, Any], name: str, number: int, fused: bool) -> optimizer.Group:
    """Return the scalars of a step, from a parameter group of torch."""
    o = options
    if name == "SGD":
        return optimizer.sgd_group(
            o["lr"], o["momentum"], o["dampening"], o["weight_decay"], nesterov=o["nesterov"],
            maximize=o["maximize"], first=number == 1, fused=fused,
        )  # fmt: skip
    return optimizer.adam_group(
        o["lr"], o["betas"], o["eps"], o["weight_decay"], number, amsgrad=o["amsgrad"],
        maximize=o["maximize"], decoupled=name == "AdamW",
    )  # fmt: skip
