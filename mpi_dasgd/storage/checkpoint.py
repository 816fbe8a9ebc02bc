"""Checkpoints: one HDF5 file per rank, written in the background, and a manifest of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.atomic_file import atomic
from mpi_dasgd.storage.checkpoint_files import (
    array_digest,
    complete_indices,
    file_digest,
    manifest_path,
    rank_file_path,
    rank_files,
    read_digest,
    slices,
    write_manifest,
)
from mpi_dasgd.storage.restore import good_indices, load
from mpi_dasgd.storage.schema import FORMAT, FORMAT_VERSION, LIBVER
from mpi_dasgd.storage.writer_thread import writer

__all__ = ["Checkpoints", "good_indices", "load"]

POLL_SECONDS = 0.25


class Checkpoints:
    """Saves the state of one rank without stopping its training, and without any collective call.

    Every rank writes its own file. Rank 0 writes the manifest of a checkpoint last, when the files
    of all ranks of that index exist: a checkpoint without manifest does not count, and the one
    before stays valid. Construct it on every rank before the ranks first synchronize, so that
    rank 0 has removed what a broken earlier attempt left before any rank saves.

    Args:
        directory: directory of the checkpoints, visible to all ranks.
        rank: this rank.
        size: number of ranks.
        keep: number of complete checkpoints to keep, at least 2.
        resumed: index of the checkpoint that this run resumes from; later ones are removed.

    Raises:
        UserError: if `keep` is below 2, or the directory has checkpoints but `resumed` is None.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int,
        size: int,
        keep: int = 2,
        *,
        resumed: int | None = None,
    ) -> None:
        if keep < 2:
            raise UserError(f"keep: expected at least 2 checkpoints to keep, got {keep}")
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._rank, self._size, self._keep = rank, size, keep
        self._copy: dict[str, np.ndarray] = {}
        self._writing: Future[None] | None = None
        self._pending: dict[int, int] = {}  # index -> a rank whose file was missing
        self._polling: Future[None] | None = None
        if rank == 0:
            self._remove_leftovers(resumed)
            self._polling = writer().repeat(self._poll, POLL_SECONDS)

    def save(self, index: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Copy the state and write it in the background; waits only for the write before this one.

        Args:
            index: index of the checkpoint, the same on all ranks and increasing.
            arrays: state, of any shapes and numeric dtypes; the first call allocates the copy.
            meta: remaining state, as JSON can hold it.

        Raises:
            OSError: if an earlier write failed.
        """
        self._finish_writing()
        self._snapshot(arrays)
        attributes = {**meta, "index": index, "rank": self._rank, "size": self._size}
        text = json.dumps(attributes, sort_keys=True)
        self._writing = writer().submit(lambda: self._write(index, text))

    def wait(
        self, timeout: float = 60.0, *, dead: Callable[[], Collection[int]] = frozenset
    ) -> bool:
        """Block until the last save is on disk and, on rank 0, its manifest too.

        Args:
            timeout: seconds to wait for the files of other ranks.
            dead: returns the ranks that have died so far; their files are not waited for.

        Returns:
            False if on rank 0 the files of some ranks are missing.
        """
        self._finish_writing()
        deadline = time.monotonic() + timeout
        while self._polling is not None:
            if self._polling.done():
                self._polling.result()
            writer().submit(self._poll).result()
            if not self._pending:
                break
            lost = dead()
            can_come = any(self._has_files(index, lost) for index in self._pending)
            if not can_come or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _has_files(self, index: int, ranks: Collection[int]) -> bool:
        """Return whether the files of `ranks` in a checkpoint exist."""
        return all(rank_file_path(self.directory, index, rank).exists() for rank in ranks)

    def close(
        self, timeout: float = 10.0, *, dead: Callable[[], Collection[int]] = frozenset
    ) -> bool:
        """Wait as `wait` does, then stop watching for the files of other ranks."""
        try:
            return self.wait(timeout, dead=dead)
        finally:
            if self._polling is not None:
                self._polling.cancel()

    def _finish_writing(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _snapshot(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy `arrays` to buffers that are allocated once: page faults cost more than the copy."""
        self._copy = {name: buffer for name, buffer in self._copy.items() if name in arrays}
        for name, array in arrays.items():
            buffer = self._copy.get(name)
            if buffer is None or buffer.shape != array.shape or buffer.dtype != array.dtype:
                buffer = self._copy[name] = np.empty(array.shape, array.dtype)
            np.copyto(buffer, array)

    def _write(self, index: int, meta: str) -> None:
        with (
            atomic(rank_file_path(self.directory, index, self._rank)) as temporary,
            h5py.File(temporary, "w", libver=LIBVER) as file,
        ):
            file.attrs.update(
                format=FORMAT, format_version=FORMAT_VERSION, content="checkpoint", meta_json=meta
            )
            digests = {}
            file.create_group("arrays")
            for name, array in self._copy.items():
                data = file.create_dataset(f"arrays/{name}", array.shape, array.dtype)
                # HDF5 runs one call at a time: slices let other threads read HDF5 in between.
                for part in slices(array):
                    data[part] = array[part]
                digests[name] = data.attrs["xxh3_128"] = array_digest(array)
            file.attrs["digest"] = file_digest(meta, digests)
        self._remove_own_incomplete()
        if self._rank == 0:
            self._pending[index] = 0
            # Every rank removes its files of older checkpoints that never became complete.
            for old in sorted(self._pending)[: -self._keep - 2]:
                del self._pending[old]
            self._poll()

    def _poll(self) -> bool:
        """Write the manifest of the newest complete checkpoint; older pending ones are obsolete."""
        for index in sorted(self._pending, reverse=True):
            files = [rank_file_path(self.directory, index, rank) for rank in range(self._size)]
            if not files[self._pending[index]].exists():
                continue  # one stat per poll while a rank is late, whatever the number of ranks
            late = next((rank for rank, file in enumerate(files) if not file.exists()), None)
            if late is not None:
                self._pending[index] = late
                continue
            try:
                digests = [read_digest(file) for file in files]
                write_manifest(self.directory, index, files, digests)
            except FileNotFoundError:  # removed since by a rank that is several checkpoints ahead
                continue
            self._pending = {later: rank for later, rank in self._pending.items() if later > index}
            self._remove_old()
            break
        return False

    def _remove_old(self) -> None:
        """Keep the newest complete checkpoints; a manifest goes before its files."""
        indices = complete_indices(self.directory)
        for index in indices[: -self._keep]:
            manifest_path(self.directory, index).unlink(missing_ok=True)
        oldest = indices[-self._keep :][0]
        self._remove_files(index for index, _ in rank_files(self.directory) if index < oldest)

    def _remove_own_incomplete(self) -> None:
        """Remove this rank's oldest incomplete files: a lost rank completes no checkpoint."""
        complete = set(complete_indices(self.directory))
        own = [index for index, rank in rank_files(self.directory) if rank == self._rank]
        incomplete = sorted(index for index in own if index not in complete)
        for index in incomplete[: -self._keep - 2]:
            rank_file_path(self.directory, index, self._rank).unlink(missing_ok=True)

    def _remove_leftovers(self, resumed: int | None) -> None:
        """Remove all but the complete checkpoints up to the one resumed from."""
        indices = complete_indices(self.directory)
        if indices and resumed is None:
            raise UserError(
                f"{self.directory}: expected no checkpoints, found those of an earlier run; "
                "resume it or give another directory"
            )
        complete = {index for index in indices if resumed is not None and index <= resumed}
        for index in indices:
            if index not in complete:
                manifest_path(self.directory, index).unlink()
        self._remove_files(
            index for index, _ in rank_files(self.directory) if index not in complete
        )
        for temporary in self.directory.glob("*.tmp"):
            temporary.unlink()

    def _remove_files(self, indices: Iterator[int]) -> None:
        removed = set(indices)
        for index, rank in rank_files(self.directory):
            if index in removed:
                rank_file_path(self.directory, index, rank).unlink(missing_ok=True)
