"""Results of all ranks in one HDF5 file that xarray opens: the copy of record of a run."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.atomic_file import atomic
from mpi_dasgd.storage.old_names import RANK_COLUMNS
from mpi_dasgd.storage.runfile import RankRecord, rank_path, read_run_file
from mpi_dasgd.storage.schema import (
    CONSENSUS,
    FORMAT,
    FORMAT_VERSION,
    LIBVER,
    RANKS,
    TABLES,
    Column,
    rank_column,
)

__all__ = ["Results", "consolidate", "gather", "results_path"]

# These differ between ranks: they are columns of /ranks, not attributes of the run.
RANK_ATTRIBUTES = ("rank", "local_rank", "host", "device")
OWN_ATTRIBUTES = ("format", "format_version", "content", "size", *RANK_ATTRIBUTES)


def results_path(directory: Path) -> Path:
    """Return the path of the results of a run directory."""
    return directory / "results.h5"


@dataclass(frozen=True)
class Results:
    """Records of all ranks of a run.

    Attributes:
        attributes: attributes of the run; `world_size` is the number of ranks started.
        rank: rank of each row, (rows,) int32; lost ranks have no row.
        n_records: number of valid records of each row, by table, (rows,) int64.
        tables: columns by table, (rows, record), padded with the column's fill.
        rank_table: columns of /ranks, one value per rank, (rows,).
        consensus: columns of /consensus, one value per milestone; empty if not measured.
        lost: reason why a rank's file could not be read, by rank.
    """

    attributes: dict[str, Any]
    rank: np.ndarray
    n_records: dict[str, np.ndarray]
    tables: dict[str, dict[str, np.ndarray]]
    rank_table: dict[str, np.ndarray]
    consensus: dict[str, np.ndarray] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)


def consolidate(
    directory: str | Path,
    consensus: Mapping[str, np.ndarray] | None = None,
    *,
    timeout: float = 0.0,
    dead: Collection[int] = (),
) -> Path:
    """Write results.h5 of a run directory from the run files of its ranks.

    A rank that has not closed its file counts as killed; one whose file is missing or damaged is
    listed in the attribute `ranks_lost` and has no rows.

    Args:
        directory: the run directory, with ranks/rank00000.h5 and so on.
        consensus: columns of `schema.CONSENSUS`, each (milestone,), measured by the caller.
        timeout: seconds to wait for ranks that have not closed their files yet.
        dead: ranks that will never close theirs; they are not waited for.

    Returns:
        The path of results.h5.

    Raises:
        UserError: if no run file can be read, or they belong to different runs.
        ValueError: if `consensus` has an unknown column or columns of different lengths.
    """
    directory = Path(directory)
    deadline = time.monotonic() + timeout
    results = gather(directory)
    while not _all_closed(results, dead) and time.monotonic() < deadline:
        time.sleep(0.1)
        results = gather(directory)
    status = results.rank_table["status"]
    status[status == "running"] = "killed"
    results.attributes["status"] = _run_status(status, bool(results.lost))
    results.consensus.update(_checked_consensus(consensus or {}))
    path = results_path(directory)
    with atomic(path) as temporary:
        _write(results, temporary)
    return path


def gather(directory: str | Path) -> Results:
    """Read the run files of a run directory, of a run that is live, has ended or was killed.

    Raises:
        UserError: if no run file can be read, or they belong to different runs.
    """
    directory = Path(directory)
    folder = rank_path(directory, 0).parent
    paths = sorted(folder.glob("rank*.h5"))
    if not paths:
        raise UserError(f"{directory}: expected a run directory, found no run file ranks/rank*.h5")
    read: dict[Path, RankRecord] = {}
    damaged: dict[Path, str] = {}
    for path in paths:
        try:
            read[path] = read_run_file(path)
        except UserError as error:
            damaged[path] = str(error)
    if not read:
        raise UserError(f"{directory}: no run file can be read: {next(iter(damaged.values()))}")
    sizes = {record.attributes["size"] for record in read.values()}
    if len(sizes) > 1:
        raise UserError(
            f"{folder}: expected the run files of one run, found files of runs with "
            f"{sorted(sizes)} ranks; separate them"
        )
    size = sizes.pop()
    records = {record.attributes["rank"]: record for record in read.values()}
    lost = {
        rank: damaged.get(rank_path(directory, rank), f"{rank_path(directory, rank)} is missing")
        for rank in range(size)
        if rank not in records
    }
    ordered = [records[rank] for rank in sorted(records)]
    return Results(
        attributes=_run_attributes(ordered, size, bool(lost)),
        rank=np.array(sorted(records), dtype=np.int32),
        n_records={
            table: np.array([len(record.tables[table][columns[0].name]) for record in ordered])
            for table, columns in TABLES.items()
        },
        tables={
            table: {
                column.name: _pad([record.tables[table][column.name] for record in ordered], column)
                for column in columns
            }
            for table, columns in TABLES.items()
        },
        rank_table=_rank_table(ordered),
        lost=lost,
    )


def _all_closed(results: Results, dead: Collection[int]) -> bool:
    """Return whether all ranks but the dead have closed their files."""
    open_ones = results.rank[results.rank_table["status"] == "running"].tolist()
    return not {*results.lost, *open_ones}.difference(dead)


def _run_status(status: np.ndarray, lost: bool) -> str:
    """Return finished, failed, degraded (ranks lost, the others finished), killed or running."""
    statuses = set(status.tolist())
    for word in ("failed", "running"):
        if word in statuses:
            return word
    if statuses == {"finished"}:
        return "degraded" if lost else "finished"
    return "degraded" if "finished" in statuses else "killed"


def _run_attributes(records: Sequence[RankRecord], size: int, lost: bool) -> dict[str, Any]:
    """Return the attributes of the run: those of its first rank that all ranks share."""
    kept = {k: v for k, v in records[0].attributes.items() if k not in OWN_ATTRIBUTES}
    status = _run_status(np.array([record.status for record in records]), lost)
    return {**kept, "world_size": size, "status": status}


def _pad(columns: Sequence[np.ndarray], column: Column) -> np.ndarray:
    """Stack columns of different lengths to (ranks, records), padded with the fill value."""
    padded = np.full((len(columns), max(map(len, columns))), column.fill, dtype=column.dtype)
    for row, values in zip(padded, columns, strict=True):
        row[: len(values)] = values
    return padded


def _rank_table(records: Sequence[RankRecord]) -> dict[str, np.ndarray]:
    """Return one row per rank: totals of its training, host and device, status, counters."""
    rows = []
    for record in records:
        train = record.tables["train"]
        row: dict[str, Any] = {
            "steps": int(train["step"][-1]) if len(train["step"]) else 0,
            "samples": int(train["samples"][-1]) if len(train["samples"]) else 0,
            "wall_s": float(train["time_s"][-1]) if len(train["time_s"]) else 0.0,
        }
        row |= {k: record.attributes[k] for k in RANK_ATTRIBUTES[1:] if k in record.attributes}
        row |= {"status": record.status}
        row |= {RANK_COLUMNS.get(k, k): value for k, value in record.counters.items()}
        if row["wall_s"] > 0:
            row.setdefault("samples_per_s", row["samples"] / row["wall_s"])
        rows.append(row)
    present = dict.fromkeys(name for row in rows for name in row)
    declared = [column.name for column in RANKS]
    names = [name for name in declared if name in present]
    names += [name for name in present if name not in declared]
    table = {}
    for name in names:
        column = rank_column(name, [row[name] for row in rows if name in row])
        dtype = object if column.dtype == "str" else column.dtype
        table[name] = np.array([row.get(name, column.fill) for row in rows], dtype=dtype)
    return table


def _checked_consensus(consensus: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not consensus:
        return {}
    columns = {column.name: column for column in CONSENSUS}
    if unknown := set(consensus) - set(columns):
        raise ValueError(f"consensus has unknown columns {sorted(unknown)}; known: {list(columns)}")
    arrays = {
        name: np.asarray(consensus[name], columns[name].dtype)
        for name in columns
        if name in consensus
    }
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"consensus has columns of different lengths: {lengths}")
    milestones = np.arange(next(iter(lengths.values())), dtype=columns["milestone"].dtype)
    return {"milestone": milestones, **arrays}


def _write(results: Results, path: Path) -> None:
    """Write /train, /exchange and /evaluation (rank, record), /ranks (rank), /consensus."""
    with h5py.File(path, "w", libver=LIBVER) as file:
        file.attrs.update(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "content": "results",
                **results.attributes,
                "ranks_lost": np.array(sorted(results.lost), dtype=np.int32),
                "ranks_lost_reason": "; ".join(results.lost[rank] for rank in sorted(results.lost)),
            }
        )
        rank = Column("rank", "i4", "1", "rank")
        for table, columns in TABLES.items():
            group = file.create_group(table)
            arrays = results.tables[table]
            record = np.arange(arrays[columns[0].name].shape[1])
            scales = [
                _scale(group, rank, results.rank),
                _scale(group, Column("record", "i8", "1", "index of the record"), record),
            ]
            valid = Column("records", "i8", "1", "valid records of the rank")
            _variable(group, valid, results.n_records[table], scales[:1])
            for column in columns:
                _variable(group, column, arrays[column.name], scales)
        group = file.create_group("ranks")
        scale = _scale(group, rank, results.rank)
        for name, values in results.rank_table.items():
            _variable(group, rank_column(name, values.tolist()), values, [scale])
        if results.consensus:
            group = file.create_group("consensus")
            scale = _scale(group, CONSENSUS[0], results.consensus["milestone"])
            for column in CONSENSUS[1:]:
                if column.name in results.consensus:
                    _variable(group, column, results.consensus[column.name], [scale])


def _scale(group: h5py.Group, column: Column, values: np.ndarray) -> h5py.Dataset:
    data = group.create_dataset(column.name, data=values.astype(column.dtype))
    data.attrs.update(units=column.unit, long_name=column.long_name)
    data.make_scale(column.name)
    return data


def _variable(
    group: h5py.Group, column: Column, values: np.ndarray, scales: Sequence[h5py.Dataset]
) -> None:
    if column.dtype == "str":
        data = group.create_dataset(column.name, data=values, dtype=h5py.string_dtype())
    else:
        # netCDF readers such as xarray mask the fill value, so no mean counts the padding.
        filters: dict[str, Any] = (
            {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
            if values.ndim == 2 and values.size
            else {}
        )
        data = group.create_dataset(column.name, data=values, dtype=column.dtype, **filters)
        data.attrs["_FillValue"] = np.array(column.fill, dtype=column.dtype)[()]
        data.attrs["units"] = column.unit
    data.attrs["long_name"] = column.long_name
    for dimension, scale in enumerate(scales):
        data.dims[dimension].attach_scale(scale)
