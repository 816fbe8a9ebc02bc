"""Data sets that are read from files: IDX, Fashion-MNIST, and training on it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from sklearn import datasets

from mpi_dasgd.errors import UserError
from mpi_dasgd.tasks import data, idx, tables
from tests.support.mpi_ranks import ROOT, missing
from tests.support.rank_pool import run_pooled
from tests.support.training import MAIN

IMAGES = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def _idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.tobytes()


def _folder(directory: Path, **replaced: np.ndarray) -> str:
    """A folder of a tiny data set like MNIST, one file of it compressed."""
    arrays = {"train_images": IMAGES, "train_labels": np.array([2, 0], np.uint8)}
    arrays |= {"t10k_images": IMAGES[:1], "t10k_labels": np.array([1], np.uint8), **replaced}
    for name, array in arrays.items():
        part, what = name.split("_")
        path = directory / f"{part}-{what}-idx{3 if what == 'images' else 1}-ubyte"
        path.write_bytes(_idx(array))
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return str(directory)


# --- IDX ---


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_is_read_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(_idx(IMAGES)) if suffix else _idx(IMAGES))
    found = idx.read_idx(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, IMAGES)


_GOOD = _idx(IMAGES)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short", _GOOD[:-1], ["truncated", "(2, 3, 3)", "34 bytes", "33"]),
        ("long", _GOOD + b"\0", ["too long", "34 bytes", "35"]),
        ("sizes", _GOOD[:9], ["truncated", "3 dimensions", "16 bytes", "9"]),
        ("empty", b"", ["not an IDX file", "nothing"]),
        ("magic", b"\x89HDF" + _GOOD, ["not an IDX file", "89 48 44 46"]),
        ("float", _idx(IMAGES, 0x0D), ["uint8", "float32", "0x0d"]),
        ("other", _idx(IMAGES, 0x42), ["uint8", "unknown type", "0x42"]),
        ("cut.gz", gzip.compress(_GOOD, mtime=0)[:-9], ["cannot be read", "ended"]),
        ("broken.gz", gzip.compress(_GOOD, mtime=0)[:12] + b"\xff" * 40, ["cannot be read"]),
        ("plain.gz", _GOOD, ["cannot be read", "gzip"]),
        ("absent", None, ["cannot be read", "No such file"]),
    ],
)
def test_what_is_not_idx_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        idx.read_idx(path)
    assert [word for word in [str(path), *words] if word not in str(refused.value)] == []


# --- A folder of four files ---


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    found = data.load("fashion_mnist", "cnn", 1, _folder(tmp_path))
    assert found.train_x.shape == (2, 9) and found.test_x.shape == (1, 9)
    assert (found.train_y.tolist(), found.test_y.tolist(), found.classes) == ([2, 0], [1], 3)
    pixels = IMAGES.reshape(2, 9) / 255
    expected = (pixels - pixels.mean()) / pixels.std()
    torch.testing.assert_close(
        found.inputs(found.train_x), torch.tensor(expected, dtype=torch.float32)
    )
    x, y = data.Batches(found, 2, seed=1, rank=0, ranks=1, sharded=False).batch(0)
    order = [found.train_y.tolist().index(label) for label in y.tolist()]
    torch.testing.assert_close(x, torch.tensor(expected[order], dtype=torch.float32))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for replaced, words in (
        ({"train_labels": np.zeros(3, np.uint8)}, ["train-labels", "2 images", "got 3"]),
        ({"t10k_images": np.zeros((1, 4, 4), np.uint8)}, ["t10k-images", "(3, 3)", "(4, 4)"]),
        ({"train_images": np.zeros((2, 9), np.uint8)}, ["train-images", "3 dim", "(2, 9)"]),
        ({"train_images": np.zeros((0, 3, 3), np.uint8)}, ["train-images", "(0, 3, 3)"]),
    ):
        with pytest.raises(UserError) as refused:
            data.load("fashion_mnist", "cnn", 1, _folder(tmp_path, **replaced))
        assert [word for word in words if word not in str(refused.value)] == []


def test_missing_files_are_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"task.directory: {tmp_path} .*train-images-idx3-ubyte"):
        data.load("fashion_mnist", "cnn", 1, str(tmp_path))
    monkeypatch.setattr(idx, "FASHION_MNIST", str(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match=r"nowhere/train-images.*apt-get install dataset-fashion-mnist.*directory"
    ):
        data.load("fashion_mnist", "cnn", 1)


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
@pytest.mark.parametrize("file", ["as it is", "elsewhere"])
def test_tables_are_those_of_scikit_learn(
    name: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = getattr(datasets, f"load_{name}")(return_X_y=True)
    if file == "elsewhere":
        monkeypatch.setattr(tables, "find_spec", lambda _: None)
    for found, column in zip(getattr(tables, name)(), expected, strict=True):
        np.testing.assert_array_equal(found, column)
        assert found.dtype == column.dtype


def test_a_directory_for_another_task_is_refused() -> None:
    with pytest.raises(UserError, match="task.directory.*fashion_mnist.*'digits'"):
        data.load("digits", "cnn", 1, "/somewhere")


# --- Fashion-MNIST itself ---


@pytest.fixture(scope="module")
def fashion_mnist() -> data.Data:
    if not Path(idx.FASHION_MNIST).exists():
        missing("no Fashion-MNIST: `make test` installs Debian's dataset-fashion-mnist")
    return data.load("fashion_mnist", "cnn", 1)


def test_fashion_mnist_is_whole_and_standardized(fashion_mnist: data.Data) -> None:
    assert fashion_mnist.train_x.shape == (60000, 784)
    assert fashion_mnist.test_x.shape == (10000, 784)
    assert (fashion_mnist.features, fashion_mnist.classes) == (784, 10)
    assert torch.bincount(fashion_mnist.train_y).tolist() == [6000] * 10
    assert torch.bincount(fashion_mnist.test_y).tolist() == [1000] * 10
    inputs = fashion_mnist.inputs(fashion_mnist.train_x)
    assert inputs.dtype == torch.float32
    assert inputs.mean().item() == pytest.approx(0, abs=1e-4)
    assert inputs.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.mpi
def test_two_ranks_learn_from_fashion_mnist(tmp_path: Path, fashion_mnist: data.Data) -> None:
    run_pooled(
        2,
        MAIN,
        *("train", str(ROOT / "jobs" / "fashion_mnist.toml"), "task.model=logistic"),
        *("budget.samples=6400", "optimizer.lr=0.01", "evaluation.count=1"),
        f"run.directory={tmp_path}",
    )
    consensus = xarray.open_dataset(
        tmp_path / "fashion_mnist" / "results.h5", engine="h5netcdf", group="consensus"
    )
    assert float(consensus["mean_test_accuracy"][-1]) > 0.7
