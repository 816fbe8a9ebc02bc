"""Tables of the host in the memory of a device: ``table.cu``.

What has changed goes there in the arguments of launches, which the driver copies before they
return: on the stream, behind the kernels that still read what was there before, and without memory
of the host that must stay as it is until a copy is made.
"""

from __future__ import annotations

import numpy as np

from mpi_dasgd.kernels.cuda.program import POINTER, Program, address
from mpi_dasgd.kernels.encoded import Array

__all__ = ["TABLE", "TABLE_ARGUMENTS", "TABLE_WORDS", "DeviceTable"]

TABLE_WORDS = 500
"""Words of 8 bytes that one launch writes: MPD_TABLE_WORDS of ``table.cu``."""

TABLE_ARGUMENTS = np.dtype(
    [("to", POINTER), ("count", np.int64), ("words", np.uint64, TABLE_WORDS)], align=True
)
"""Mirror of MpdTableArguments of ``table.cu``."""

_BYTES = 8 * TABLE_WORDS

TABLE = Program("table.cu", TABLE_ARGUMENTS, f"=Qq{_BYTES}s")
"""The kernel of ``table.cu``."""


class DeviceTable:
    """A copy of some bytes of the host on CuPy's current device.

    Attributes:
        content: what it holds, or will when the launches so far have run.
        address: where it is on the device, a multiple of 8.
    """

    def __init__(self) -> None:
        self.content = b""
        self.address = 0
        self._memory: Array | None = None

    def update(self, content: bytes) -> None:
        """Have the copy hold `content` for the launches that follow on this stream.

        Args:
            content: some bytes, a multiple of 8 of them, as many as ever.
        """
        if self._memory is None:
            self._allocate(len(content))
        for start in range(0, len(content), _BYTES):
            part = content[start : start + _BYTES]
            if part != self.content[start : start + _BYTES]:
                TABLE.launch("mpd_write_table", (), 1, self.address + start, len(part) // 8, part)
        self.content = content

    def _allocate(self, nbytes: int) -> None:
        import cupy

        self._memory = cupy.empty(nbytes // 8, np.uint64)
        self.address = address(self._memory)
