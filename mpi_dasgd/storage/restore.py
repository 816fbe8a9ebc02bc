"""Loads checkpoints: only data whose digests verify are used."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.checkpoint_files import (
    array_digest,
    complete_indices,
    file_digest,
    manifest_path,
    read_manifest,
)

__all__ = ["good_indices", "load"]


class _DamagedError(Exception):
    """Checkpoint that cannot be used; the message names the file and its fault."""


def load(
    directory: str | Path, rank: int, *, index: int | None = None, size: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state that `rank` saved in the newest checkpoint that verifies.

    Every byte of every rank's file is checked against its digest. When a newer checkpoint is
    damaged an older good one is taken, with a `UserWarning` that says why.

    Args:
        directory: directory of the checkpoints.
        rank: rank whose state to return.
        index: load this checkpoint and verify the file of `rank` alone: the ranks have agreed on
            the newest of the indices that `good_indices` gave to all of them.
        size: number of ranks of this run, if it must be that of the checkpoint.

    Returns:
        The arrays by name, and meta as given to `Checkpoints.save` with index, rank and size added.

    Raises:
        UserError: if there is no checkpoint, none that verifies, or one of another number of ranks.
    """
    directory = Path(directory)
    indices = complete_indices(directory) if index is None else [index]
    if not indices:
        raise UserError(
            f"{directory}: expected a checkpoint (a manifest checkpoint*.json), found none; "
            "start the run without resuming"
        )
    problems: list[str] = []
    for candidate in reversed(indices):
        try:
            files = _files(directory, candidate)
            _check_size(directory, candidate, len(files), rank, size)
            arrays, meta = _read(directory, files[rank])
            if index is None:
                for other, entry in enumerate(files):
                    if other != rank:
                        _read(directory, entry)
        except _DamagedError as problem:
            problems.append(str(problem))
            continue
        if problems:
            warnings.warn(
                f"{'; '.join(problems)}: going back to checkpoint {candidate}", stacklevel=2
            )
        return arrays, meta
    raise UserError(f"no checkpoint in {directory} can be used: {'; '.join(problems)}")


def good_indices(directory: str | Path, rank: int) -> list[int]:
    """Return the indices, ascending, of the checkpoints in which the file of `rank` verifies."""
    directory = Path(directory)
    good = []
    for index in complete_indices(directory):
        try:
            files = _files(directory, index)
            if rank < len(files):
                _read(directory, files[rank])
                good.append(index)
        except _DamagedError as problem:
            warnings.warn(f"checkpoint {index} left out: {problem}", stacklevel=2)
    return good


def _files(directory: Path, index: int) -> list[dict[str, Any]]:
    """Return the entries of a manifest, one per rank."""
    path = manifest_path(directory, index)
    try:
        files: list[dict[str, Any]] = read_manifest(directory, index)["files"]
        return files
    except FileNotFoundError:
        raise _DamagedError(f"{path} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _DamagedError(f"{path} is no complete manifest ({error})") from error


def _check_size(directory: Path, index: int, saved: int, rank: int, size: int | None) -> None:
    if size is not None and size != saved:
        raise UserError(
            f"{manifest_path(directory, index)}: expected a checkpoint of {size} ranks, found one "
            f"of {saved}; start {saved} ranks"
        )
    if rank >= saved:
        raise UserError(
            f"{manifest_path(directory, index)}: expected the state of rank {rank}, found that of "
            f"{saved} ranks; start {saved} ranks"
        )


def _read(directory: Path, entry: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the file of one rank and verify its size and all its digests."""
    path = directory / entry["name"]
    if not path.exists():
        raise _DamagedError(f"{path} is missing")
    if (found := path.stat().st_size) != entry["bytes"]:
        raise _DamagedError(f"{path} has {found} bytes, not the {entry['bytes']} of its manifest")
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            text, stated = str(file.attrs["meta_json"]), str(file.attrs["digest"])
            names: list[str] = []
            group = file["arrays"]
            group.visititems(lambda name, item: names.append(name) if _is_array(item) else None)
            arrays = {name: group[name][()] for name in names}
    except (OSError, KeyError, RuntimeError) as error:
        raise _DamagedError(f"{path} is damaged ({error})") from error
    digests = {name: array_digest(np.asarray(array)) for name, array in arrays.items()}
    if not file_digest(text, digests) == stated == entry["digest"]:
        raise _DamagedError(f"{path} is damaged (its digest is not that of its manifest)")
    meta = json.loads(text)
    if "index" not in meta:
        meta["index"] = meta.pop("step")  # its name in format version 1
    return {name: np.asarray(array) for name, array in arrays.items()}, meta


def _is_array(item: Any) -> bool:
    return isinstance(item, h5py.Dataset)
