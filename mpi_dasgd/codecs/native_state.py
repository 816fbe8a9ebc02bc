"""State of a codec that the native exchange of a node changes in the codec's stead.

It is in structs that both sides read and write, whoever makes an exchange: mirrors of
``pair_codec.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, MutableMapping
from typing import Any, ClassVar

from mpi_dasgd.codecs.message import MAGIC, VERSION, Layout

__all__ = [
    "BucketCounts",
    "BucketCountsStruct",
    "PairCodecStruct",
    "ScaleStruct",
    "SeedsStruct",
    "pair_codec_struct",
]


_COUNTS = ("decoded", "rejected", "corrupt")


class SeedsStruct(ctypes.Structure):
    """Mirror of MpdSeeds."""

    start: int
    drawn: int
    _fields_ = (("start", ctypes.c_uint64), ("drawn", ctypes.c_int64))


class ScaleStruct(ctypes.Structure):
    """Mirror of MpdAdaptiveScale."""

    encodings: int
    max_estimate: float
    _fields_ = (
        ("estimate", ctypes.c_void_p),
        ("floor", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("buckets", ctypes.c_int64),
        ("encodings", ctypes.c_int64),
        ("refresh_encodings", ctypes.c_int64),
        ("scale_per_distance", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("max_estimate", ctypes.c_float),
        ("doubles_estimate", ctypes.c_int32),
    )


class BucketCountsStruct(ctypes.Structure):
    """Mirror of MpdBucketCounts."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _COUNTS)


class PairCodecStruct(ctypes.Structure):
    """Mirror of MpdPairCodec."""

    _fields_ = (
        ("bits", ctypes.c_int64),
        ("nearest", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("seeds", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("magic", ctypes.c_int64),
        ("version", ctypes.c_int64),
        ("codec", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
        ("scales_at", ctypes.c_int64),
        ("checksums_at", ctypes.c_int64),
        ("payload_at", ctypes.c_int64),
    )


def pair_codec_struct(layout: Layout, **fields: int) -> PairCodecStruct:
    """Return the struct of a codec whose messages have `layout`; `fields` are those before it."""
    return PairCodecStruct(
        **fields,
        elements=layout.elements,
        magic=MAGIC,
        version=VERSION,
        codec=layout.codec,
        nbytes=layout.nbytes,
        scales_at=layout.scales_at,
        checksums_at=layout.checksums_at,
        payload_at=layout.payload_at,
    )


class BucketCounts(MutableMapping[str, int]):
    """Counters of a lattice codec: buckets decoded, rejected, and corrupt in deltas.

    Attributes:
        struct: where they are.
    """

    _NAMES: ClassVar = {f"buckets_{name}": name for name in _COUNTS}

    def __init__(self) -> None:
        self.struct = BucketCountsStruct()

    def __getitem__(self, name: str) -> int:
        return int(getattr(self.struct, self._NAMES[name]))

    def __setitem__(self, name: str, count: int) -> None:
        setattr(self.struct, self._NAMES[name], count)

    def __delitem__(self, name: str) -> Any:
        raise TypeError("counters cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._NAMES)

    def __len__(self) -> int:
        return len(self._NAMES)

    def __repr__(self) -> str:
        return repr(dict(self))
