"""What all algorithms share: the skeleton of a step, and the record of an exchange.

An algorithm is the code of one rank. `Algorithm.step` is a generator that yields only where it must
wait for other ranks; asynchronous algorithms never do, and that they never do is tested. The trainer
drives it against MPI windows, the simulator drives the same code on a virtual clock.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.codecs import Codec, Message
from mpi_dasgd.codecs import Settings as CodecSettings
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.schema import ABSORBED, APPLIED, INITIATED, SKIPPED
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Endpoint, Request

__all__ = [
    "ABSORBED", "APPLIED", "INITIATED", "SKIPPED", "Algorithm", "ExchangeRecord", "LocalOptimizer", "peer_rng",
]  # fmt: skip


def peer_rng(seed: int, rank: int) -> random.Random:
    """Return the source of a rank's random choices; NumPy's is slower for so few."""
    return random.Random(f"mpi_dasgd partners {seed} {rank}")


class LocalOptimizer(Protocol):
    """What an algorithm sees of its own rank's training.

    Attributes:
        local_step: number of gradients computed so far, from 1.
        gradient: the newest gradient, 1-D, padded like the model; may be written to.
    """

    local_step: int

    @property
    def gradient(self) -> np.ndarray: ...

    def apply(self, lr_scale: float = 1.0) -> None:
        """Apply the gradient to the model: one step of the local optimizer.

        Args:
            lr_scale: on the learning rate, beside those of the schedule and of the gradient's delay.
        """


class ExchangeRecord(NamedTuple):
    """Record of one average, seen from one of its sides, or of one gradient of another rank.

    Attributes:
        step: own step.
        partner: the other rank, -1 if none was found.
        kind: INITIATED, ABSORBED, SKIPPED or APPLIED (a gradient).
        partner_step: step at which the partner's model or delta was made, -1 if there was none; of
            a gradient: see the algorithm.
        age_s: seconds since then.
        nbytes: bytes moved by this rank.
        retries: candidates that were taken or full before one was found.
        distance: ||x_i - x_j||_2 before the average; NaN if it was not measured.
        rejected: buckets of the partner's publication that could not be decoded.
        set_staleness: size of the symmetric difference of the two sets of gradients, -1 if unknown.
    """

    step: int
    partner: int
    kind: int
    partner_step: int
    age_s: float
    nbytes: int
    retries: int
    distance: float = float("nan")
    rejected: int = 0
    set_staleness: int = -1


class Algorithm(ABC):
    """Base of all algorithms.

    Args:
        endpoint: the other ranks.
        codec: what crosses the wire.
        x: this rank's model, 1-D, padded; the algorithm changes it in place.
        settings: section ``algorithm`` of the configuration.
        rng: source of this rank's random choices.
        record: called with every exchange.

    Attributes:
        local: this rank's training, set by the driver before `start`: for gradients that arrive
            outside of a step.
    """

    local: LocalOptimizer
    versions: np.ndarray | None = None
    """Gradients of each rank that are in this rank's model, (ranks,) int64, if it counts them."""
    name: ClassVar[str]
    description: ClassVar[Description] = Description()
    capabilities: ClassVar[Capabilities] = Capabilities()
    variant: ClassVar[str] = ""
    """Which value of `algorithm.variant` this class stands for; '' if there is only one."""
    codecs: ClassVar[tuple[str, ...]] = ("none",)
    """Codecs that it can use, the first one the default."""
    config_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of section ``algorithm`` that it heeds, beside name, variant, and the rule for delays."""

    def __init__(
        self,
        endpoint: Endpoint,
        codec: Codec,
        x: np.ndarray,
        settings: Settings,
        rng: random.Random,
        record: Callable[[ExchangeRecord], None],
    ) -> None:
        self.validate(endpoint.size, settings, endpoint.topology)
        self.endpoint = endpoint
        self.codec = codec
        self.x = x
        self.settings = settings
        self.rng = rng
        self.record = record

    @classmethod
    def trailer_words(cls, ranks: int) -> int:
        """Return how many 64-bit words it writes beside the payload of each message."""
        return 0

    @classmethod
    def resolve_codec(cls, settings: CodecSettings) -> CodecSettings:
        """Return the settings of the codec, `auto` resolved.

        Raises:
            UserError: the algorithm cannot use this codec.
        """
        if settings.name == "auto":
            return settings.model_copy(update={"name": cls.codecs[0]})
        if settings.name not in cls.codecs:
            raise UserError(
                f"codec.name: {cls.name!r} cannot use {settings.name!r}: it sends "
                f"{cls.description.exchanges}; "
                f"it can use {', '.join(cls.codecs)}"
            )
        return settings

    @classmethod
    def model_ranks(cls, size: int) -> range:
        """Return the ranks whose mean is the model that the run trains."""
        return range(size)

    @classmethod
    def workers(cls, size: int, settings: Settings) -> range:
        """Return the ranks that compute gradients; data that are sharded are shared out among them."""
        return range(size)

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Return what a user should know of a configuration that works, but not as one may think."""
        sharded = config.task.data == "sharded" or config.simulation.heterogeneity > 0
        if config.algorithm.delay_adaptive_rule != "constant" and sharded:
            return [
                f"algorithm.delay_adaptive_rule: {config.algorithm.delay_adaptive_rule!r} with data that "
                "differ between ranks favours the data of fast ranks (Koloskova et al. 2022, section 5)"
            ]
        return []

    @classmethod
    def is_lockstep(cls, settings: Settings) -> bool:
        """Return whether all ranks make the same number of steps: always, or with these settings."""
        return cls.capabilities.synchronous

    @classmethod
    def max_steps_ahead(cls, settings: Settings, graph: Topology) -> int:
        """Return by how many steps a rank can be ahead of rank 0's next exchange, if ranks go in step."""
        return 0

    @classmethod
    def validate(cls, ranks: int, settings: Settings, graph: Topology) -> None:
        """Refuse settings that this algorithm cannot work with, and those that it would not heed.

        Raises:
            UserError: says why, and what would do.
        """
        cls.validate_requirements(ranks, settings, graph)
        heeded = {"name", "variant", "delay_adaptive_rule", *cls.config_keys}
        if settings.delay_adaptive_rule != "constant":
            heeded.add("delay_threshold")
        if settings.delay_adaptive_rule == "capped":
            heeded.add("delay_cap")
        for key, field in type(settings).model_fields.items():
            value = getattr(settings, key)
            if key not in heeded and value != field.default:
                who = f"{cls.name} {cls.variant}".strip()
                raise UserError(
                    f"algorithm.{key}: {who!r} as it is configured has no use for it, got {value!r}: leave "
                    f"it unset ({field.description})"
                )

    @classmethod
    def validate_requirements(cls, ranks: int, settings: Settings, graph: Topology) -> None:
        """The part of `check` that has its reasons in the algorithm."""
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
                f"algorithm.delay_adaptive_rule: {settings.delay_adaptive_rule!r} is for asynchronous "
                f"algorithms; {cls.name!r} has no delays: leave it at 'constant'"
            )

    @property
    def computes_gradients(self) -> bool:
        """Whether this rank computes gradients; else `serve` is called instead of `step`."""
        return self.endpoint.rank in self.workers(self.endpoint.size, self.settings)

    @property
    def required_ranks(self) -> frozenset[int]:
        """Ranks without which it cannot go on."""
        return frozenset(range(self.endpoint.size) if self.is_lockstep(self.settings) else ())

    def start(self) -> None:
        """Called once, when all ranks have the same model."""

    def restart(self, step: int) -> None:
        """Called when the model was replaced by that of a checkpoint, taken after `step`."""

    @abstractmethod
    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """One step: called when a gradient is ready."""

    def serve(self, local: LocalOptimizer) -> int:
        """Deal with what has arrived, on a rank that computes no gradients; return how much it was."""
        raise NotImplementedError

    def absorb(self, step: int) -> None:
        """Take in what has arrived, outside of a step; `step` is the last one made."""

    @property
    def is_drained(self) -> bool:
        """Whether this rank has sent and received all that it must before it goes."""
        return True

    def finalize(self) -> Iterator[Request]:
        """Give back what is held of other ranks: called once, after the last step."""
        return iter(())

    @property
    def model(self) -> np.ndarray:
        """This rank's share of the model that the run trains: its own model, unless it keeps another."""
        return self.x

    @property
    def mass_weight(self) -> float:
        """By how much `mass` moves when the optimizer moves the model by 1."""
        return 1.0

    def mass(self) -> np.ndarray:
        """Return this rank's share of what exchanges conserve, shape of the model: for meters."""
        return self.x

    def mass_of(self, message: Message) -> np.ndarray:
        """Return what a message that was sent and not received adds to it."""
        return self.codec.delta(message)

    def metrics(self) -> dict[str, float]:
        """Return what it measured of the run on this rank, by name, for its results."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """Return what a checkpoint must hold beside the model, arrays by name."""
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned; `restart` comes after it."""
