"""Base of algorithms with a server: rank 0 keeps the model, the others compute gradients."""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm
from mpi_dasgd.algorithms.description import Capabilities
from mpi_dasgd.config.schema import AlgorithmConfig, Config
from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request

__all__ = ["ServerAlgorithm"]


class ServerAlgorithm(Algorithm):
    """Base of algorithms with a server on rank 0, which trains itself only if the settings say so.

    A server that trains serves others between its own gradients only, so that they wait for these.
    """

    capabilities = Capabilities(minimum_ranks=2)

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse graphs in which the server is not a neighbour of all other ranks.

        Raises:
            UserError: says why, and what would work.
        """
        super().validate_requirements(ranks, settings, graph)
        if len(graph.neighbours(0)) != ranks - 1:
            raise UserError(
                f"topology.graph: {cls.name!r} needs rank 0, its server, to be the neighbour of "
                f"all other {ranks - 1} ranks, got {graph.name!r}, where it has "
                f"{len(graph.neighbours(0))}; use complete"
            )

    def start(self) -> None:
        """List the workers, which are `living` until they die or shut down."""
        self._neighbours_seen = len(self.endpoint.neighbours())
        self.list_workers()

    def list_workers(self) -> None:
        """List all workers; on the server, those that have not died."""
        rank, workers = self.endpoint.rank, self.workers(self.endpoint.size, self.settings)
        reachable = (rank, *self.endpoint.neighbours())
        self.living = [worker for worker in workers if rank or worker in reachable]
        self.departing = False

    def finalize(self) -> Iterator[Request]:
        """Stop treating silent workers as lost: training has ended."""
        self.departing = True
        return iter(())

    def remove_lost(self) -> list[int]:
        """Remove workers that have died from `living`, on the server; return their ranks.

        Raises:
            PeerLost: none is left to compute gradients.
        """
        neighbours = self.endpoint.neighbours()
        if len(neighbours) == self._neighbours_seen:
            return []
        self._neighbours_seen = len(neighbours)
        dead = [worker for worker in self.living if worker and worker not in neighbours]
        self.living = [worker for worker in self.living if worker not in dead]
        if dead and not (self.living or self.departing):
            raise PeerLost(f"rank {dead[-1]}, the last worker of {self.name}, is gone")
        return dead

    def has_work(self) -> bool:
        """Return whether the server has something to process: a message, or a death."""
        deaths = len(self.endpoint.neighbours()) != self._neighbours_seen
        return self.endpoint.inbox.has_messages or deaths

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Warn that a server that trains answers between its own gradients only."""
        warnings = super().warnings(config)
        if config.algorithm.server_trains:
            warnings.append(
                "algorithm.server_trains: rank 0 deals with at most transport.inbox_slots = "
                f"{config.transport.inbox_slots} messages between two gradients of its own; with "
                "more workers than that raise it"
            )
        return warnings

    @classmethod
    def workers(cls, size: int, settings: AlgorithmConfig) -> range:
        """Return the ranks that compute gradients: all, or all but the server."""
        return range(0 if settings.server_trains else 1, size)

    @classmethod
    def model_ranks(cls, size: int) -> range:
        """Return rank 0: the server's model is the model that the run trains."""
        return range(1)

    @property
    def required_ranks(self) -> frozenset[int]:
        """The server; a run goes on without any one worker."""
        return frozenset((0,))
