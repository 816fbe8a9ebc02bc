"""IDX files, the format of MNIST and of the data sets that follow it."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpi_dasgd.errors import UserError

__all__ = ["FASHION_MNIST", "read_idx", "read_images"]

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts its files."""

_UINT8 = 0x08
_OTHERS = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes, compressed if its name ends in .gz.

    Returns:
        Array of the shape that the file declares, uint8, not writable.

    Raises:
        UserError: the file cannot be read, is truncated or too long, or is not IDX of uint8.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or f"{error}; fetch the file again"
        raise UserError(f"{path} cannot be read: {reason}") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(
            f"{path} is not an IDX file: it must begin with two zero bytes, a type and a number of "
            f"dimensions, got {content[:4].hex(' ') or 'nothing'}"
        )
    kind, dimensions = content[2:4]
    if kind != _UINT8:
        name = _OTHERS.get(kind, "an unknown type")
        raise UserError(
            f"{path}: expected an IDX file of uint8 (type 0x08), got {name} (0x{kind:02x}); "
            "convert it to bytes"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise UserError(
            f"{path} is truncated: the sizes of {dimensions} dimensions need {start} bytes, "
            f"got {len(content)}; fetch the file again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise UserError(
            f"{path} is {'truncated' if len(content) < expected else 'too long'}: its shape "
            f"{shape} needs {expected} bytes, got {len(content)}; fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_images(directory: str | None) -> Sequence[np.ndarray]:
    """Read the four files of a data set like MNIST, each plain or compressed (.gz).

    Args:
        directory: folder of the files; None: where Debian puts Fashion-MNIST.

    Returns:
        Training images and classes, test images and classes: shapes (samples, rows, columns) and
        (samples,), uint8.

    Raises:
        UserError: a file is missing, cannot be read, or does not fit the others.
    """
    paths, arrays = [], []
    for part in ("train", "t10k"):
        for name, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            path = _find(directory, f"{part}-{name}-ubyte")
            array = read_idx(path)
            if array.ndim != dimensions or array.size == 0:
                raise UserError(
                    f"{path}: expected {dimensions} dimensions and some samples, "
                    f"got the shape {array.shape}"
                )
            paths.append(path)
            arrays.append(array)
    for images, labels in ((0, 1), (2, 3)):
        if len(arrays[images]) != len(arrays[labels]):
            raise UserError(
                f"{paths[labels]}: expected a class for each of the {len(arrays[images])} images "
                f"of {paths[images].name}, got {len(arrays[labels])}; take both from the same "
                "data set"
            )
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise UserError(
            f"{paths[2]}: expected images of {arrays[0].shape[1:]} as in {paths[0].name}, "
            f"got {arrays[2].shape[1:]}; take both from the same data set"
        )
    return arrays


def _find(directory: str | None, name: str) -> Path:
    folder = Path(FASHION_MNIST if directory is None else directory)
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    if directory is None:
        raise UserError(
            f"task.name: fashion_mnist needs {folder / name}.gz, which is missing; apt-get install "
            "dataset-fashion-mnist, or name the folder of its four files in task.directory"
        )
    raise UserError(
        f"task.directory: {folder} has neither {name} nor {name}.gz; it must hold the images and "
        "labels of train and t10k under the names they have in MNIST"
    )
