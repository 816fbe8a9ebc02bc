"""Tables of a run: name, type, unit and meaning of every column, declared once.

The run file of a rank, the results of all ranks and the report all read these declarations.
Fractions (accuracies) run from 0 to 1. A column's unit is "1" where it has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np

__all__ = [
    "ABSORBED",
    "APPLIED",
    "CONSENSUS",
    "FORMAT",
    "FORMAT_VERSION",
    "INITIATED",
    "KINDS",
    "LIBVER",
    "RANKS",
    "ROWS",
    "SKIPPED",
    "TABLES",
    "UNKNOWN_AGE",
    "Column",
    "EvaluationRow",
    "ExchangeRow",
    "Row",
    "TrainRow",
    "rank_column",
]

FORMAT = "mpi_dasgd"
FORMAT_VERSION = 2

# 'latest' would write HDF5 2.0 files, which the h5dump of current distributions cannot read.
LIBVER = ("v110", "v110")

INITIATED, ABSORBED, SKIPPED, APPLIED = 0, 1, 2, 3
KINDS = ("initiated", "absorbed", "skipped", "applied")

# An age is signed (a partner may be ahead), so -1 cannot mean "none".
UNKNOWN_AGE = int(np.iinfo(np.int64).min)


class Column(NamedTuple):
    """One variable of a table."""

    name: str
    dtype: str
    unit: str
    long_name: str
    missing: int = -1

    @property
    def fill(self) -> float | int | str:
        """Value that stands for "no value": NaN, the integer `missing`, or an empty string."""
        if self.dtype == "str":
            return ""
        return self.missing if self.dtype.startswith("i") else float("nan")


class Unit(NamedTuple):
    """Type, unit and meaning of a column, as the annotation of a row's field."""

    dtype: str
    unit: str
    long_name: str
    missing: int = -1


_STEP = Unit("i8", "steps", "local step of this rank")
_TIME = Unit("f8", "s", "wall time since the start of the run")
_SAMPLES = Unit("i8", "samples", "samples this rank has processed so far")
_TOTAL_SAMPLES = Unit("i8", "samples", "samples all ranks have processed, as seen here")
_MILESTONE = Unit("i4", "1", "index of the evaluation, the same on all ranks")


# Keywords only: values of the same type that are exchanged would be written unnoticed.
@dataclass(slots=True, kw_only=True)
class TrainRow:
    """One local step of a rank."""

    step: Annotated[int, _STEP]
    time_s: Annotated[float, _TIME]
    samples: Annotated[int, _SAMPLES]
    total_samples: Annotated[int, _TOTAL_SAMPLES]
    loss: Annotated[float, Unit("f8", "1", "training loss of the step's batch")]
    learning_rate: Annotated[float, Unit("f8", "1", "step size")]
    compute_s: Annotated[
        float, Unit("f8", "s", "time in forward, backward, and an update of its own")
    ]
    exchange_s: Annotated[
        float,
        Unit(
            "f8",
            "s",
            "time in exchange: encode, decode, average, window calls, and the update that is made "
            "in the same pass",
        ),
    ]
    wait_s: Annotated[float, Unit("f8", "s", "time spent waiting for other ranks")]
    delay: Annotated[
        int, Unit("i8", "gradients", "gradients of other ranks since this one's model was taken")
    ]
    delay_factor: Annotated[
        float, Unit("f8", "1", "factor of the delay-adaptive rule on the step size")
    ]


@dataclass(slots=True, kw_only=True)
class ExchangeRow:
    """One exchange of a rank with a partner, or one that was skipped."""

    step: Annotated[int, _STEP]
    time_s: Annotated[float, _TIME]
    partner: Annotated[int, Unit("i4", "1", "rank exchanged with")]
    kind: Annotated[
        int,
        Unit(
            "i1",
            "1",
            "0 initiated here, 1 absorbed, 2 skipped: no partner found, 3 gradient applied here",
        ),
    ]
    partner_step: Annotated[
        int, Unit("i8", "steps", "local step at which the partner sent its state")
    ]
    age_steps: Annotated[
        int,
        Unit(
            "i8",
            "steps",
            "steps by which the partner's state lagged behind (negative: ahead)",
            missing=UNKNOWN_AGE,
        ),
    ]
    age_s: Annotated[float, Unit("f8", "s", "time since the partner sent its state")]
    bytes: Annotated[int, Unit("i8", "bytes", "payload this rank moved in window calls")]
    retries: Annotated[int, Unit("i4", "1", "attempts that failed before this outcome")]
    distance: Annotated[
        float, Unit("f8", "1", "||x_i - x_j||_2 of the two models before their average")
    ]
    rejected: Annotated[int, Unit("i4", "buckets", "buckets of the partner's model not decoded")]
    set_staleness: Annotated[
        int, Unit("i8", "gradients", "|G_i ^ G_j|: gradients that one side has and not both")
    ]


@dataclass(slots=True, kw_only=True)
class EvaluationRow:
    """One evaluation of a rank's own model."""

    milestone: Annotated[int, _MILESTONE]
    step: Annotated[int, _STEP]
    time_s: Annotated[float, _TIME]
    samples: Annotated[int, _SAMPLES]
    total_samples: Annotated[int, _TOTAL_SAMPLES]
    test_loss: Annotated[float, Unit("f8", "1", "test loss of this rank's model")]
    test_accuracy: Annotated[float, Unit("f8", "1", "test accuracy of this rank's model")]


Row = TrainRow | ExchangeRow | EvaluationRow
ROWS: dict[str, type[Row]] = {
    "train": TrainRow,
    "exchange": ExchangeRow,
    "evaluation": EvaluationRow,
}


def _columns(row: type[Row]) -> tuple[Column, ...]:
    """Return the columns of a table from the annotations of its row."""
    hints = get_type_hints(row, include_extras=True)
    return tuple(Column(name, *hint.__metadata__[0]) for name, hint in hints.items())


# The first column of a table is its dimension scale in the run file of a rank.
TABLES: dict[str, tuple[Column, ...]] = {table: _columns(row) for table, row in ROWS.items()}

# One row per rank. Counters of other names are added by `rank_column`.
RANKS: tuple[Column, ...] = (
    Column("steps", "i8", "steps", "local steps"),
    Column("samples", "i8", "samples", "samples processed"),
    Column("wall_s", "f8", "s", "wall time of the training"),
    Column("samples_per_s", "f8", "samples/s", "samples processed per second of wall time"),
    Column("host", "str", "1", "host name"),
    Column("device", "str", "1", "device the rank computed on"),
    Column("status", "str", "1", "how the rank ended"),
    Column("local_rank", "i4", "1", "index of the rank on its host"),
    Column("messages", "i8", "1", "messages sent"),
    Column("bytes_sent", "i8", "bytes", "payload written to other ranks"),
    Column("bytes_received", "i8", "bytes", "payload read from other ranks"),
    Column(
        "torn_reads",
        "i8",
        "1",
        "copies of a publication that was replaced meanwhile, and copied again",
    ),
    Column("claims_lost", "i8", "1", "claims lost to another rank that held the publication"),
    Column("inbox_full", "i8", "1", "sends refused because the inbox was full"),
    Column("skipped", "i8", "1", "exchanges skipped because no partner was found"),
    Column("buckets_decoded", "i8", "buckets", "buckets of partners' models decoded"),
    Column(
        "buckets_rejected", "i8", "buckets", "buckets too far away to be decoded, left unchanged"
    ),
    Column("buckets_corrupt", "i8", "buckets", "buckets of deltas that failed their checksum"),
    Column("applied", "i8", "gradients", "gradients that the server applied"),
    Column(
        "server_delay_mean",
        "f8",
        "gradients",
        "mean delay of the gradients that the server applied",
    ),
    Column(
        "server_delay_average", "f8", "gradients", "tau_avg: the same, those in flight included"
    ),
    Column("server_delay_max", "i8", "gradients", "tau_max: the largest of these delays"),
    Column("delayed_fraction", "f8", "1", "share of applied gradients with a delay above tau_C"),
    Column("concurrency", "f8", "gradients", "mean number of gradients in flight"),
    Column("concurrency_max", "i8", "gradients", "tau_C: the largest number in flight"),
)

# One row per milestone, measured over all ranks at the same index.
CONSENSUS: tuple[Column, ...] = (
    Column("milestone", *_MILESTONE),
    Column("total_samples", "i8", "samples", "samples all ranks had processed"),
    Column("samples", "i8", "samples", "samples processed, summed over the ranks"),
    Column("time_s", "f8", "s", "wall time since the start of the run, latest rank"),
    Column("mean_test_loss", "f8", "1", "test loss of the mean of all models"),
    Column("mean_test_accuracy", "f8", "1", "test accuracy of the mean of all models"),
    Column("worst_test_accuracy", "f8", "1", "lowest test accuracy of any rank's model"),
    Column("best_test_accuracy", "f8", "1", "highest test accuracy of any rank's model"),
    Column("consensus_distance", "f8", "1", "mean over ranks of ||x_i - mean||^2"),
    Column("consensus_relative", "f8", "1", "consensus distance / ||mean||^2"),
)


def rank_column(name: str, values: Iterable[float]) -> Column:
    """Return the column of a counter in /ranks, declared above or derived from its name."""
    for column in RANKS:
        if column.name == name:
            return column
    dtype = "i8" if all(isinstance(value, int) for value in values) else "f8"
    unit = "s" if name.endswith("_s") else "bytes" if "bytes" in name else "1"
    return Column(name, dtype, unit, name.replace("_", " "))
