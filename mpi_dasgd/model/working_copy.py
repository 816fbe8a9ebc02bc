"""Parameters of lower precision than the vector: their working copy, of which it has the master."""

from __future__ import annotations

import torch

from mpi_dasgd.model.flat_memory import FlatMemory

__all__ = ["WorkingCopy"]


class WorkingCopy:
    """A part of the vector, rounded to the type of the parameters that live in it.

    What is exchanged is the vector, the master, whose changes may be too small for the type of the
    parameters. What the master has beside the rounded value, its remainder, survives the steps of
    the optimizer. As long as nothing is exchanged there is none, and the parameters take the values
    that they would have without a master, bit for bit.

    Args:
        master: part of the vector, (elements,).
        dtype: type of the parameters, a real one.

    Attributes:
        memory: memory of the parameters, (elements,), `dtype`.
    """

    def __init__(self, master: torch.Tensor, dtype: torch.dtype) -> None:
        self.memory = FlatMemory(master.numel(), dtype, master.device)
        self._master = master
        self._values = self.memory.tensor
        self._written = torch.empty_like(self._values)
        self._on_host = master.device.type == "cpu"
        self.write()

    def take_writes(self) -> None:
        """Set the master to each value that was written, and leave it where none was."""
        changed = self._values != self._written
        if not self._on_host or changed.any():  # a GPU would be waited for
            self._master.copy_(
                torch.where(changed, self._values.to(self._master.dtype), self._master)
            )
            self._written.copy_(self._values)

    def take_update(self) -> None:
        """Set the master to the values that the optimizer has left, plus its remainder."""
        self._master.sub_(self._written).add_(self._values)  # exact, then rounded once
        self._written.copy_(self._values)

    def write(self) -> None:
        """Round the master to the parameters."""
        self._values.copy_(self._master)
        self._written.copy_(self._values)
