"""Schema of a configuration: frozen and typed, every key with its default and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from mpi_dasgd.config.deprecated import renamed

__all__ = ["OWN_ALGORITHMS", "AlgorithmConfig", "CodecConfig", "Config", "Section"]

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_PUBLICATION_SLOTS = {"host": 4, "ipc": 6}


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys are refused, old names translated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _rename_old_keys(cls, data: Any) -> Any:
        return renamed(cls.section(), data) if isinstance(data, Mapping) else data

    @classmethod
    def section(cls) -> str:
        """Return the name of the section in a configuration file."""
        return cls.__name__.removesuffix("Config").lower()


class RunConfig(Section):
    name: str = Field(
        "run", description="name of the run and of its result directory", min_length=1
    )
    directory: str = Field("runs", description="directory in which result directories are created")
    seed: int = Field(1, description="seed of weights, batches, partners and stragglers", ge=0)
    overwrite: bool = Field(False, description="replace an existing result directory")
    resume: bool = Field(False, description="resume from the newest checkpoint of this run")
    check_finite: bool = Field(
        True, description="stop before a gradient or model that is not finite reaches another rank"
    )


class TaskConfig(Section):
    name: Literal["digits", "breast_cancer", "fashion_mnist", "random", "quadratic"] = Field(
        "digits", description="data set; quadratic is for `simulate` only"
    )
    directory: str | None = Field(
        None,
        description="fashion_mnist: folder of its four IDX files, or of MNIST's; unset: Debian's",
    )
    model: Literal["cnn", "mlp", "logistic", "mlp_25m", "cnn_1m"] = Field(
        "cnn", description="network; see mpi_dasgd/tasks/models.py for the shapes"
    )
    batch_size: Positive = Field(32, description="samples of a mini-batch of one rank")
    data: Literal["shared", "sharded"] = Field(
        "shared", description="every rank draws from all data, or from its own shard only"
    )


class OptimizerConfig(Section):
    name: str = Field("SGD", description="any class of torch.optim")
    lr: float = Field(0.1, description="base learning rate", gt=0)
    options: dict[str, Any] = Field(
        default_factory=lambda: {"momentum": 0.9},
        description="further keyword arguments of the class",
    )
    fused: Literal["auto", "off"] = Field(
        "auto",
        description="auto: steps of SGD, Adam and AdamW are made in the same pass over memory as "
        "an exchange; off: torch makes them",
    )


class ScheduleConfig(Section):
    name: Literal["constant", "cosine", "step"] = Field(
        "constant", description="learning rate as a function of GLOBAL progress"
    )
    warmup: Fraction = Field(0.0, description="share of the budget with linear warm-up")
    warmup_start_factor: Fraction = Field(0.1, description="factor at which warm-up starts")
    milestones: tuple[Fraction, ...] = Field(
        (0.5, 0.75), description="shares of the budget at which `step` multiplies by gamma"
    )
    gamma: float = Field(
        0.1, description="factor of `step` at each milestone", gt=0, allow_inf_nan=False
    )
    end_factor: Fraction = Field(0.0, description="factor at which `cosine` ends")

    @model_validator(mode="after")
    def _shares_ascend(self) -> ScheduleConfig:
        if self.warmup == 1:
            raise ValueError(
                f"warmup is a share of the budget from 0 to below 1, got {self.warmup:g}; "
                "divide a number of samples by the budget"
            )
        bounds = (0.0, *self.milestones, 1.0)
        if not all(low < high for low, high in pairwise(bounds)):
            raise ValueError(
                "milestones are shares of the budget, ascending and between 0 and 1, got "
                f"{', '.join(f'{m:g}' for m in self.milestones)}; divide epochs by their total"
            )
        if self.name == "step" and not self.milestones:
            raise ValueError("schedule step needs milestones, for example 0.5 and 0.75")
        return self


class BudgetConfig(Section):
    samples: Positive | None = Field(None, description="samples of all ranks together")
    epochs: float | None = Field(
        None, description="passes over the training data, all ranks together", gt=0
    )
    seconds: float | None = Field(None, description="wall time of training", gt=0)

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        given = [k for k in ("samples", "epochs", "seconds") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of samples, epochs, seconds, not {' and '.join(given)}")
        return self


OWN_ALGORITHMS: set[str] = set()
"""Names added to those of `algorithm.name` by `mpi_dasgd.algorithms.register`."""


def _known_algorithm(name: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return name if name in OWN_ALGORITHMS else check(name)


_ORDERS = {"atc": "adapt_then_combine", "awc": "adapt_with_combine"}


def _full_order(order: Any) -> Any:
    return _ORDERS.get(order, order) if isinstance(order, str) else order


class AlgorithmConfig(Section):
    name: Annotated[
        Literal[
            "adpsgd",
            "swarm",
            "dasgd",
            "asgd",
            "minibatch",
            "allreduce",
            "local_sgd",
            "dpsgd",
            "sgp",
            "osgp",
            "easgd",
            "alone",
        ],
        WrapValidator(_known_algorithm),
        PlainSerializer(str),
    ] = Field("adpsgd", description="training algorithm: `mpi-dasgd algorithms` lists them")
    variant: str | None = Field(
        None,
        description="adpsgd: pair, bipartite, pull; swarm: nonblocking, blocking, pull; "
        "unset: the first",
    )
    order: Annotated[
        Literal["adapt_then_combine", "adapt_with_combine"] | None, BeforeValidator(_full_order)
    ] = Field(
        None,
        description="adpsgd: apply the gradient, then average (atc), or average and apply the "
        "gradient taken before (awc); unset: adapt_then_combine for pair, else adapt_with_combine",
    )
    local_steps: Positive = Field(1, description="H: local steps between two exchanges")
    local_steps_distribution: Literal["fixed", "geometric"] = Field(
        "fixed", description="swarm: every phase has H steps, or a geometric number of mean H"
    )
    max_attempts: Positive = Field(
        4, description="adpsgd, swarm: neighbours tried for one exchange"
    )
    mixing_weight: float = Field(
        0.5, description="adpsgd, swarm: share of the distance that each side moves", gt=0, le=0.5
    )
    delay_adaptive_rule: Literal["constant", "inverse", "capped", "drop"] = Field(
        "constant",
        description="step size of a gradient older than delay_threshold: unchanged, eta / delay, "
        "min(eta, c / delay), 0",
    )
    delay_threshold: float | None = Field(
        None,
        description="tau_C: delay, in gradients, that keeps the full rate; unset: ranks, asgd: "
        "concurrency",
        ge=0,
    )
    delay_cap: float | None = Field(
        None, description="capped: c / eta, in gradients; unset: delay_threshold", gt=0
    )
    client_sampling: Literal["idle", "uniform"] = Field(
        "idle",
        description="asgd: the next model goes to an idle client (Algorithm 1), or to one drawn "
        "uniformly from all clients, busy or not (Algorithm 2)",
    )
    concurrency: Positive | None = Field(
        None, description="asgd: gradients in flight; unset: one per worker"
    )
    server_trains: bool = Field(
        False, description="asgd, minibatch, easgd: rank 0, the server, also computes gradients"
    )
    moving_rate: float | None = Field(
        None, description="easgd: alpha, the elastic weight; unset: 0.9 / workers", gt=0, le=0.5
    )
    overlap_tau: Positive | None = Field(
        None, description="osgp: steps after which a rank waits for a message; unset: never"
    )
    relay: Literal["auto", "direct", "tree"] = Field(
        "auto",
        description="dasgd: send gradients to all ranks, or along a spanning tree of the graph; "
        "auto: direct on the complete graph",
    )


class TopologyConfig(Section):
    graph: Literal[
        "ring",
        "complete",
        "exponential",
        "hypercube",
        "torus",
        "random_regular",
        "bipartite_exponential",
        "edge_list",
    ] = Field("complete", description="which ranks are neighbours")
    degree: Positive | None = Field(None, description="random_regular: neighbours of each rank")
    file: str | None = Field(None, description="edge_list: file with one `i j [weight]` per line")


def _thread_count(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or value is True or value < 1):
        raise ValueError(f"expected auto, or a number of threads, 1 or more, got {value!r}")
    return value


class CodecConfig(Section):
    name: Literal["auto", "none", "bf16", "fp16", "lattice4", "lattice8", "lattice16", "qsgd8"] = (
        Field(
            "auto",
            description="what is sent: see docs/codecs.md; none = fp32 as it is; auto: lattice8 "
            "where models are averaged in pairs, else none",
        )
    )
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic", description="lattice: at random without bias, or to nearest"
    )
    scale_margin: float | None = Field(
        None,
        description="lattice: margin of the scale over distances seen; unset: 3, lattice4: 1.5",
        gt=1,
    )
    scale_decay: float = Field(
        0.9, description="lattice: factor by which the scale falls per exchange", gt=0, lt=1
    )
    threads: Annotated[int | Literal["auto"], PlainValidator(_thread_count)] = Field(
        "auto",
        description="threads of a rank's pass over its model, at most one per 65,536 parameters; "
        "auto: as many as torch uses in that rank",
    )

    @property
    def thread_count(self) -> int:
        """The same as a number: one, where nothing says what `auto` stands for."""
        return 1 if self.threads == "auto" else self.threads


class TransportConfig(Section):
    mode: Literal["auto", "shared_memory", "rma"] = Field(
        "auto",
        description="auto: in place within a node, Get/Put between nodes; shared_memory and rma "
        "force one of them",
    )
    memory: Literal["auto", "host", "ipc"] = Field(
        "auto",
        description="memory of the payload slots: host; ipc: the GPU's, which neighbours read and "
        "write in place; auto: ipc if a probe shows that it works, else host",
    )
    ahead: int = Field(
        0,
        description="steps by which the host may be ahead of the GPU when it claims a model",
        ge=0,
    )
    publication_slots: Annotated[int, Field(ge=3, le=64)] | None = Field(
        None, description="slots of a publication; unset: 4, in memory of GPUs 6"
    )
    inbox_slots: int = Field(4, description="messages that an inbox holds", ge=1, le=64)
    progress_interval: float = Field(
        0.0003,
        description="seconds between progress calls when a neighbour is on another node",
        gt=0,
    )
    heartbeat_timeout: float = Field(
        10.0, description="seconds without a heartbeat after which a rank counts as dead", gt=0
    )
    stall_timeout: float = Field(
        600.0,
        description="seconds that a rank waits for others while none of them makes progress; then "
        "the run ends",
        gt=0,
    )

    def publication_slots_in(self, memory: str) -> int:
        """Return the slots of a publication in `memory`, which is ``host`` or ``ipc``.

        Where models are published when the GPU has passed, more of them are on their way.
        """
        return self.publication_slots or _PUBLICATION_SLOTS[memory]


class DeviceConfig(Section):
    share: bool = Field(
        False, description="allow several ranks on one GPU, where they take turns: for tests"
    )


class StragglerConfig(Section):
    distribution: Literal["none", "constant", "lognormal", "exponential", "pause"] = Field(
        "none", description="distribution of the artificial slowness"
    )
    ranks: tuple[int, ...] = Field(
        (-1,), description="constant, pause: the slow ranks; negative from the end"
    )
    factor: float = Field(
        10.0, description="constant: how many times slower", ge=1, allow_inf_nan=False
    )
    mode: Literal["sleep", "busy"] = Field(
        "sleep", description="sleep, or compute the gradient again"
    )
    sigma: float = Field(
        0.5, description="lognormal: spread of the factor", gt=0, allow_inf_nan=False
    )
    period: Positive = Field(100, description="pause: steps between two pauses")
    pause: float = Field(0.1, description="pause: seconds", ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _constant_needs_ranks(self) -> StragglerConfig:
        if self.distribution == "constant" and not self.ranks:
            raise ValueError("distribution constant needs ranks, for example -1, the last one")
        return self


class EvaluationConfig(Section):
    count: int = Field(
        10, description="evaluations, evenly over the budget; the last is at its end", ge=1
    )
    live: bool = Field(True, description="each rank also evaluates its own model during the run")


class CheckpointConfig(Section):
    count: int = Field(0, description="checkpoints, evenly over the budget; 0: none", ge=0)
    keep: int = Field(2, description="checkpoints kept", ge=2)


class SimulationConfig(Section):
    ranks: Positive = Field(16, description="virtual ranks")
    dimension: Positive = Field(32, description="quadratic: dimension")
    condition: float = Field(
        10.0, description="quadratic: largest over smallest curvature; the largest is 1", ge=1
    )
    heterogeneity: float = Field(
        0.0, description="quadratic: spread of the ranks' own minima", ge=0
    )
    noise: float = Field(
        0.0, description="quadratic: standard deviation of gradient noise per coordinate", ge=0
    )
    gradients: bool = Field(True, description="false: exchanges alone, to test conservation")
    compute_time: Literal["constant", "uniform", "lognormal", "exponential", "recorded"] = Field(
        "uniform",
        description="distribution of a step's time; uniform is 0.5 .. 1.5 of the mean; recorded: "
        "those of `recorded_run`",
    )
    recorded_run: str | None = Field(
        None, description="recorded: directory of a run, or its results.h5"
    )
    compute_mean: float = Field(
        1.0, description="mean time of a step, in units of virtual time", gt=0, allow_inf_nan=False
    )
    compute_sigma: float = Field(0.5, description="lognormal: spread", gt=0, allow_inf_nan=False)
    slow_ranks: tuple[int, ...] = Field((), description="ranks that are slow_factor times slower")
    slow_factor: float = Field(10.0, description="how many times slower", ge=1, allow_inf_nan=False)
    latency: float = Field(
        0.0, description="time of one message or word operation; 0: as within a node", ge=0
    )
    bandwidth: float = Field(0.0, description="bytes per unit of time; 0: without limit", ge=0)
    dtype: Literal["float32", "float64"] = Field("float64", description="dtype of the models")


class Config(Section):
    """All settings of a run. Load it with `mpi_dasgd.config.load`."""

    run: RunConfig = RunConfig()
    task: TaskConfig = TaskConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    budget: BudgetConfig = BudgetConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    topology: TopologyConfig = TopologyConfig()
    codec: CodecConfig = CodecConfig()
    transport: TransportConfig = TransportConfig()
    device: DeviceConfig = DeviceConfig()
    straggler: StragglerConfig = StragglerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    simulation: SimulationConfig = SimulationConfig()

    @property
    def run_directory(self) -> Path:
        """Directory to which the run writes its results."""
        return Path(self.run.directory) / self.run.name
