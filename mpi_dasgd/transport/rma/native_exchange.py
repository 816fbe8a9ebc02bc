"""Pair exchanges between ranks of a node, one native call each (``pair_exchange.cpp``)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mpi_dasgd.codecs import Codec
from mpi_dasgd.codecs.native_state import PairCodecStruct
from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.kernels.encoded import require
from mpi_dasgd.kernels.optimizer import OptimizerStep
from mpi_dasgd.kernels.optimizer_native import optimizer_struct
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.rma.native_rank import NativeRank

__all__ = ["DIVERGED", "NativeExchange", "PairExchangeSetupStruct", "PairResultStruct"]

DIVERGED, _NO_ROOM, _BAD_MESSAGE, _FOREIGN_SWAP = range(-1, -5, -1)
"""MpdPairFailure of ``pair_exchange.h``."""

_FLOAT32 = np.dtype(np.float32)


class PairExchangeSetupStruct(ctypes.Structure):
    """Mirror of MpdPairExchangeSetup of ``pair_exchange.h``."""

    _fields_ = (
        ("node", ctypes.c_void_p),
        ("records", ctypes.c_void_p),
        ("codec", PairCodecStruct),
        ("weight", ctypes.c_double),
    )


class PairResultStruct(ctypes.Structure):
    """Mirror of MpdPairResult of ``pair_exchange.h``."""

    bad_rank: int
    bad_slot: int
    _fields_ = (("bad_rank", ctypes.c_int64), ("bad_slot", ctypes.c_int64))


class NativeExchange:
    """What `PairExchange` does on one node, with the same words, bits and records.

    Args:
        native: native state of the rank, which its publication and inbox have in common.
        slots: payload slots of all ranks.
        codec: what the codec gave by `Codec.native_state`.
        owner: the codec, to which that belongs.
        weight: share of the distance to the partner to move, in (0, 1/2].
        records: ring that gets the rows.
    """

    def __init__(
        self,
        native: NativeRank,
        slots: Slots,
        codec: PairCodecStruct,
        owner: Codec,
        weight: float,
        records: RecordRing,
    ) -> None:
        self._slots = slots
        self._records = records
        self._elements = slots.layout.elements
        self._alive = native, owner  # with the records, what the native object points to
        library = native.library
        setup = PairExchangeSetupStruct(native.address, records.address, codec, weight)
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        library.mpd_pair_create.restype = pointer
        library.mpd_pair_destroy.argtypes = [pointer]
        address = library.mpd_pair_create(ctypes.byref(setup))
        self._destroy = weakref.finalize(self, library.mpd_pair_destroy, address)

        def function(name: str, *arguments: type) -> Callable[..., int]:
            made = getattr(library, f"mpd_pair_{name}")
            made.argtypes, made.restype = [pointer, *arguments], integer
            return partial(made, address)

        self._exchange = function(
            "exchange", pointer, integer, integer, pointer, integer, pointer, integer
        )
        self._absorb = function("absorb", pointer, integer, integer)
        self._publish = function("publish", pointer, integer, pointer, integer)
        self._result = function("result", pointer)
        native.on_close.append(self._close)
        self._candidates = (ctypes.c_int64 * 0)()
        self._candidates_at = 0
        self._y: Any = None
        self._address = 0

    def exchange(
        self,
        y: np.ndarray,
        step: int,
        candidates: Sequence[int],
        *,
        publish_result: bool,
        update: OptimizerStep | None = None,
    ) -> None:
        """Do what `PairExchange.exchange` does, with these candidates as partners.

        Args:
            y: own vector, float32, shape (elements,), contiguous; changed in place.
            step: own local step, for headers and records.
            candidates: ranks to try to exchange with, in this order.
            publish_result: whether to publish `y`.
            update: step of the local optimizer on `y`, to be made first. If it leaves `y` not
                finite, nothing has been given away; its `on_made` then raises.

        Raises:
            UserError: `y` is not such a vector.
            MpiDasgdError: a message has another codec, model size or version.
            RuntimeError: the transport is closed.
        """
        count = len(candidates)
        if len(self._candidates) < count:
            self._candidates = (ctypes.c_int64 * count)()
            self._candidates_at = ctypes.addressof(self._candidates)
        for position, rank in enumerate(candidates):
            self._candidates[position] = rank
        arguments = (
            self._address_of(y), step, publish_result, optimizer_struct(update),
            _refuses(update), self._candidates_at, count,
        )  # fmt: skip
        self._check(self._exchange(*arguments), self._exchange, arguments, update)

    def absorb(self, y: np.ndarray, step: int, *, publish_result: bool = False) -> int:
        """Do what `PairExchange.absorb` does; arguments and errors are those of `exchange`."""
        arguments = self._address_of(y), step, publish_result
        return self._check(self._absorb(*arguments), self._absorb, arguments)

    def publish(self, y: np.ndarray, step: int, update: OptimizerStep | None = None) -> bool:
        """Do what `PairExchange.publish` does; arguments and errors are those of `exchange`."""
        arguments = self._address_of(y), step, optimizer_struct(update), _refuses(update)
        return self._check(self._publish(*arguments), self._publish, arguments, update) > 0

    def _address_of(self, y: np.ndarray) -> int:
        if y is not self._y:
            require("y", y, _FLOAT32, self._elements, writable=True)
            self._y, self._address = y, y.ctypes.data
        return self._address

    def _check(
        self,
        done: int,
        function: Callable[..., int],
        arguments: tuple[Any, ...],
        update: OptimizerStep | None = None,
    ) -> int:
        """Return what a native function returned, or do what it demands."""
        if done == _NO_ROOM:
            self._records.spill()
            done = function(*arguments)
        if done == _BAD_MESSAGE:
            bad = PairResultStruct()
            self._result(ctypes.byref(bad))
            message = self._slots.view(bad.bad_rank, bad.bad_slot)
            raise MpiDasgdError(f"message: {message and message.header}")  # which raises itself
        assert done != _FOREIGN_SWAP, "only the owner changes these words"
        if update is not None:
            update.on_made()
            assert done != DIVERGED, "an update that is not finite is refused"
        return done

    def _close(self) -> None:
        """Free the native object; any call raises from now on."""
        self._exchange = self._absorb = self._publish = self._result = _raise_closed
        self._destroy()


def _refuses(update: OptimizerStep | None) -> bool:
    return update is not None and update.refuses_nonfinite


def _raise_closed(*arguments: Any) -> int:
    raise RuntimeError("transport is closed")
