"""The files of a checkpoint: their names, their digests, and the manifest that lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from mpi_dasgd.storage.atomic_file import atomic
from mpi_dasgd.storage.old_names import check_version
from mpi_dasgd.storage.schema import FORMAT, FORMAT_VERSION

__all__ = [
    "array_digest",
    "complete_indices",
    "file_digest",
    "manifest_path",
    "rank_file_path",
    "rank_files",
    "read_digest",
    "read_manifest",
    "slices",
    "write_manifest",
]

SLICE_BYTES = 4 << 20


def rank_file_path(directory: Path, index: int, rank: int) -> Path:
    """Return the path of the file of `rank` in checkpoint `index`."""
    return _path(directory, index, f".rank{rank:05d}.h5")


def manifest_path(directory: Path, index: int) -> Path:
    """Return the path of the manifest of checkpoint `index`."""
    return _path(directory, index, ".json")


def _path(directory: Path, index: int, suffix: str) -> Path:
    """Return the path of a file of checkpoint `index`; one of format version 1 is found."""
    path, old = (directory / f"{name}{index:08d}{suffix}" for name in ("checkpoint", "step"))
    return old if not path.exists() and old.exists() else path


def complete_indices(directory: Path) -> list[int]:
    """Return the indices of all manifests, ascending."""
    pattern = re.compile(r"(?:checkpoint|step)(\d+)\.json")
    names = (pattern.fullmatch(path.name) for path in directory.glob("*.json"))
    return sorted(int(name[1]) for name in names if name)


def rank_files(directory: Path) -> list[tuple[int, int]]:
    """Return (index, rank) of every rank's file, with or without manifest."""
    pattern = re.compile(r"(?:checkpoint|step)(\d+)\.rank(\d+)\.h5")
    names = (pattern.fullmatch(path.name) for path in directory.glob("*.rank*.h5"))
    return sorted((int(name[1]), int(name[2])) for name in names if name)


def slices(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Yield indices along the first axis, each of about 4 MiB; for a scalar the one empty index."""
    if array.ndim == 0:
        yield ()
    elif array.size:
        rows = max(1, SLICE_BYTES * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            yield (slice(start, start + rows),)


def array_digest(array: np.ndarray) -> str:
    """Return the xxh3_128 of the bytes of `array` in C order, as 32 hexadecimal digits."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = xxhash.xxh3_128()
    # In slices, so that the training thread gets the interpreter in between.
    for start in range(0, data.size, SLICE_BYTES):
        digest.update(memoryview(data[start : start + SLICE_BYTES]))
    return digest.hexdigest()


def file_digest(meta: str, digests: Mapping[str, str]) -> str:
    """Return the digest of a rank's file, from its meta text and the digests of its arrays."""
    return xxhash.xxh3_128_hexdigest(json.dumps([meta, sorted(digests.items())]).encode())


def read_digest(path: Path) -> str:
    """Read the digest that is stored in a rank's file."""
    with h5py.File(path, "r", locking="best-effort") as file:
        return str(file.attrs["digest"])


def write_manifest(
    directory: Path, index: int, files: Sequence[Path], digests: Sequence[str]
) -> None:
    """Write the manifest of checkpoint `index`: names, sizes and digests, by rank."""
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "index": index,
        "size": len(files),
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "digest": digest}
            for path, digest in zip(files, digests, strict=True)
        ],
    }
    with atomic(manifest_path(directory, index)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(directory: Path, index: int) -> dict[str, Any]:
    """Return the manifest of checkpoint `index`.

    Raises:
        ValueError: if it is no complete manifest.
        UserError: if a newer mpi_dasgd has written it.
    """
    manifest: dict[str, Any] = json.loads(manifest_path(directory, index).read_text())
    if manifest.get("format") != FORMAT or len(manifest["files"]) != manifest["size"]:
        raise ValueError("not a manifest of mpi_dasgd")
    check_version(manifest_path(directory, index), manifest)
    return manifest
