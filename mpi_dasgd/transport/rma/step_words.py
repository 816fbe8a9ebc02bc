"""The words that a rank writes and reads in each of its steps, by one native call for several.

For ranks that share memory. `Membership` and `NodeWords` have the same one by one, at the cost of a
call of Python and one of ctypes each, of which a step makes a dozen.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Container, MutableSequence
from functools import partial
from typing import Any, NoReturn

from mpi_dasgd.transport.control_words import GRADIENTS, SAMPLES, STATUS
from mpi_dasgd.transport.rma.shared_memory import NodeWords

__all__ = ["StepWords", "StepWordsStruct"]


class StepWordsStruct(ctypes.Structure):
    """Mirror of MpdStepWords of ``kernels/cpu/step_words.h``."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("gradients_word", ctypes.c_int64),
        ("samples_word", ctypes.c_int64),
        ("status_word", ctypes.c_int64),
        ("words", ctypes.c_void_p),
        ("counted", ctypes.c_void_p),
        ("gradients", ctypes.c_void_p),
        ("samples", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("news", ctypes.c_void_p),
    )


class StepWords:
    """Step words of one rank, for its compute thread.

    Args:
        library: the native library, as `mpi_dasgd.kernels.native.load` returns it.
        words: control words of all ranks.
        rank: this rank.
        size: number of ranks.
        counts_others: whether a step reads the words of other ranks.

    Attributes:
        counts_others: as given.
        gradients, samples: of each rank, as last seen here; may be changed.
        news: whether `end_step` has seen that the status of a rank is another one than known, (1,).
        begin_step: reports a number of gradients; returns those of all ranks.
        end_step: reports a number of samples, and reads those of others; returns the gradients of
            all ranks.
        read_peers: reads status and samples of the others; returns whether a status has changed.
    """

    begin_step: Callable[[int], int]
    end_step: Callable[[int], int]
    read_peers: Callable[[], int]

    def __init__(
        self,
        library: ctypes.CDLL,
        words: NodeWords,
        rank: int,
        size: int,
        *,
        counts_others: bool = True,
    ) -> None:
        self._rank, self._size = rank, size
        self.counts_others = counts_others
        gradients, samples, self._status = (array("q", [0] * size) for _ in range(3))
        self.gradients: MutableSequence[int] = gradients
        self.samples: MutableSequence[int] = samples
        self._counted = (ctypes.c_uint8 * size)()
        self._addresses = (ctypes.c_void_p * size)(*(words.address(r, 0) for r in range(size)))
        self.news: MutableSequence[int]
        self.news = news = array("q", [0])
        known = (seen.buffer_info()[0] for seen in (gradients, samples, self._status, news))
        self._struct = StepWordsStruct(
            *(rank, size, GRADIENTS, SAMPLES, STATUS),
            *(ctypes.addressof(self._addresses), ctypes.addressof(self._counted), *known),
        )
        self.forget(())
        step = ctypes.c_void_p(ctypes.addressof(self._struct))
        for function in (library.mpd_begin_step, library.mpd_end_step):
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
        library.mpd_read_peers.argtypes = [ctypes.c_void_p]
        library.mpd_read_peers.restype = ctypes.c_int
        self.begin_step = partial(library.mpd_begin_step, step)
        self.end_step = partial(library.mpd_end_step, step)
        self.read_peers = partial(library.mpd_read_peers, step)

    @property
    def status(self) -> list[int]:
        """Status words of all ranks, as `read_peers` has found them; 0 for this rank."""
        return list(self._status)

    def forget(self, dead: Container[int]) -> None:
        """Read `dead` ranks in a step no more."""
        for rank in range(self._size):
            is_read = self.counts_others and rank != self._rank and rank not in dead
            self._counted[rank] = is_read

    def close(self) -> None:
        """Use the words no more: their memory is to be freed."""
        self.begin_step = self.end_step = self.read_peers = _raise_closed


def _raise_closed(*_: Any) -> NoReturn:
    raise RuntimeError("transport is closed")
