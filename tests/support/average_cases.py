"""Pair averages of unquantized, bf16 and fp16 models, on the host and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.codecs import ExchangeBuffers, Message
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.kernels.cuda.pair_average import pair_average
from mpi_dasgd.kernels.encoded import Array

__all__ = ["FORMATS", "AverageCase", "average_cases", "expected_average", "found_average"]

FORMATS = {"none": np.float32, "bf16": np.uint16, "fp16": np.float16}
"""Types of the payloads, by codec."""

SIZES = (0, 1, 511, 512, 513, 5000, 40_000)
HARD = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-45, 3.4e38, -3.4e38, 65504, 65519, 65520,
     -65536, 6e-8, 2.98e-8, -2.9802322e-08, 6.1e-5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11,
     1 + 3 * 2**-11],
    np.float32,
)  # fmt: skip
"""Numbers at the ends of the formats, and halfway between two of theirs."""
HARD_BITS = np.array([0x7F800001, 0xFFC12345, 0x7F7FFFFF, 0x7F7F8000], np.uint32).view(np.float32)


@dataclass(frozen=True)
class AverageCase:
    """Numbers of an exchange, float32, and which messages there are."""

    codec: str
    x: np.ndarray
    deltas: tuple[np.ndarray, ...]
    partner_model: np.ndarray | None
    replies: bool
    publishes: bool
    weight: float

    def __str__(self) -> str:
        partner = "a partner" if self.partner_model is not None else "no partner"
        return (
            f"{self.codec}, {self.x.size} elements, {len(self.deltas)} deltas, {partner}, "
            f"reply {self.replies}, publication {self.publishes}, weight {self.weight}"
        )


def average_cases(codec: str) -> Iterator[AverageCase]:
    """Yield exchanges with and without each message, of many magnitudes and with hard numbers."""
    rng = np.random.default_rng(3)
    for number, size in enumerate((*SIZES, *SIZES)):
        for deltas in (0, 1, 4, 6):
            with_partner = number % 3 != 2
            replies, publishes = with_partner and rng.random() < 0.7, rng.random() < 0.7
            x, other, *more = (_numbers(rng, size) for _ in range(2 + deltas))
            weight = (0.5, 0.3)[number % 2]
            partner = other if with_partner else None
            yield AverageCase(codec, x, tuple(more), partner, replies, publishes, weight)


def expected_average(case: AverageCase) -> tuple[dict[str, np.ndarray], float]:
    """Return what the host's codec makes of it: all that it writes, and the distance."""
    settings = CodecConfig(name=case.codec)  # type: ignore[arg-type]
    codec = codecs.make(settings, case.x.size, np.dtype(np.float32), seed=1, rank=0)

    def message(numbers: np.ndarray | None) -> Message:
        made = Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)
        made.stamp(rank=0, step=0, time_ns=0)
        if numbers is not None:
            codec.encode(numbers.copy(), made)
        return made

    x = case.x.copy()
    reply = message(None) if case.replies else None
    publication = message(None) if case.publishes else None
    partner = None if case.partner_model is None else message(case.partner_model)
    deltas = [message(delta) for delta in case.deltas]
    with np.errstate(all="ignore"):
        buffers = ExchangeBuffers(deltas, partner, case.weight, reply, publication)
        outcome = codec.average_pair(x, buffers)
    written = {"x": x}
    for name, made in (("reply", reply), ("publication", publication)):
        if made is not None:
            written[name] = made.payload
    return {name: plain(value, case.codec) for name, value in written.items()}, outcome.distance


def found_average(
    case: AverageCase,
    device: Callable[[np.ndarray], Array],
    host: Callable[[Array], np.ndarray],
) -> tuple[dict[str, np.ndarray], float]:
    """Return what the kernels make of it, as `expected_average`."""
    dtype = FORMATS[case.codec]
    x = device(case.x)

    def payload(numbers: np.ndarray) -> Array:
        encoded = device(np.zeros(case.x.size, dtype))
        pair_average(device(numbers), publication=encoded)
        return encoded

    written = {"x": x}
    for name, there in (("reply", case.replies), ("publication", case.publishes)):
        if there:
            written[name] = device(np.full(case.x.size, 77, dtype))
    square = device(np.full(1, -1.0))
    pair_average(
        x,
        [payload(delta) for delta in case.deltas],
        None if case.partner_model is None else payload(case.partner_model),
        case.weight,
        written.get("reply"),
        written.get("publication"),
        square,
    )
    found = {name: plain(host(value), case.codec) for name, value in written.items()}
    return found, float(host(square)[0])


def plain(values: np.ndarray, codec: str) -> np.ndarray:
    """Return the bits, with all NaNs made equal: which one it is depends on the machine."""
    if codec == "bf16" and values.dtype == np.uint16:
        return np.where((values & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), values)
    nan = np.asarray(np.nan, values.dtype)
    return np.where(np.isnan(values), nan, values).view(f"u{values.itemsize}")


def _numbers(rng: np.random.Generator, size: int) -> np.ndarray:
    values = rng.standard_normal(size) * 10.0 ** rng.integers(-9, 6, size)
    values = values.astype(np.float32)
    hard = np.concatenate([HARD, HARD_BITS])
    count = min(size // 4, 3 * hard.size)
    values[rng.choice(size, count, replace=False)] = rng.choice(hard, count)
    return values
