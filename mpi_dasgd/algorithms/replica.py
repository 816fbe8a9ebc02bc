"""Replica: a model as an exact sum of updates, and what the neighbours must still get of it.

The sum is float64 on the grid of `codecs/error_feedback.py`, where additions do not round;
the model is this sum in its own type. Replicas that have added the same updates, in whatever order, are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from mpi_dasgd.codecs import Codec, Message
from mpi_dasgd.codecs.error_feedback import blocks, round_to_grid, update_quantizer

__all__ = ["Link", "Replica"]


@dataclass
class Link:
    """A neighbour to whom updates go.

    Attributes:
        rank: who.
        subtree_size: ranks that get their updates from here through it, itself included.
        residual: what it must still get from here, (elements,), float64, on the grid.
        has_new_updates: whether gradients were added that it has not been told of.
        has_residual: whether something may be owed beside these.
        advertised_settled: what the last message to it said of being settled; nothing is owed at the start.
        peer_settled: what the last message from it said.
    """

    rank: int
    subtree_size: int
    residual: np.ndarray
    has_new_updates: bool = False
    has_residual: bool = False
    advertised_settled: bool = True
    peer_settled: bool = True


class Replica:
    """One rank's replica.

    Args:
        x: the model, 1-D; rounded to the grid, and from then on this sum.
        codec: says how updates cross the wire.
        subtree_sizes: for each neighbour how many ranks get their updates through it.

    Attributes:
        links: by the neighbour's rank.
    """

    def __init__(self, x: np.ndarray, codec: Codec, subtree_sizes: Mapping[int, int]) -> None:
        self._x = x
        self._code = update_quantizer(codec)
        self._sum = round_to_grid(x.astype(np.float64))
        x[:] = self._sum
        self.links = {j: Link(j, count, np.zeros(x.size)) for j, count in subtree_sizes.items()}

    def add_own(self) -> None:
        """Take what a local optimizer has made of the model for an update, owed to all neighbours."""
        for part in blocks(self._x.size):
            update = self._x[part].astype(np.float64)
            update -= self._sum[part].astype(self._x.dtype)  # the model before it
            self._add(part, round_to_grid(update), self.links.values())

    def add(self, message: Message, onward: Collection[Link]) -> None:
        """x <- x + u of a message; u is owed to the links `onward`."""
        for part in blocks(self._x.size):
            self._add(part, self._code.read(message, part), onward)

    def _add(self, part: slice, update: np.ndarray, links: Collection[Link]) -> None:
        total = self._sum[part]
        total += update
        self._x[part] = total
        for link in links:
            link.residual[part] += update

    def pack(self, link: Link, out: Message) -> None:
        """Write Q(owed) to a message; owed <- owed - Q(owed)."""
        link.has_residual = self._code.pack(link.residual, out)
        link.has_new_updates = False

    @property
    def largest(self) -> float:
        """Largest parameter, in magnitude; NaN if one is."""
        return float(np.abs(self._sum).max())

    def consensus_share(self) -> np.ndarray:
        """Return x_i + sum_j behind_ij owed_ij: the sum of it over all ranks lacks nothing that is owed."""
        share = self._sum.copy()
        for link in self.links.values():
            share += link.subtree_size * link.residual
        return share

    def replace(self, model: np.ndarray) -> None:
        """Set the model, which all ranks have; nothing is owed."""
        self._sum[:] = round_to_grid(model.astype(np.float64))
        self._x[:] = self._sum
        for link in self.links.values():
            link.residual[:] = 0

    def state(self) -> dict[str, np.ndarray]:
        """Return the sum and what is owed: for a checkpoint."""
        return {"sum": self._sum} | {f"owed/{j}": link.residual for j, link in self.links.items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned, if it is that of the model as it is; else the model counts."""
        if (arrays["sum"].astype(self._x.dtype) != self._x).any():
            self.replace(self._x)
            return
        self._sum[:] = arrays["sum"]
        for j, link in self.links.items():
            link.residual[:] = arrays[f"owed/{j}"]
