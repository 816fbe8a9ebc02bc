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
from mpi_dasgd.storage.schema import FORMAT, FORMAT_VERSION

__all__ = [
    "array_digest",
    "file_digest",
    "manifest_path",
    "rank_file_path",
    "rank_files",
    "read_digest",
    "read_manifest",
    "slices",
    "steps_with_manifest",
    "write_manifest",
]

SLICE_BYTES = 4 << 20


def rank_file_path(directory: Path, step: int, rank: int) -> Path:
    """Return the path of the file of `rank` in checkpoint `step`."""
    return directory / f"step{step:08d}.rank{rank:05d}.h5"


def manifest_path(directory: Path, step: int) -> Path:
    """Return the path of the manifest of checkpoint `step`."""
    return directory / f"step{step:08d}.json"


def steps_with_manifest(directory: Path) -> list[int]:
    """Return the steps of all manifests, ascending."""
    names = (re.fullmatch(r"step(\d+)\.json", path.name) for path in directory.glob("step*.json"))
    return sorted(int(name[1]) for name in names if name)


def rank_files(directory: Path) -> list[tuple[int, int]]:
    """Return (step, rank) of every rank's file, with or without manifest."""
    pattern = re.compile(r"step(\d+)\.rank(\d+)\.h5")
    names = (pattern.fullmatch(path.name) for path in directory.glob("step*.rank*.h5"))
    return sorted((int(name[1]), int(name[2])) for name in names if name)


def slices(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Yield indices along the first axis, each of about 4 MiB; of a scalar the one empty index."""
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
    """Return the digest of a rank's file: of its meta text and the digests of its arrays."""
    return xxhash.xxh3_128_hexdigest(json.dumps([meta, sorted(digests.items())]).encode())


def read_digest(path: Path) -> str:
    """Return the digest that a rank's file states."""
    with h5py.File(path, "r", locking="best-effort") as file:
        return str(file.attrs["digest"])


def write_manifest(
    directory: Path, step: int, files: Sequence[Path], digests: Sequence[str]
) -> None:
    """Write the manifest of checkpoint `step`: names, sizes and digests, by rank."""
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "size": len(files),
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "digest": digest}
            for path, digest in zip(files, digests, strict=True)
        ],
    }
    with atomic(manifest_path(directory, step)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(directory: Path, step: int) -> dict[str, Any]:
    """Return a manifest.

    Raises:
        ValueError: if it is no complete manifest.
    """
    manifest: dict[str, Any] = json.loads(manifest_path(directory, step).read_text())
    if manifest.get("format") != FORMAT or len(manifest["files"]) != manifest["size"]:
        raise ValueError("not a manifest of mpi_dasgd")
    return manifest
