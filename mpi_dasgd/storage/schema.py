"""The tables of a run: every column's name, type, unit and meaning, declared once.

The run file of a rank, the results of all ranks and the report all read these declarations.
Fractions (accuracies) run from 0 to 1. A column's unit is "1" where it has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

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
    "OLD_RANK_COLUMNS",
    "RANKS",
    "SKIPPED",
    "TABLES",
    "UNKNOWN_AGE",
    "Column",
    "rank_column",
]

FORMAT = "mpi_dasgd"
FORMAT_VERSION = 1

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


_STEP = Column("step", "i8", "steps", "local step of this rank")
_TIME = Column("time", "f8", "s", "wall time since the start of the run")
_SAMPLES = Column("samples", "i8", "samples", "samples this rank has processed so far")
_PROGRESS = Column("progress", "i8", "samples", "samples all ranks have processed, as seen here")
_MILESTONE = Column("milestone", "i4", "1", "index of the evaluation, the same on all ranks")

# The first column of a table is its dimension scale in the run file of a rank.
TABLES: dict[str, tuple[Column, ...]] = {
    "train": (
        _STEP,
        _TIME,
        _SAMPLES,
        _PROGRESS,
        Column("loss", "f8", "1", "training loss of the step's batch"),
        Column("learning_rate", "f8", "1", "step size"),
        Column("compute_s", "f8", "s", "time in forward, backward and update"),
        Column("exchange_s", "f8", "s", "time in exchange: encode, decode, average, window calls"),
        Column("wait_s", "f8", "s", "time spent waiting for other ranks"),
        Column(
            "delay", "i8", "gradients", "gradients of other ranks since this one's model was taken"
        ),
        Column("delay_factor", "f8", "1", "what the rule for delays multiplied the step size by"),
    ),
    "exchange": (
        _STEP,
        _TIME,
        Column("partner", "i4", "1", "rank exchanged with"),
        Column(
            "kind",
            "i1",
            "1",
            "0 initiated here, 1 absorbed, 2 skipped: no partner found, 3 gradient applied here",
        ),
        Column("partner_step", "i8", "steps", "local step at which the partner sent its state"),
        Column(
            "age_steps",
            "i8",
            "steps",
            "steps by which the partner's state lagged behind (negative: ahead)",
            missing=UNKNOWN_AGE,
        ),
        Column("age_s", "f8", "s", "time since the partner sent its state"),
        Column("bytes", "i8", "bytes", "payload this rank moved in window calls"),
        Column("retries", "i4", "1", "attempts that failed before this outcome"),
        Column("distance", "f8", "1", "||x_i - x_j||_2 of the two models before their average"),
        Column("rejected", "i4", "buckets", "buckets of the partner's model not decoded"),
        Column(
            "staleness", "i8", "gradients", "|G_i ^ G_j|: gradients that one side has and not both"
        ),
    ),
    "evaluation": (
        _MILESTONE,
        _STEP,
        _TIME,
        _SAMPLES,
        _PROGRESS,
        Column("test_loss", "f8", "1", "test loss of this rank's model"),
        Column("test_accuracy", "f8", "1", "test accuracy of this rank's model"),
    ),
}

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
        "torn_reads", "i8", "1", "copies of a publication that was replaced meanwhile: made again"
    ),
    Column("claims_lost", "i8", "1", "claims that failed because another rank had the publication"),
    Column("inbox_full", "i8", "1", "sends refused because the inbox was full"),
    Column("skipped", "i8", "1", "exchanges skipped because no partner was found"),
    Column("buckets_decoded", "i8", "buckets", "buckets of partners' models decoded"),
    Column("buckets_rejected", "i8", "buckets", "buckets too far away to be decoded, left alone"),
    Column("buckets_corrupt", "i8", "buckets", "buckets of deltas that failed their check"),
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
    _MILESTONE,
    Column("progress", "i8", "samples", "samples all ranks had processed"),
    Column("samples", "i8", "samples", "samples processed, summed over the ranks"),
    Column("time", "f8", "s", "wall time since the start of the run, latest rank"),
    Column("mean_test_loss", "f8", "1", "test loss of the mean of all models"),
    Column("mean_test_accuracy", "f8", "1", "test accuracy of the mean of all models"),
    Column("worst_test_accuracy", "f8", "1", "lowest test accuracy of any rank's model"),
    Column("best_test_accuracy", "f8", "1", "highest test accuracy of any rank's model"),
    Column("consensus_distance", "f8", "1", "mean over ranks of ||x_i - mean||^2"),
    Column("consensus_relative", "f8", "1", "consensus distance / ||mean||^2"),
)


OLD_RANK_COLUMNS = {f"delay_{name}": f"server_delay_{name}" for name in ("mean", "average", "max")}
"""Names that columns of /ranks had in older files, and their names now."""


def rank_column(name: str, values: Iterable[float]) -> Column:
    """Return the column of a counter in /ranks, declared above or derived from its name."""
    for column in RANKS:
        if column.name == name:
            return column
    dtype = "i8" if all(isinstance(value, int) for value in values) else "f8"
    unit = "s" if name.endswith("_s") else "bytes" if "bytes" in name else "1"
    return Column(name, dtype, unit, name.replace("_", " "))
