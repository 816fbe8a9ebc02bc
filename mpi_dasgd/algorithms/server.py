"""What algorithms with a server share: rank 0 keeps the model, the others compute gradients."""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm
from mpi_dasgd.algorithms.description import Capabilities
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request

__all__ = ["ServerAlgorithm"]


class ServerAlgorithm(Algorithm):
    """Base of algorithms with a server on rank 0, which works itself only if the settings say so.

    A server that works deals with others between its own gradients only, so that these wait for it.
    """

    capabilities = Capabilities(minimum_ranks=2)

    @classmethod
    def validate_requirements(cls, ranks: int, settings: Settings, graph: Topology) -> None:
        """Refuse graphs in which the server cannot be reached by all."""
        super().validate_requirements(ranks, settings, graph)
        if len(graph.neighbours(0)) != ranks - 1:
            raise UserError(
                f"topology.graph: {cls.name!r} needs rank 0, its server, to be the neighbour of all other "
                f"{ranks - 1} ranks, got {graph.name!r}, where it has {len(graph.neighbours(0))}; "
                "use complete"
            )

    def start(self) -> None:
        """See who is there. Workers are `living` until they die, or say farewell."""
        self.living = list(self.workers(self.endpoint.size, self.settings))
        self.departing = False
        self._seen = len(self.endpoint.neighbours())

    def finalize(self) -> Iterator[Request]:
        """From now on nobody is missed."""
        self.departing = True
        return iter(())

    def lost(self) -> list[int]:
        """Take workers that have died off the list, on the server; return which.

        Raises:
            PeerLost: none is left to compute gradients.
        """
        neighbours = self.endpoint.neighbours()
        if len(neighbours) == self._seen:
            return []
        self._seen = len(neighbours)
        dead = [worker for worker in self.living if worker and worker not in neighbours]
        self.living = [worker for worker in self.living if worker not in dead]
        if dead and not (self.living or self.departing):
            raise PeerLost(f"rank {dead[-1]}, the last worker of {self.name}, is gone")
        return dead

    def end_training(self) -> bool:
        """Whether there is something to do for the server: a message, or a death."""
        return self.endpoint.inbox.has_messages or len(self.endpoint.neighbours()) != self._seen

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Warn that a server that works answers between its own gradients only."""
        warnings = super().warnings(config)
        if config.algorithm.server_trains:
            warnings.append(
                "algorithm.server_trains: rank 0 deals with at most transport.inbox_slots = "
                f"{config.transport.inbox_slots} messages between two gradients of its own; with more "
                "workers than that raise it"
            )
        return warnings

    @classmethod
    def workers(cls, size: int, settings: Settings) -> range:
        """Return the ranks that compute gradients."""
        return range(0 if settings.server_trains else 1, size)

    @classmethod
    def model_ranks(cls, size: int) -> range:
        """The server's model is the model."""
        return range(1)

    @property
    def required_ranks(self) -> frozenset[int]:
        """All go on without a worker, none without the server."""
        return frozenset((0,))
