"""The lattice codec: the same bits on every backend, correct within reach, rejected beyond."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import cpu, lattice, native, reference
from mpi_dasgd.kernels.encoded import (
    BITS,
    BUCKET,
    BUCKET_STATS,
    EncodedVector,
    FusedStep,
    buckets_of,
)
from tests.support.lattice_cases import Case, cases, outcomes

NATIVE = native.load() is not None
needs_native = pytest.mark.skipif(not NATIVE, reason=native.status())
SETS = cpu.instruction_sets() if NATIVE else []

bits_of = pytest.mark.parametrize("bits", BITS)
rounding = pytest.mark.parametrize("nearest", [False, True], ids=["dither", "nearest"])


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make the native library use each of its instruction sets."""
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(SETS[0])


def _with_threads(count: int) -> Callable[[FusedStep], None]:
    def run(step: FusedStep) -> None:
        step.threads = count
        cpu.run(step)

    return run


# --- the same bits ---


@needs_native
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86-64")
def test_the_library_has_the_instruction_sets_of_this_machine() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    expected = ["AVX-512"] if "avx512vl" in flags and "avx512bw" in flags else []
    assert [*expected, *(["AVX2"] if " avx2 " in flags else []), "SSE2"] == SETS


@pytest.mark.slow
@needs_native
@bits_of
@rounding
def test_native_library_and_numpy_agree_bit_for_bit(
    bits: int, nearest: bool, instruction_set: str
) -> None:
    for case in cases(bits, nearest):
        expected, results = outcomes(case, reference.run), outcomes(case, cpu.run)
        assert [name for name in expected if results[name] != expected[name]] == [], str(case)


@needs_native
@bits_of
def test_results_do_not_depend_on_the_number_of_threads(bits: int) -> None:
    (case, _, *smaller) = cases(bits, False, sizes=(3 * 64 * BUCKET + 5,))
    for each in (case, *smaller):  # these are too small for threads of their own
        assert outcomes(each, _with_threads(3)) == outcomes(each, cpu.run), str(each)


@pytest.mark.slow
@needs_native
@bits_of
def test_large_models_have_the_same_bits(bits: int) -> None:
    rng = np.random.default_rng(bits)
    x = rng.normal(size=1_100_000).astype(np.float32)
    y = x + rng.normal(size=x.size).astype(np.float32) * np.float32(1e-3)
    scales = np.full(buckets_of(x.size), 1e-2 / 2 ** (bits - 1), np.float32)
    case = Case("large", bits, False, x, y, scales)
    assert outcomes(case, cpu.run) == outcomes(case, reference.run)


@needs_native
@pytest.mark.parametrize("offset", [1, 3, 7, 15])
def test_alignment_does_not_matter(offset: int) -> None:
    (case,) = [case for case in cases(8, False) if case.name == "5000 elements"]

    def shifted(array: np.ndarray) -> np.ndarray:
        padded = np.zeros(array.size + offset, array.dtype)
        padded[offset:] = array
        return padded[offset:]

    assert outcomes(case, cpu.run, device=shifted) == outcomes(case, reference.run)


@needs_native
def test_codes_that_are_stored_past_the_caches_are_the_same(instruction_set: str) -> None:
    """Those of a large model are, if they are aligned."""
    size = (1 << 22) + 3 * BUCKET + 5
    rng = np.random.default_rng(1)
    x = rng.random(size, np.float32)
    y = x + rng.random(size, np.float32) * np.float32(1e-3)
    y[5 * BUCKET] = np.nan
    partner_model = EncodedVector.empty(size, 8, 1)
    partner_model.scales[:] = 2e-5
    lattice.encode(x, partner_model)

    def exchanged(offset: int) -> list[bytes]:
        mine, messages = y.copy(), []
        for seed in (2, 3):
            out = EncodedVector.empty(size, 8, seed)
            room = np.full(out.codes.size + 128, 77, np.uint8)
            start = -room.ctypes.data % 64 + offset
            out.codes = room[start : start + out.codes.size]
            out.scales[:] = 2e-5
            messages.append(out)
        lattice.fused(mine, (), partner_model, 0.5, *messages)
        parts = [part for out in messages for part in (out.codes, out.scales, out.checksums)]
        return [part.tobytes() for part in (mine, *parts)]

    assert exchanged(0) == exchanged(1)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@pytest.mark.slow
@needs_native
@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    nearest=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    x=arrays.arrays(np.float32, st.integers(0, 2100), elements=floats),
    scale=st.floats(width=32, allow_nan=True, allow_infinity=True),
    shift=st.floats(-1e3, 1e3, width=32),
)
def test_anything_gives_the_same_bits(
    bits: int, nearest: bool, seed: int, x: np.ndarray, scale: float, shift: float
) -> None:
    with np.errstate(all="ignore"):
        y = (x + np.float32(shift) * np.float32(scale)).astype(np.float32)
    scales = np.full(buckets_of(x.size), scale, np.float32)
    case = Case("drawn", bits, nearest, x, y, scales, seed)
    assert outcomes(case, cpu.run) == outcomes(case, reference.run)


# --- correct ---


def _pair(bits: int, share: float, size: int = 20_000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return two models that differ by up to `share` of the reach of the code, and scales."""
    rng = np.random.default_rng([seed, bits])
    scales = (10.0 ** rng.uniform(-6, -2, buckets_of(size))).astype(np.float32)
    x = rng.normal(size=size)
    reach = share * (2 ** (bits - 1) - 1) * np.repeat(scales, BUCKET)[:size].astype(np.float64)
    y = x + rng.uniform(-1, 1, size) * reach
    return x.astype(np.float32), y.astype(np.float32), scales


def _message(
    x: np.ndarray, bits: int, scales: np.ndarray, seed: int, nearest: bool
) -> EncodedVector:
    encoded = EncodedVector.empty(x.size, bits, seed, nearest)
    encoded.scales[:] = scales
    lattice.encode(x, encoded)
    return encoded


@bits_of
@rounding
@pytest.mark.parametrize("weight", [0.5, 0.3, 0.125])
def test_both_sides_move_by_exactly_the_same_amounts(
    bits: int, nearest: bool, weight: float
) -> None:
    # Multiples of 2^-12 below 2^8, and a scale that is a power of two: no addition rounds.
    rng = np.random.default_rng(bits)
    x = (rng.integers(-(2**18), 2**18, 30_000) / 2.0**12).astype(np.float32)
    y = x + (rng.integers(-6, 7, x.size) / 2.0**4).astype(np.float32)
    weight = 2.0 ** round(np.log2(weight))
    scales = np.full(buckets_of(x.size), 2.0**-4, np.float32)
    partner_model = _message(x, bits, scales, 3, nearest)
    reply_delta = EncodedVector.empty(x.size, bits, 4, nearest)
    before_x, before_y = x.copy(), y.copy()
    lattice.exchange(y, partner_model, weight, reply_delta)
    lattice.apply(x, reply_delta)
    np.testing.assert_array_equal(y - before_y, before_x - x)
    assert (y != before_y).mean() > 0.5


@bits_of
def test_the_sum_is_conserved_within_a_rounding_an_element(bits: int) -> None:
    x, y, scales = _pair(bits, 0.9)
    reply_delta = EncodedVector.empty(x.size, bits, 4)
    total = x.astype(np.float64) + y
    largest = np.maximum(np.abs(x), np.abs(y))
    lattice.exchange(y, _message(x, bits, scales, 3, False), 0.5, reply_delta)
    lattice.apply(x, reply_delta)
    error = np.abs(x.astype(np.float64) + y - total)
    bound = np.spacing(np.maximum(largest, np.maximum(np.abs(x), np.abs(y))))
    assert (error <= bound).all()


@bits_of
@rounding
def test_the_error_of_a_move_is_below_one_step_of_the_lattice(bits: int, nearest: bool) -> None:
    x, y, scales = _pair(bits, 1 - 2.0 ** (2 - bits))
    before, stats = y.astype(np.float64), np.zeros(buckets_of(x.size), BUCKET_STATS)
    lattice.exchange(y, _message(x, bits, scales, 3, nearest), 0.5, None, stats)
    assert not stats["rejected"].any()
    error = (y - before) - 0.5 * (x - before)
    rounding_errors = 2 * np.spacing(np.abs(x).max())
    assert (np.abs(error) <= 0.5 * np.repeat(scales, BUCKET)[: x.size] + rounding_errors).all()


@bits_of
def test_equal_models_stay_as_they_are(bits: int) -> None:
    x, _, scales = _pair(bits, 0.5)
    y = x.copy()
    lattice.exchange(y, _message(x, bits, scales, 3, False))
    np.testing.assert_array_equal(x, y)


@bits_of
def test_statistics_are_those_of_the_integers_that_moved(bits: int) -> None:
    x, y, scales = _pair(bits, 0.9)
    stats, reply_delta = (
        np.zeros(buckets_of(x.size), BUCKET_STATS),
        EncodedVector.empty(x.size, bits, 1),
    )
    of_delta = np.zeros_like(stats)
    before = y.copy()
    lattice.exchange(y, _message(x, bits, scales, 3, False), 0.5, reply_delta, stats)
    unit = 0.5 * np.repeat(scales, BUCKET)[: x.size].astype(np.float64)
    moved = np.zeros(buckets_of(x.size) * BUCKET)
    moved[: x.size] = np.round((y.astype(np.float64) - before) / unit)
    squares = np.square(moved).reshape(-1, BUCKET)
    # Large scales: beside them the roundings of y are too small to hide the integers.
    exact = np.repeat(scales > 1e-5, BUCKET).reshape(-1, BUCKET)[:, 0]
    assert exact.any()
    np.testing.assert_array_equal(stats["sum_d2"][exact], squares.sum(1)[exact])
    np.testing.assert_array_equal(stats["max_d2"][exact], squares.max(1)[exact])
    lattice.apply(x, reply_delta, of_delta)
    np.testing.assert_array_equal(of_delta, stats)


@pytest.mark.slow
@bits_of
def test_rounding_at_random_is_unbiased(bits: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, BUCKET).astype(np.float32)
    y = (x + rng.uniform(-2, 2, BUCKET) * 1e-2).astype(np.float32)
    scales, rounds = np.full(1, 1e-2, np.float32), 4000
    moves, decoded = np.zeros(BUCKET), np.zeros(BUCKET)
    for seed in range(rounds):
        partner_model = _message(x, bits, scales, seed * 977, False)
        mine = y.copy()
        lattice.exchange(mine, partner_model, 0.5)
        moves += mine.astype(np.float64) - y
        mine = y.copy()
        lattice.merge(mine, partner_model, 1.0)
        decoded += mine
    # The standard deviation of one rounding is at most scale / 2; the mean is within 5 sigma.
    bound = 5 * 0.5 * 1e-2 / np.sqrt(rounds)
    assert np.abs(moves / rounds - 0.5 * (x.astype(np.float64) - y)).max() < 0.5 * bound
    assert np.abs(decoded / rounds - x).max() < bound
    assert abs((moves / rounds - 0.5 * (x.astype(np.float64) - y)).mean()) < bound / 32


@pytest.mark.parametrize("subtract", [False, True])
def test_merge_decodes_within_a_step_and_less_if_dither_is_subtracted(subtract: bool) -> None:
    x, y, scales = _pair(8, 0.9)
    partner_model = _message(x, 8, scales, 5, False)
    lattice.merge(y, partner_model, 1.0, subtract_dither=subtract)
    error = (y.astype(np.float64) - x) / np.repeat(scales, BUCKET)[: x.size]
    good = np.repeat(scales > 1e-4, BUCKET)[: x.size]
    assert np.abs(error[good]).max() < (0.51 if subtract else 1.01)
    expected = (1 / 12 if subtract else 1 / 6) ** 0.5
    assert np.sqrt(np.square(error[good]).mean()) == pytest.approx(expected, rel=0.05)


def test_fused_equals_the_separate_operations() -> None:
    x, y, scales = _pair(8, 0.5)
    partner_model = _message(x, 8, scales, 5, False)
    deltas = [EncodedVector.empty(x.size, 8, 10 + i) for i in range(2)]
    for delta in deltas:
        lattice.exchange(y.copy(), partner_model, 0.25, delta)

    def results(fuse: bool) -> list[bytes]:
        mine, reply_delta = y.copy(), EncodedVector.empty(x.size, 8, 20)
        out = EncodedVector.empty(x.size, 8, 21)
        out.scales[:] = scales
        if fuse:
            lattice.fused(mine, deltas, partner_model, 0.5, reply_delta, out)
        else:
            for delta in deltas:
                lattice.apply(mine, delta)
            lattice.exchange(mine, partner_model, 0.5, reply_delta)
            lattice.encode(mine, out)
        parts = (
            mine,
            reply_delta.codes,
            reply_delta.scales,
            reply_delta.checksums,
            out.codes,
            out.checksums,
        )
        return [part.tobytes() for part in parts]

    assert results(True) == results(False)


# --- rejected ---


@bits_of
def test_a_bucket_that_cannot_be_decoded_is_left_unchanged_on_both_sides(bits: int) -> None:
    x, y, scales = _pair(bits, 0.5, size=8 * BUCKET)
    y[BUCKET + 5] += scales[1] * 2 ** (bits - 1) * 1.5
    y[3 * BUCKET : 4 * BUCKET] += scales[3] * np.float32(2.0 ** (bits + 1))
    before_x, before_y = x.copy(), y.copy()
    stats, reply_delta = np.zeros(8, BUCKET_STATS), EncodedVector.empty(x.size, bits, 4)
    lattice.exchange(y, _message(x, bits, scales, 3, False), 0.5, reply_delta, stats)
    lattice.apply(x, reply_delta)
    assert stats["rejected"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert (reply_delta.scales == 0).tolist() == [bool(r) for r in stats["rejected"]]
    for bucket in range(8):
        part = slice(bucket * BUCKET, (bucket + 1) * BUCKET)
        moved = not stats["rejected"][bucket]
        assert (x[part] != before_x[part]).any() == moved
        assert (y[part] != before_y[part]).any() == moved


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("side", ["partner_model", "mine"])
def test_a_diverged_model_does_not_spread(value: float, side: str) -> None:
    x, y, scales = _pair(8, 0.5, size=3 * BUCKET)
    (x if side == "partner_model" else y)[BUCKET + 7] = value
    stats = np.zeros(3, BUCKET_STATS)
    before = y.copy()
    lattice.exchange(y, _message(x, 8, scales, 3, False), 0.5, None, stats)
    assert stats["rejected"].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(y[BUCKET : 2 * BUCKET], before[BUCKET : 2 * BUCKET])


@bits_of
@pytest.mark.parametrize("what", ["stale", "torn", "scale", "seed"])
def test_a_stale_or_torn_message_fails_its_checksum(bits: int, what: str) -> None:
    """A reader must detect a mixture of two versions, in publications and in deltas."""
    x, y, scales = _pair(bits, 0.5, size=64 * BUCKET)
    old = _message(x, bits, scales, 3, False)
    x += np.float32(1e-6) * scales.repeat(BUCKET)
    new = _message(x, bits, scales, 4, False)
    delta_old, delta_new = (EncodedVector.empty(x.size, bits, seed) for seed in (5, 6))
    lattice.exchange(y.copy(), old, 0.5, delta_old)
    lattice.exchange(y.copy(), new, 0.5, delta_new)
    for before, after, run in (
        (old, new, lambda message, stats: lattice.exchange(y.copy(), message, 0.5, None, stats)),
        (delta_old, delta_new, lambda message, stats: lattice.apply(x.copy(), message, stats)),
    ):
        stats = np.zeros(64, BUCKET_STATS)
        run(after, stats)
        assert not stats["rejected"].any()
        if what == "stale":
            after.codes[:], after.checksums[:] = before.codes, before.checksums
        elif what == "torn":
            per = after.codes.size // 64
            for bucket in range(64):
                half = slice(bucket * per, bucket * per + per // 2)
                after.codes[half] = before.codes[half]
        elif what == "scale":
            after.scales *= np.float32(1 + 2.0**-20)
        else:
            after.seed += 1
        run(after, stats)
        assert stats["rejected"].all()


def test_no_two_wrong_elements_cancel_in_the_checksum() -> None:
    """A failed decoding changes a point by k 2^b, its fold by k (2^b + 1): no two must cancel."""
    weights = reference.POSITION_WEIGHTS.astype(np.int64)
    for first in range(1, 9):
        for second in range(1, 9):
            a, b = first * weights % 2**32, second * weights % 2**32
            for other in (b, -b % 2**32):
                together = np.sort(np.concatenate([a, other]))
                equal = np.count_nonzero(np.diff(together) == 0)
                assert equal == (BUCKET if first == second and other is b else 0)


@pytest.mark.slow
def test_every_failure_is_detected_and_nothing_valid_is_rejected() -> None:
    """`mpi-dasgd bench quality` tests millions of buckets; this test as many as time allows."""
    from mpi_dasgd.bench.detection import count_detections

    counts = count_detections(buckets=60_000, seed=1)
    assert counts["failing"] > 15_000 and counts["sound"] > 15_000
    assert counts["undetected"] == counts["false_alarms"] == 0


# --- wrong input ---


def test_wrong_arrays_are_refused_with_a_message() -> None:
    x, y, scales = _pair(8, 0.5, size=3000)
    partner_model = _message(x, 8, scales, 3, False)
    read_only = y.copy()
    read_only.flags.writeable = False
    wrong: list[tuple[np.ndarray, str]] = [
        (y[:2999], "expected codes of 2999 elements"),
        (y.astype(np.float64), "x: .*float32.*got float64"),
        (np.repeat(y, 2)[::2], "contiguous.*strides of .8,. bytes"),
        (y.reshape(30, 100), "1-D.*shape \\(30, 100\\)"),
        (read_only, "read-only"),
        (np.frombuffer(bytes(12003), np.uint8)[3:].view(np.float32), "aligned"),
    ]
    for array, words in wrong:
        with pytest.raises(UserError, match=words):
            lattice.exchange(array, partner_model)
    with pytest.raises(UserError, match="NumPy or CuPy"):
        lattice.backend_of([1.0])
    for weight in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(UserError, match="weight"):
            lattice.exchange(y, partner_model, weight)


def test_wrong_messages_are_refused_with_a_message() -> None:
    x, y, scales = _pair(8, 0.5, size=3000)
    partner_model = _message(x, 8, scales, 3, False)
    with pytest.raises(UserError, match="reply_delta: expected codes of 3000 elements with 8 bits"):
        lattice.exchange(y, partner_model, 0.5, EncodedVector.empty(3000, 4))
    with pytest.raises(UserError, match="bits: expected 4, 8 or 16, got 5"):
        EncodedVector.empty(10, 5)
    with pytest.raises(UserError, match="codes.*of size 3072"):
        EncodedVector(
            3000, 8, np.zeros(3000, np.uint8), partner_model.scales, partner_model.checksums
        )
    with pytest.raises(UserError, match="stats"):
        lattice.exchange(y, partner_model, 0.5, None, np.zeros(3, np.int64))
    frozen = EncodedVector.empty(3000, 8)
    frozen.codes.flags.writeable = False
    with pytest.raises(UserError, match="reply_delta.*read-only"):
        lattice.exchange(y, partner_model, 0.5, frozen)


@needs_native
def test_without_the_library_numpy_is_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lattice.backend_of(np.zeros(1)) is cpu
    monkeypatch.setattr(native, "load", lambda: None)
    assert lattice.backend_of(np.zeros(1)) is reference


def test_ci_has_the_native_library() -> None:
    assert NATIVE or os.environ.get("CI") != "true", native.status()
