"""Base of all algorithms: the hooks that drivers call on each rank.

An algorithm is the code of one rank. `Algorithm.step` is a generator that yields only where it must
wait for other ranks; algorithms that never wait derive from `AsynchronousAlgorithm`. The trainer
drives them over MPI windows, the simulator drives the same code on a virtual clock.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

import numpy as np

from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.records import ExchangeRecorder, RecordSink
from mpi_dasgd.algorithms.validation import refuse_ignored_keys
from mpi_dasgd.codecs import Codec, Message
from mpi_dasgd.config.schema import AlgorithmConfig, CodecConfig, Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.optimizer import OptimizerStep
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Endpoint, Request

__all__ = ["Algorithm", "LocalOptimizer", "peer_rng"]


_FLOAT32 = np.dtype(np.float32)


def peer_rng(seed: int, rank: int) -> random.Random:
    """Return the generator of a rank's random choices.

    It is Python's: NumPy's is slower for a few numbers at a time.
    """
    return random.Random(f"mpi_dasgd partners {seed} {rank}")


class LocalOptimizer(Protocol):
    """What an algorithm sees of its own rank's training.

    Attributes:
        local_step: number of gradients that this rank has computed, from 1.
        gradient: newest gradient, 1-D, padded like the model; it may be overwritten.
    """

    local_step: int

    @property
    def gradient(self) -> np.ndarray: ...

    def apply(self, lr_scale: float = 1.0) -> None:
        """Apply the gradient to the model: one step of the local optimizer.

        Args:
            lr_scale: factor on the learning rate, in addition to those of the schedule and of the
                gradient's delay.
        """

    def fused_update(self, lr_scale: float = 1.0) -> OptimizerStep | None:
        """Return the step that `apply` would make, for a codec to make in its pass.

        Whoever has it made calls `OptimizerStep.on_made` afterwards. None: only `apply` can make
        it.

        Args:
            lr_scale: as for `apply`.
        """


class Algorithm(ABC):
    """Base of all algorithms.

    Args:
        endpoint: transport to the other ranks.
        codec: codec of all messages.
        x: this rank's model, 1-D, padded; the algorithm changes it in place.
        settings: section ``algorithm`` of the configuration.
        rng: generator of this rank's random choices.
        record: gets the record of every exchange.

    Attributes:
        local: this rank's training, set by the driver before `start`, for gradients that arrive
            outside of a step.
        records: writer of this rank's exchange records.
        versions: number of gradients of each rank that are in this rank's model, (ranks,) int64;
            None if the algorithm does not count them.
    """

    local: LocalOptimizer
    versions: np.ndarray | None = None
    name: ClassVar[str]
    variant: ClassVar[str] = ""
    """Value of `algorithm.variant` for this class; '' if the algorithm has no variants."""
    description: ClassVar[Description] = Description()
    capabilities: ClassVar[Capabilities] = Capabilities()
    config_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of section ``algorithm`` that it uses, beside name, variant and delay-adaptive rule."""
    codecs: ClassVar[tuple[str, ...]] = ("none",)
    """Codecs that it can use, the default first."""

    def __init__(
        self,
        endpoint: Endpoint,
        codec: Codec,
        x: np.ndarray,
        settings: AlgorithmConfig,
        rng: random.Random,
        record: RecordSink,
    ) -> None:
        self.validate(endpoint.size, settings, endpoint.topology)
        self.endpoint = endpoint
        self.codec = codec
        self.x = x
        self.settings = settings
        self.rng = rng
        self.records = ExchangeRecorder(endpoint, record)

    @classmethod
    def trailer_words(cls, ranks: int) -> int:
        """Return the number of 64-bit words that it adds to the payload of each message."""
        return 0

    @classmethod
    def resolve_codec(cls, settings: CodecConfig, dtype: np.dtype = _FLOAT32) -> CodecConfig:
        """Return section ``codec`` with `auto` resolved, for models of `dtype`.

        Raises:
            UserError: the algorithm cannot use this codec.
        """
        if settings.name == "auto":
            name = cls.codecs[0] if dtype == _FLOAT32 else "none"  # only it takes others
            return settings.model_copy(update={"name": name})
        if settings.name not in cls.codecs:
            raise UserError(
                f"codec.name: {cls.name!r} cannot use {settings.name!r}: it sends "
                f"{cls.description.exchanges}; it can use {', '.join(cls.codecs)}"
            )
        return settings

    @classmethod
    def model_ranks(cls, size: int) -> range:
        """Return the ranks whose mean is the model that the run trains."""
        return range(size)

    @classmethod
    def workers(cls, size: int, settings: AlgorithmConfig) -> range:
        """Return the ranks that compute gradients; sharded data are divided among them."""
        return range(size)

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Return warnings about settings that are valid but likely not what the user expects."""
        sharded = config.task.data == "sharded" or config.simulation.heterogeneity > 0
        if config.algorithm.delay_adaptive_rule != "constant" and sharded:
            return [
                f"algorithm.delay_adaptive_rule: {config.algorithm.delay_adaptive_rule!r} with "
                "data that differ between ranks favours the data of fast ranks "
                "(Koloskova et al. 2022, section 5)"
            ]
        return []

    @classmethod
    def is_lockstep(cls, settings: AlgorithmConfig) -> bool:
        """Return whether all ranks make the same number of steps with these settings."""
        return cls.capabilities.synchronous

    @classmethod
    def max_steps_ahead(cls, settings: AlgorithmConfig, graph: Topology) -> int:
        """Return by how many steps a rank in lockstep can be ahead of rank 0's next exchange."""
        return 0

    @classmethod
    def validate(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse settings that this algorithm cannot work with, and those that it would ignore.

        Raises:
            UserError: says why, and what would work.
        """
        cls.validate_requirements(ranks, settings, graph)
        refuse_ignored_keys(f"{cls.name} {cls.variant}".strip(), cls.config_keys, settings)

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse settings that this algorithm cannot work with.

        Raises:
            UserError: says why, and what would work.
        """
        minimum = cls.capabilities.minimum_ranks
        if ranks < minimum:
            raise UserError(
                f"algorithm.name: {cls.name!r} needs at least {minimum} ranks, got {ranks}; "
                "start it with `mpi-dasgd launch -n 4 train ...`, or mpirun -n 4"
            )
        if settings.variant not in (None, cls.variant):  # `algorithms.find` chooses the class
            raise UserError(
                f"algorithm.variant: {cls.__name__} is {cls.variant!r}, got {settings.variant!r}"
            )
        if settings.delay_adaptive_rule != "constant" and cls.is_lockstep(settings):
            raise UserError(
                f"algorithm.delay_adaptive_rule: {settings.delay_adaptive_rule!r} is for "
                f"asynchronous algorithms; {cls.name!r} has no delays: leave it at 'constant'"
            )

    @property
    def computes_gradients(self) -> bool:
        """Whether this rank computes gradients; otherwise `serve` is called instead of `step`."""
        return self.endpoint.rank in self.workers(self.endpoint.size, self.settings)

    @property
    def required_ranks(self) -> frozenset[int]:
        """Ranks whose loss ends the run."""
        return frozenset(range(self.endpoint.size) if self.is_lockstep(self.settings) else ())

    def start(self) -> None:
        """Prepare for the first step; called once, when all ranks have the same model."""

    def restart(self, step: int) -> None:
        """Go on from the model of a checkpoint, which was taken after `step`."""

    def suspend(self) -> Iterator[Request]:
        """Stop exchanging between two steps, on the driver's call: release what is held of others.

        `absorb` follows until nothing is in flight on any rank and all are drained, then `reset`
        or `resume`. The default is `finalize`.
        """
        return self.finalize()

    def reset(self, step: int) -> None:
        """Begin anew after `suspend`, at `x`, which all ranks have alike; `step` was the last one.

        The default is `restart`.
        """
        self.restart(step)

    def resume(self, step: int) -> None:
        """Go on after `suspend`, at `x`, which the user may have changed on any rank.

        The default is `reset`.
        """
        self.reset(step)

    @abstractmethod
    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Make one step; called when a gradient is ready. Yields the requests that it waits for."""

    def serve(self, local: LocalOptimizer) -> int:
        """Process received messages on a rank that computes no gradients; return their number."""
        raise NotImplementedError

    def absorb(self, step: int) -> None:
        """Process received messages outside of a step; `step` is the last one made."""

    def attend(self, step: int) -> None:
        """Do what other ranks wait for, while the program of this one waits for other things.

        Nothing, if they never wait for it, and in lockstep, where it takes part in their steps.

        Args:
            step: last step made; another may follow.
        """

    def finalize(self) -> Iterator[Request]:
        """Release what is held of other ranks; called once, after the last step."""
        return iter(())

    def settle(self) -> None:
        """Wait for a GPU, until the counters and records hold all exchanges that were begun.

        Raises:
            DeviceFailed: the device has failed; what it has not finished is not counted.
        """
        try:
            self.codec.settle()
        finally:
            self.records.flush()

    @property
    def is_drained(self) -> bool:
        """Whether this rank has sent and received all that it must before it departs."""
        return True

    @property
    def model(self) -> np.ndarray:
        """This rank's share of the model that the run trains: `x`, unless it keeps another one."""
        return self.x

    @property
    def model_weight(self) -> float:
        """Weight of `model` in the mean over `model_ranks`, once nothing is in flight."""
        return 1.0

    @property
    def mass_weight(self) -> float:
        """Factor by which `mass` moves when the optimizer moves the model by 1."""
        return 1.0

    def mass(self) -> np.ndarray:
        """Return this rank's share of what exchanges conserve, shape of the model, for meters."""
        return self.x

    def mass_of(self, message: Message) -> np.ndarray:
        """Return what a message in flight adds to that sum."""
        return self.codec.delta(message)

    def metrics(self) -> dict[str, float]:
        """Return what this rank measured of the run, by name, for its results."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint must hold beside the model, by name."""
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned; `restart` is called next."""
