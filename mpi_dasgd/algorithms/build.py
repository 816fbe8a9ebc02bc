"""Builder of an algorithm's parts: the same for ranks over MPI and for ranks of the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpi_dasgd import algorithms, codecs, topology
from mpi_dasgd.algorithms.base import Algorithm, peer_rng
from mpi_dasgd.algorithms.records import RecordSink
from mpi_dasgd.codecs import Codec
from mpi_dasgd.config.schema import CodecConfig, Config
from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST
from mpi_dasgd.lr_schedule import Schedule
from mpi_dasgd.staleness.step_rule import delay_rule
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Endpoint

__all__ = ["RunParts", "build_run"]

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class RunParts:
    """Parts that all ranks of a run share, and makers of those that each rank has of its own.

    Attributes:
        config: configuration of the run.
        algorithm_cls: class of the algorithm.
        topology: graph of the ranks.
        codec_config: section ``codec``, with `auto` resolved.
        schedule: factor on the learning rate as a function of progress.
        step_rule: factor on the learning rate as a function of a gradient's delay, in gradients.
        dtype: type of the models.
    """

    config: Config
    algorithm_cls: type[Algorithm]
    topology: Topology
    codec_config: CodecConfig
    schedule: Schedule
    step_rule: Callable[[int], float]
    dtype: np.dtype = _FLOAT32

    @property
    def lockstep(self) -> bool:
        """Whether all ranks make the same number of steps."""
        return self.algorithm_cls.is_lockstep(self.config.algorithm)

    @property
    def applies_gradients_everywhere(self) -> bool:
        """Whether models stay equal because every rank applies the same gradients to its own."""
        all_ranks = range(self.topology.size)
        return (
            self.algorithm_cls.capabilities.exchanges_gradients
            and self.algorithm_cls.model_ranks(self.topology.size) == all_ranks
        )

    def publication_slots(self, memory: str = "host") -> int:
        """Return the slots of a rank's publication; 0 for an algorithm that publishes no models.

        Args:
            memory: memory of the slots, ``host`` or ``ipc``.
        """
        uses = self.algorithm_cls.capabilities.uses_publication
        return self.config.transport.publication_slots_in(memory) if uses else 0

    @property
    def inbox_slots(self) -> int:
        """Slots of a rank's inbox; 0 for an algorithm that sends no messages."""
        return (
            self.config.transport.inbox_slots if self.algorithm_cls.capabilities.uses_inbox else 0
        )

    @cached_property
    def max_steps_ahead(self) -> int:
        """Steps by which a rank in lockstep can be ahead of rank 0's next exchange."""
        return self.algorithm_cls.max_steps_ahead(self.config.algorithm, self.topology)

    @property
    def warnings(self) -> list[str]:
        """Sentences on settings that work together, but hardly as their user expects."""
        return self.algorithm_cls.warnings(self.config)

    def make_codec(
        self,
        rank: int,
        elements: int,
        dtype: np.dtype,
        device: Device = HOST,
        threads: int = 1,
    ) -> Codec:
        """Make the codec of `rank`, for models of `elements` elements of `dtype` on `device`.

        `threads` is what ``codec.threads = auto`` stands for.

        Raises:
            UserError: the codec does not take such models, or not there.
        """
        return codecs.make(
            self.codec_config,
            elements,
            dtype,
            seed=self.config.run.seed,
            rank=rank,
            trailer_words=self.algorithm_cls.trailer_words(self.topology.size),
            device=device,
            threads=threads,
        )

    def make_algorithm(
        self,
        endpoint: Endpoint,
        codec: Codec,
        x: np.ndarray,
        record: RecordSink,
    ) -> Algorithm:
        """Make the algorithm of the rank of `endpoint`.

        Args:
            endpoint: access to the other ranks.
            codec: codec of this rank.
            x: model of this rank, 1-D and padded; the algorithm changes it in place.
            record: gets the record of every exchange.
        """
        rng = peer_rng(self.config.run.seed, endpoint.rank)
        return self.algorithm_cls(endpoint, codec, x, self.config.algorithm, rng, record)


def build_run(config: Config, size: int, dtype: np.dtype = _FLOAT32) -> RunParts:
    """Find the algorithm of `config`, build the graph of its `size` ranks, and validate the two.

    Args:
        config: configuration of the run.
        size: number of ranks.
        dtype: type of the models, by which the codec `auto` is chosen.

    Raises:
        UserError: settings that are unknown, or that do not fit each other or `size`.
    """
    algorithm_cls = algorithms.find(config.algorithm.name, config.algorithm.variant)
    graph = topology.build(
        config.topology.graph,
        size,
        degree=config.topology.degree,
        file=config.topology.file,
        seed=config.run.seed,
    )
    schedule = Schedule(config.schedule)
    algorithm_cls.validate(size, config.algorithm, graph)
    return RunParts(
        config,
        algorithm_cls,
        graph,
        algorithm_cls.resolve_codec(config.codec, dtype),
        schedule,
        delay_rule(config.algorithm, size),
        np.dtype(dtype),
    )
