"""Replica: a model as an exact sum of updates, and the residual that each neighbour still needs.

The sum is float64 on the grid of `codecs/error_feedback.py`, where additions do not round; the
model is this sum in its own type. Replicas that have added the same updates, in whatever order, are
equal bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from mpi_dasgd.codecs import Codec, Message
from mpi_dasgd.codecs.error_feedback import EXACT_RANGE, blocks, round_to_grid, update_quantizer
from mpi_dasgd.errors import Diverged

__all__ = ["Link", "Replica"]


@dataclass
class Link:
    """A neighbour that updates are sent to.

    Attributes:
        rank: rank of the neighbour.
        subtree_size: ranks that get this rank's updates through it, itself included.
        residual: sum of the updates that it has not been sent, (elements,), float64, on the grid.
        has_new_updates: whether gradients were added that no message to it has mentioned.
        has_residual: whether the residual may be nonzero apart from these.
        advertised_settled: what the last message to it said of being settled; True at the start,
            where no residuals are.
        peer_settled: what the last message from it said of being settled.
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
        x: the model, 1-D; rounded to the grid, and from then on the value of the sum.
        codec: codec of the run, which determines how updates are quantized.
        subtree_sizes: for each neighbour, the number of ranks that get their updates through it.

    Attributes:
        links: links to the neighbours, by rank.
    """

    def __init__(self, x: np.ndarray, codec: Codec, subtree_sizes: Mapping[int, int]) -> None:
        self._x = x
        self._quantizer = update_quantizer(codec)
        self._sum = round_to_grid(x.astype(np.float64))
        x[:] = self._sum
        self.links = {j: Link(j, count, np.zeros(x.size)) for j, count in subtree_sizes.items()}

    def adopt_writes(self) -> None:
        """Take over what the user has written to the model: it is no update for the neighbours."""
        for part in blocks(self._x.size):
            x, total = self._x[part], self._sum[part]
            written = x != total.astype(x.dtype)
            if written.any():
                total[written] = round_to_grid(x[written].astype(np.float64))
                x[written] = total[written]

    def add_own(self) -> None:
        """Add the local optimizer's change of the model as an update for all neighbours."""
        for part in blocks(self._x.size):
            update = self._x[part].astype(np.float64)
            update -= self._sum[part].astype(self._x.dtype)  # the model before the step
            self._add(part, round_to_grid(update), self.links.values())

    def add(self, message: Message, onward: Collection[Link]) -> None:
        """Add the update u of a message to x, and to the residuals of the links `onward`."""
        for part in blocks(self._x.size):
            self._add(part, self._quantizer.read(message, part), onward)

    def _add(self, part: slice, update: np.ndarray, links: Collection[Link]) -> None:
        total = self._sum[part]
        total += update
        self._x[part] = total
        for link in links:
            link.residual[part] += update

    def pack(self, link: Link, out: Message) -> None:
        """Write Q(residual) of a link to a message; residual <- residual - Q(residual)."""
        link.has_residual = self._quantizer.pack(link.residual, out)
        link.has_new_updates = False

    def check_range(self, rank: int) -> None:
        """Warn of parameters that are too large for exact additions.

        Args:
            rank: rank of this replica, for the message.

        Raises:
            Diverged: a parameter is not finite.
        """
        largest = float(np.abs(self._sum).max())
        if not np.isfinite(largest):
            raise Diverged(
                f"a parameter of rank {rank} became {largest}; try a smaller optimizer.lr"
            )
        if largest >= EXACT_RANGE:
            warnings.warn(
                f"dasgd: a parameter of rank {rank} is {largest:g}; from {EXACT_RANGE:g} on "
                "replicas may differ in their last bits",
                stacklevel=3,
            )

    def consensus_share(self) -> np.ndarray:
        """Return x_i + sum_j size_ij residual_ij; its sum over all ranks lacks no residual."""
        share = self._sum.copy()
        for link in self.links.values():
            share += link.subtree_size * link.residual
        return share

    def replace(self, model: np.ndarray) -> None:
        """Set the model to one that all ranks have; all residuals are 0 then."""
        self._sum[:] = round_to_grid(model.astype(np.float64))
        self._x[:] = self._sum
        for link in self.links.values():
            link.residual[:] = 0

    def state(self) -> dict[str, np.ndarray]:
        """Return the sum and the residuals, for a checkpoint."""
        return {"sum": self._sum} | {f"owed/{j}": link.residual for j, link in self.links.items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore `state()` if it matches the model; otherwise use the model with no residuals."""
        if (arrays["sum"].astype(self._x.dtype) != self._x).any():
            self.replace(self._x)
            return
        self._sum[:] = arrays["sum"]
        for j, link in self.links.items():
            link.residual[:] = arrays[f"owed/{j}"]
