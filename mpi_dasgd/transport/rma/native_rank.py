"""A rank's publication and inbox in native code, for ranks that share memory.

``node_rank.h`` has the state of both, which `NativePublication` and `NativeInbox` use, and the
native exchange. The Python classes `Publication` and `Inbox` are the reference: the native ones do
the same word operations in the same order.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from mpi_dasgd.transport.control_words import HEAD, WordMap
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.rma.shared_memory import NodeWords
from mpi_dasgd.transport.rma.windows import WindowSlots

__all__ = ["ArrivalStruct", "NativeRank", "NodeSetupStruct", "WordHooks"]

_READ_HOOK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_SWAP_HOOK = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)
_FENCE_HOOK = ctypes.CFUNCTYPE(None)


class NodeSetupStruct(ctypes.Structure):
    """Mirror of MpdNodeSetup of ``node_rank.h``."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("publication_slots", ctypes.c_int64),
        ("inbox_slots", ctypes.c_int64),
        ("max_claims", ctypes.c_int64),
        ("first_slot_word", ctypes.c_int64),
        ("head_word", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
        ("words", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("swap", ctypes.c_void_p),
        ("fence", ctypes.c_void_p),
    )


class ArrivalStruct(ctypes.Structure):
    """Mirror of MpdArrival of ``node_rank.h``."""

    sender: int
    slot: int
    _fields_ = (("sender", ctypes.c_int64), ("slot", ctypes.c_int64))


class WordHooks(NamedTuple):
    """For tests: functions that reach the words instead of the processor's atomics.

    Attributes:
        read, swap: as those of `Words`.
        fence: as that of `Slots`.
    """

    read: Callable[[int, int], int]
    swap: Callable[[int, int, int, int], bool]
    fence: Callable[[], None]


_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[type, ...]] = {  # arguments after the rank's object
    "publication_reserve": (),
    "publication_publish": (),
    "publication_claim": (_INTEGER,),
    "publication_release": (_INTEGER, _INTEGER, _INTEGER),
    "publication_claims": (),
    "publication_has_free_slot": (),
    "publication_reclaim_from": (_INTEGER,),
    "publication_newest": (),
    "inbox_reserve": (_INTEGER,),
    "inbox_send": (_INTEGER, _INTEGER),
    "inbox_cancel": (_INTEGER, _INTEGER),
    "inbox_receive": (_POINTER,),
    "inbox_has_messages": (),
    "inbox_free": (_INTEGER, _INTEGER),
    "inbox_reclaim_from": (_INTEGER,),
    "inbox_sent": (_INTEGER,),
}
_NO_RESULT = (
    "publication_release", "publication_reclaim_from", "inbox_send", "inbox_cancel",
    "inbox_reclaim_from",
)  # fmt: skip


class NativeRank:
    """One rank's native state, for one thread.

    Args:
        library: the native library, as `mpi_dasgd.kernels.native.load` returns it.
        rank: this rank.
        words: address of the first word of each rank; all are in shared memory.
        slots: address of the first payload slot of each rank, likewise.
        nbytes: bytes of a slot.
        word_map: indices of the slots' words.
        counters: as for `Publication` and `Inbox`.
        max_claims: as for `Publication`.
        hooks: for tests.

    Attributes:
        call: the library's functions of this rank, by their names without ``mpd_``; the first
            argument is given.
        address: of the native object.
        library, counters: as given.
        on_close: called before the native object is freed.
        arrivals: receives the messages of ``inbox_receive``.
        arrivals_at: its address.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        rank: int,
        words: Sequence[int],
        slots: Sequence[int],
        nbytes: int,
        word_map: WordMap,
        counters: Counters,
        max_claims: int = 2,
        hooks: WordHooks | None = None,
    ) -> None:
        size = len(words)
        addresses = ctypes.c_void_p * size
        words_of, slots_of = addresses(*words), addresses(*slots)
        setup = NodeSetupStruct(
            rank, size, len(word_map.publication), len(word_map.inbox), max_claims,
            word_map.publication.start, HEAD, nbytes, ctypes.addressof(words_of),
            ctypes.addressof(slots_of), ctypes.addressof(counters),
        )  # fmt: skip
        if hooks is not None:
            self._hooks = _READ_HOOK(hooks.read), _SWAP_HOOK(hooks.swap), _FENCE_HOOK(hooks.fence)
            setup.read, setup.swap, setup.fence = (
                ctypes.cast(hook, ctypes.c_void_p).value for hook in self._hooks
            )
        self.counters = counters
        self.library = library
        self.on_close: list[Callable[[], None]] = []
        library.mpd_node_create.restype = ctypes.c_void_p
        library.mpd_node_destroy.argtypes = [ctypes.c_void_p]
        self.address: int = library.mpd_node_create(ctypes.byref(setup))
        self._destroy = weakref.finalize(self, library.mpd_node_destroy, self.address)
        self.arrivals = (ArrivalStruct * max(1, len(word_map.inbox)))()
        self.arrivals_at = ctypes.addressof(self.arrivals)
        self.call = _Functions(library, self.address)

    @classmethod
    def on_node(
        cls,
        library: ctypes.CDLL,
        rank: int,
        words: NodeWords,
        slots: WindowSlots,
        word_map: WordMap,
        max_claims: int = 2,
    ) -> NativeRank:
        """Return the state of a rank of a job on one node, with counters of its own."""
        ranks = range(len(slots.node_ranks))
        return cls(
            library,
            rank,
            [words.address(r, 0) for r in ranks],
            [slots.address(r) for r in ranks],
            slots.layout.nbytes,
            word_map,
            Counters(),
            max_claims,
        )

    def close(self) -> None:
        """Free the native object; any call raises from now on."""
        self.call = _Closed()
        for function in self.on_close:
            function()
        self.on_close.clear()
        self._destroy()


class _Functions:
    """The native functions of a rank."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, f"mpd_{name}")
            function.argtypes = [_POINTER, *arguments]
            function.restype = None if name in _NO_RESULT else _INTEGER
            setattr(self, name, partial(function, address))

    def __getattr__(self, name: str) -> Callable[..., int]:  # for mypy: all names are set
        raise AttributeError(name)


class _Closed(_Functions):
    """The functions of a rank whose memory is freed."""

    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return _raise_closed


def _raise_closed(*arguments: Any) -> NoReturn:
    raise RuntimeError("transport is closed")
