"""Run file: the record that a rank writes while it runs, readable live and after a kill."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.old_names import check_version, stored_name
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.storage.schema import FORMAT, FORMAT_VERSION, KINDS, LIBVER, ROWS, TABLES, Row
from mpi_dasgd.storage.writer_thread import writer

__all__ = ["RankRecord", "RunFile", "rank_path", "read_run_file"]

FLUSH_SECONDS = 2.0

# A chunk of 511 8-byte values and its checksum fit into one page: no kill can tear its rewriting.
PAGE = 4096
CHUNK_ROWS = 511
STATE_BYTES = PAGE - 8

_TABLE_OF = {row: table for table, row in ROWS.items()}


def rank_path(directory: Path, rank: int) -> Path:
    """Return the path of the run file of `rank`."""
    return directory / "ranks" / f"rank{rank:05d}.h5"


class RunFile:
    """Run file of one rank: the tables of `schema.TABLES` in HDF5, readable live (SWMR).

    Rows go through rings in memory; a background thread writes them every two seconds. A kill loses
    the rows since then and nothing else: ``h5py.File(path, swmr=True)`` reads it.

    Args:
        path: file to create, by convention ``rank_path(directory, rank)``.
        rank: this rank.
        size: number of ranks of the run.
        attributes: root attributes: config_json, algorithm, codec, seed, task, provenance, ...
        exchanges: ring of the exchanges; None: a new one.

    Raises:
        UserError: if the file exists; a record is never overwritten.

    Attributes:
        rings: rows of each table that are not written yet, by its name; `RecordRing.append` is the
            fast way to add one.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rank: int,
        size: int,
        attributes: Mapping[str, Any],
        exchanges: RecordRing | None = None,
    ) -> None:
        self.path = Path(path)
        self.rings = {table: RecordRing(table) for table in TABLES if table != "exchange"}
        self.rings["exchange"] = exchanges or RecordRing("exchange")
        self._closed = False
        self._written_states = 0
        if self.path.exists():
            raise UserError(
                f"{self.path}: expected no file, found the record of an earlier run, which is "
                "never overwritten; give another run directory or remove it"
            )
        root_attributes = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "content": "rank",
            **attributes,
            "rank": rank,
            "size": size,
        }
        writer().submit(lambda: self._create(root_attributes)).result()
        self._repeated = writer().repeat(self._drain, FLUSH_SECONDS)

    def append(self, row: Row) -> None:
        """Add a row to the table of its class.

        Raises:
            struct.error: a value of it is not of the type of its column.
        """
        table = _TABLE_OF[type(row)]
        self.rings[table].append(*(getattr(row, column.name) for column in TABLES[table]))

    def flush(self, counters: Mapping[str, float | np.number[Any]] | None = None) -> None:
        """Hand all rows, and the counters so far, to the operating system, and wait for that.

        What was flushed survives the death of the process, not that of the machine.
        """

        def write() -> None:
            self._drain()
            if counters is not None:
                self._write_state("running", counters)

        self._raise_earlier_error()
        writer().submit(write).result()

    def close(self, status: str, counters: Mapping[str, float | np.number[Any]]) -> None:
        """Write the remaining rows, the final status and counters; later calls do nothing.

        Args:
            status: finished, failed, killed, ...
            counters: totals of the run, such as messages and bytes_sent.
        """
        if self._closed:
            return
        self._closed = True

        def write() -> None:
            try:
                self._drain()
                self._write_state(status, counters)
            finally:
                self._file.close()

        ended = not self._repeated.cancel()
        writer().submit(write).result()
        if ended:
            self._repeated.result()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close("finished" if exc_value is None else "failed", {})

    def _raise_earlier_error(self) -> None:
        if self._repeated.done():
            self._repeated.result()

    def _create(self, attributes: Mapping[str, Any]) -> None:
        """Create every object (SWMR allows none later), and only then give the file its name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        file = h5py.File(
            temporary, "w", libver=LIBVER, alignment_threshold=512, alignment_interval=PAGE
        )
        for table, columns in TABLES.items():
            group = file.create_group(table)
            for column in columns:
                data = group.create_dataset(
                    column.name,
                    shape=(0,),
                    maxshape=(None,),
                    dtype=column.dtype,
                    chunks=(CHUNK_ROWS,),
                    fletcher32=True,
                    fillvalue=column.fill,
                )
                data.attrs["units"] = column.unit
                data.attrs["long_name"] = column.long_name
                if column is columns[0]:
                    data.make_scale(column.name)
                else:
                    data.dims[0].attach_scale(group[columns[0].name])
        kind = file["exchange/kind"]
        kind.attrs["flag_values"] = np.arange(len(KINDS), dtype="i1")
        kind.attrs["flag_meanings"] = " ".join(KINDS)
        # Two slots written in turn: a reader always finds one of them whole.
        state = file.create_dataset(
            "state", (2,), dtype=f"S{STATE_BYTES}", chunks=(1,), fletcher32=True
        )
        state.attrs["long_name"] = "JSON: status and counters; the highest sequence counts"
        file.create_dataset("slot", data=np.arange(2, dtype="i1")).make_scale("slot")
        state.dims[0].attach_scale(file["slot"])
        file.attrs.update(attributes)
        file.swmr_mode = True
        self._file = file
        self._write_state("running", {})
        temporary.replace(self.path)

    def _drain(self) -> bool:
        """Write the pending rows; return False: the writer calls it again and again."""
        for table, columns in TABLES.items():
            block = self.rings[table].take()
            if not len(block):
                continue
            group = self._file[table]
            start = group[columns[0].name].shape[0]
            for column in columns:
                data = group[column.name]
                data.resize((start + len(block),))
                data[start:] = block[column.name]
        self._file.flush()
        return False

    def _write_state(self, status: str, counters: Mapping[str, float | np.number[Any]]) -> None:
        plain = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in counters.items()
        }
        state = {"sequence": self._written_states, "status": status, "counters": plain}
        text = json.dumps(state).encode()
        if len(text) > STATE_BYTES:
            raise ValueError(f"counters take {len(text)} bytes as JSON, at most {STATE_BYTES} fit")
        self._file["state"][self._written_states % 2] = text
        self._file.flush()
        self._written_states += 1


class RankRecord(NamedTuple):
    """Contents of a run file: attributes, columns by table (1-D arrays), status, counters."""

    attributes: dict[str, Any]
    tables: dict[str, dict[str, np.ndarray]]
    status: str
    counters: dict[str, float]


def read_run_file(path: str | Path) -> RankRecord:
    """Read the run file of a rank that runs, has ended, or was killed; verify every checksum.

    The status is "running" unless the rank closed its file, which a killed rank never does.

    Raises:
        UserError: if the file is missing, damaged, not a run file, or of a newer format version.
    """
    path = Path(path)
    for attempt in range(5):
        try:
            with h5py.File(path, "r", swmr=_is_open(path), locking="best-effort") as file:
                return _read(file, path)
        except FileNotFoundError:
            raise UserError(f"{path}: expected the run file of a rank, found no file") from None
        except (OSError, KeyError, RuntimeError) as error:
            if attempt == 4:
                raise UserError(
                    f"{path}: expected the run file of a rank, found a damaged file ({error})"
                ) from error
            time.sleep(0.05)  # a live rank may have been rewriting the chunk just read
    raise AssertionError("unreachable")


def _is_open(path: Path) -> bool:
    """Return whether a writer has the file open, or was killed; refuse a truncated file.

    HDF5 would retry endlessly on a truncated file, which it takes for one being written.

    Raises:
        OSError: if the file is shorter than its superblock (version 3) says.
    """
    with path.open("rb") as file:
        superblock = file.read(48)
    if len(superblock) < 48 or superblock[:9] != b"\x89HDF\r\n\x1a\n\x03":
        return False
    consistency_flags, (end,) = superblock[11], struct.unpack_from("<Q", superblock, 28)
    if (size := path.stat().st_size) < end:
        raise OSError(f"it has {size} of {end} bytes")
    return bool(consistency_flags & 1)


def _read(file: h5py.File, path: Path) -> RankRecord:
    attributes = {name: plain(value) for name, value in file.attrs.items()}
    if attributes.get("format") != FORMAT or attributes.get("content") != "rank":
        raise UserError(f"{path}: expected the run file of a rank, found another HDF5 file")
    check_version(path, attributes)
    # Before the rows: a rank that has ended by now has written all of them.
    states = [state for slot in range(2) if (state := _state(file["state"], slot))]
    newest = max(states, key=lambda state: state["sequence"])
    tables = {}
    for table, columns in TABLES.items():
        group = file[table]
        # A kill between two columns leaves the first ones longer.
        data = {column.name: group[stored_name(column.name, group)] for column in columns}
        rows = min(column.shape[0] for column in data.values())
        tables[table] = {name: column[:rows] for name, column in data.items()}
    return RankRecord(attributes, tables, newest["status"], newest["counters"])


def _state(data: h5py.Dataset, slot: int) -> dict[str, Any] | None:
    """Return one of the two states, or None if it was never written or is being written."""
    try:
        state: dict[str, Any] = json.loads(data[slot])
        return state
    except (OSError, ValueError):
        return None


def plain(value: Any) -> Any:
    """Return an HDF5 attribute as a Python value (arrays stay arrays)."""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
