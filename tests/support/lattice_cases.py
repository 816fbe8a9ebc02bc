"""Test cases of the lattice codec, and all operations on them, the same for all backends.

for case in cases(bits=8, nearest=False):
    assert outcomes(case, cpu.run) == outcomes(case, reference.run)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpi_dasgd.kernels import reference
from mpi_dasgd.kernels.encoded import (
    BUCKET,
    BUCKET_STATS,
    Array,
    EncodedVector,
    FusedStep,
    buckets_of,
)
from mpi_dasgd.kernels.optimizer import (
    ADAM,
    GROUP,
    SEGMENT,
    SGD,
    OptimizerStep,
    adam_group,
    sgd_group,
)

SIZES = (0, 1, 1023, 1024, 1025, 5000)
EXTREME_SCALES = (np.float32(1.17549435e-38), np.float32(4.2535296e37))
"""The smallest and the largest scale that are accepted."""


@dataclass(frozen=True)
class Case:
    """Two models, float32, and the scales of their exchange; `y` is the side that moves."""

    name: str
    bits: int
    nearest: bool
    x: np.ndarray  # the model that the partner publishes
    y: np.ndarray
    scales: np.ndarray  # per bucket
    seed: int = 0xFEDCBA9876543210

    def __str__(self) -> str:
        return f"{self.name}, {self.bits} bits, {'nearest' if self.nearest else 'dither'}"


def cases(bits: int, nearest: bool, sizes: Sequence[int] = SIZES) -> Iterator[Case]:
    """Yield models that agree, that are too far apart in some buckets, and with extreme values."""
    rng = np.random.default_rng([bits, nearest])
    for size in sizes:
        x, y, scales = _near(rng, size, bits)
        yield Case(f"{size} elements", bits, nearest, x, y, scales, seed=size)
        yield Case(f"{size} equal elements", bits, nearest, x, x.copy(), scales)
    x, y, scales = _near(rng, 12 * BUCKET + 17, bits)
    for bucket in range(1, 12, 2):  # from one element that is just too far apart to all
        many = rng.choice(BUCKET, 4 ** (bucket // 2), replace=False) + bucket * BUCKET
        y[many] += scales[bucket] * rng.choice([-1, 1], many.size) * 2.0 ** (bits - 1) * 1.6
    yield Case("too far", bits, nearest, x, y, scales)
    yield Case("adversarial", bits, nearest, *_adversarial(rng, bits))


def outcomes(
    case: Case,
    run: Callable[[FusedStep], None],
    device: Callable[[np.ndarray], Array] = np.copy,
    host: Callable[[Array], np.ndarray] = np.asarray,
) -> dict[str, bytes]:
    """Do every operation and return all its arrays as bytes, by operation and name.

    Messages that are read come from the reference. Operations that do not examine the model (apply,
    an optimizer's step) may yield any NaN, which depends on the machine; in their models all are
    made equal.

    Args:
        case: models and scales.
        run: function of a backend that does a step.
        device: copies a NumPy array to the backend's memory.
        host: copies it back.
    """
    results: dict[str, bytes] = {}
    for name, step in steps(case):
        step = map_arrays(step, device)
        step.validate()
        run(step)
        loose = bool(step.deltas) or step.optimizer is not None
        for part, array in _arrays(step):
            value = host(array)
            if loose and part in ("x", "first", "second", "third"):
                value = np.where(np.isnan(value), np.float32(np.nan), value)
            results[f"{name}: {part}"] = value.tobytes()
    return results


def _near(rng: np.random.Generator, size: int, bits: int) -> tuple[np.ndarray, ...]:
    """Return two models of many magnitudes, and scales with which they decode each other."""
    buckets = buckets_of(size)
    scales = (10.0 ** rng.uniform(-9, 3, buckets)).astype(np.float32)
    scale = np.repeat(scales, BUCKET)[:size].astype(np.float64)
    magnitude = np.repeat(2.0 ** rng.uniform(0, 19, buckets), BUCKET)[:size]
    reach = 2.0 ** (bits - 1) - 4
    x = (rng.normal(size=size) * magnitude * scale).astype(np.float32)
    y = (x + rng.uniform(-reach, reach, size) * scale).astype(np.float32)
    return x, y, scales


def _adversarial(rng: np.random.Generator, bits: int) -> tuple[np.ndarray, ...]:
    values = np.array(
        [np.nan, np.inf, -np.inf, 1e-40, -1e-45, 3.4e38, -3.4e38, 2.0**22, -(2.0**22)], np.float32
    )
    nans = np.array([0x7FA00001, 0xFFC12345, 0xFF800001], np.uint32).view(np.float32)
    below = np.nextafter(np.float32(2**22), np.float32(0))  # about the largest that can be encoded
    values = np.concatenate([values, nans, [below, -below]])
    scales = np.concatenate(
        [
            [0.0, -1.0, np.nan, np.inf, 1e-40, -np.inf, *EXTREME_SCALES],
            np.nextafter(EXTREME_SCALES, np.array([0, np.inf], np.float32)),
            [2.0**-21, 3e-38, 1e37],
        ]
    ).astype(np.float32)
    x, y, s = _near(rng, (3 * values.size + scales.size + 8) * BUCKET - 100, bits)
    s[: 3 * values.size] = 1.0
    x, y = x.copy(), y.copy()
    for i, value in enumerate(values):  # in one model, in the other, in both
        for j, models in enumerate(((x,), (y,), (x, y))):
            bucket = 3 * i + j
            part = slice(bucket * BUCKET, (bucket + 1) * BUCKET)
            x[part] = rng.normal(size=BUCKET) * 100
            y[part] = x[part] + np.float32(0.25)
            for model in models:
                model[rng.integers(part.start, part.stop)] = value
    b = 3 * values.size
    s[b : b + scales.size] = scales
    x[b * BUCKET : (b + scales.size) * BUCKET] = y[b * BUCKET : (b + scales.size) * BUCKET]
    b += scales.size
    ties = np.arange(-BUCKET // 2, BUCKET // 2) + 0.5
    constants = [0.0, -0.0, 1.5, -1e-42, below, ties, ties * 4096, np.arange(BUCKET) * 1e-42]
    for offset, constant in enumerate(constants):
        part = slice((b + offset) * BUCKET, (b + offset + 1) * BUCKET)
        x[part] = y[part] = np.broadcast_to(constant, BUCKET)[: x[part].size]
        s[b + offset] = 1.0
    return x, y, s


def steps(case: Case) -> Iterator[tuple[str, FusedStep]]:
    """Yield all operations, with their names, in NumPy's memory."""
    buckets = buckets_of(case.x.size)

    def stats() -> np.ndarray:
        return np.full(buckets, 77, BUCKET_STATS)

    def step(vector: np.ndarray, **parts: Any) -> FusedStep:
        made = FusedStep(vector.copy())
        for part, value in parts.items():
            assert hasattr(made, part)
            setattr(made, part, value)
        return made

    def blank(seed: int) -> EncodedVector:
        """Return a message to be written: the scales of the case, and arbitrary codes."""
        encoded = EncodedVector.empty(case.x.size, case.bits, seed, case.nearest)
        encoded.codes[:] = 77
        encoded.checksums[:] = 77
        encoded.scales[:] = case.scales
        return encoded

    partner_model = blank(case.seed)
    reference.run(step(case.x, publication=partner_model))
    deltas = [blank(case.seed + 1 + i & (1 << 64) - 1) for i in range(6)]
    for i, delta in enumerate(deltas):
        weight = 0.5 / (i + 1)
        reference.run(step(case.y, partner_model=partner_model, weight=weight, reply_delta=delta))
    bad, bad_delta = _tampered(partner_model), _tampered(deltas[0])

    yield "encode", step(case.x, publication=blank(1 << 63))
    for name, message in (("", partner_model), (" tampered", bad)):
        both = {"partner_model": message, "stats": stats()}
        yield f"exchange{name}", step(case.y, **both, reply_delta=blank(2))
        yield f"exchange alone{name}", step(case.y, partner_model=message, weight=0.3)
        yield f"merge{name}", step(case.y, **both, merge=1, weight=0.7)
        yield f"merge, subtract{name}", step(case.y, **both, merge=2, weight=1.0)
        yield f"merge, forward{name}", step(case.y, **both, merge=1, publication=blank(3))
        yield f"merge, subtract, forward{name}", step(case.y, **both, merge=2, publication=blank(3))
    yield "apply", step(case.x, deltas=(deltas[0],), delta_stats=(stats(),))
    yield "apply alone", step(case.x, deltas=(deltas[1],))
    yield "apply tampered", step(case.x, deltas=(bad_delta,), delta_stats=(stats(),))
    yield "sgd, encode", step(case.x, optimizer=_optimizer(case, SGD), publication=blank(4))
    yield "adam", step(case.x, optimizer=_optimizer(case, ADAM))
    for count in (1, 2, 4, 6):
        received = (*deltas[1:count], bad_delta)
        received_stats = tuple(stats() for _ in received)
        yield f"fused, {count} deltas", step(
            case.y, deltas=received, delta_stats=received_stats, partner_model=partner_model,
            reply_delta=blank(5), stats=stats(), publication=blank(6),
        )  # fmt: skip
    yield "fused without partner_model", step(case.y, deltas=(deltas[2],), publication=blank(7))
    yield (
        "fused without deltas",
        step(case.y, partner_model=partner_model, reply_delta=blank(8), publication=blank(9)),
    )
    yield "fused, only moved", step(case.y, deltas=tuple(deltas[:2]), partner_model=partner_model)
    for kinds, merge, count in (
        ((SGD,), 0, 1), ((ADAM,), 0, 6), ((SGD, ADAM), 0, 0), ((ADAM,), 2, 0), ((SGD, ADAM), 2, 5)
    ):  # fmt: skip
        yield f"everything, optimizers {kinds}, merge {merge}, {count} deltas", step(
            case.y, optimizer=_optimizer(case, *kinds), deltas=tuple(deltas[:count]),
            partner_model=partner_model, merge=merge, stats=stats(),
            reply_delta=None if merge else blank(13), publication=blank(10),
        )  # fmt: skip
    other = blank(11)
    other.nearest = not case.nearest
    yield (
        "publication otherwise",
        step(case.y, partner_model=partner_model, reply_delta=blank(12), publication=other),
    )


def _optimizer(case: Case, *kinds: int) -> OptimizerStep:
    """Return a step of optimizers of these kinds: four parameters, of which one has no gradient."""
    size = case.x.size
    groups = {
        SGD: sgd_group(0.1, 0.9, 0.25, 1e-3, nesterov=False),
        ADAM: adam_group(1e-3, (0.9, 0.99), 1e-8, 1e-2, 3, decoupled=True),
    }
    edges = [0, size // 3, size // 2, size * 5 // 6, max(size - 2, size * 5 // 6)]
    segments = np.zeros(4, SEGMENT)
    segments["offset"], segments["count"] = edges[:-1], np.diff(edges)
    segments["group"] = np.arange(4) % len(kinds)
    with np.errstate(invalid="ignore", over="ignore"):
        first, gradient = (case.x[::-1] * np.float32(c) for c in (0.125, 0.5))
        second = np.square(case.y)
    segments["gradient"] = gradient.ctypes.data + 4 * segments["offset"]
    segments["gradient"][2] = 0
    step = OptimizerStep(segments, np.array([groups[kind] for kind in kinds], GROUP), first, second)
    step.gradients = gradient
    return step


def _tampered(message: EncodedVector) -> EncodedVector:
    """Return a copy with wrong bits in codes and a checksum, and bad scales in buckets 1 to 3."""
    copy = map_arrays(message, np.copy)
    if copy.checksums.size:
        copy.codes[(copy.codes.size - 1) * 7 // 10] ^= 1 << 3
        copy.checksums[-1] ^= np.uint32(1 << 31)
        for bucket, scale in zip(
            range(1, copy.checksums.size), (np.inf, np.nan, -2.0), strict=False
        ):
            copy.scales[bucket] = scale  # with a matching checksum: only the scale is wrong
            copy.codes.reshape(copy.checksums.size, -1)[bucket] = 0
            key = reference.bucket_keys(copy.seed, np.array([bucket], np.uint64))
            right = reference.checksum(np.uint32(0), copy.scales[bucket : bucket + 1], key)
            copy.checksums[bucket] = right[0]
    return copy


_ARRAYS = ("x", "stats")
_STATE = ("first", "second", "third")
_MESSAGES = ("partner_model", "reply_delta", "publication")


def map_arrays(value: Any, device: Callable[[np.ndarray], Array]) -> Any:
    """Return a copy of a step, a message or an array, in another memory."""
    if isinstance(value, np.ndarray):
        return device(value)
    if isinstance(value, tuple):
        return tuple(map_arrays(item, device) for item in value)
    if isinstance(value, EncodedVector):
        arrays = (device(a) for a in (value.codes, value.scales, value.checksums))
        return EncodedVector(value.elements, value.bits, *arrays, value.seed, value.nearest)
    if isinstance(value, FusedStep):
        step = FusedStep(device(value.x), value.threads)
        for name in FusedStep.__slots__:
            if name != "x":
                setattr(step, name, map_arrays(getattr(value, name), device))
        return step
    if isinstance(value, OptimizerStep):
        return _map_optimizer(value, device)
    return value


def _map_optimizer(step: OptimizerStep, device: Callable[[np.ndarray], Array]) -> OptimizerStep:
    """Return a copy whose state and gradients, one array, are in another memory."""
    gradients = device(step.gradients)
    at = gradients.ctypes.data if type(gradients) is np.ndarray else gradients.data.ptr
    segments = step.segments.copy()
    moved = segments["gradient"] - np.uint64(step.gradients.ctypes.data) + np.uint64(at)
    segments["gradient"] = np.where(segments["gradient"], moved, 0)
    state = (map_arrays(getattr(step, name), device) for name in _STATE)
    copy = OptimizerStep(segments, step.groups.copy(), *state)
    copy.gradients = gradients
    return copy


def _arrays(step: FusedStep) -> Iterator[tuple[str, Array]]:
    """Yield all arrays of a step, with their names; inputs, too, since they must not change."""
    for name in _ARRAYS:
        if getattr(step, name) is not None:
            yield name, getattr(step, name)
    if step.optimizer is not None:
        yield "gradients", step.optimizer.gradients
        for name in _STATE:
            if getattr(step.optimizer, name) is not None:
                yield name, getattr(step.optimizer, name)
    messages = [(name, getattr(step, name)) for name in _MESSAGES]
    messages += [(f"deltas[{i}]", delta) for i, delta in enumerate(step.deltas)]
    for name, message in messages:
        if message is not None:
            yield f"{name}.codes", message.codes
            yield f"{name}.scales", message.scales
            yield f"{name}.checksums", message.checksums
    for i, array in enumerate(step.delta_stats):
        yield f"delta_stats[{i}]", array
