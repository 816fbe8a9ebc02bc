"""Checkpoints: whole or absent, whichever rank is killed and whatever is damaged."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.checkpoint import Checkpoints, good_indices, load
from mpi_dasgd.storage.writer_thread import writer
from mpi_dasgd.training import trainer

SAVER = """
import sys
import numpy as np
from mpi_dasgd.storage.checkpoint import Checkpoints
saves = Checkpoints(sys.argv[1], 0, 1)
index = 0
while True:
    saves.save(index, {"model": np.full(500_000, index, "f4")}, {"next": index + 1})
    saves.wait()
    print(index, flush=True)
    index += 1
"""


def state(index: int, rank: int = 0) -> dict[str, np.ndarray]:
    random_numbers = np.random.default_rng([index, rank])
    return {
        "model": random_numbers.standard_normal(3_000_000, dtype=np.float32),
        "optimizer/momentum": random_numbers.standard_normal((7, 5)),
        "rng": random_numbers.integers(0, 255, 64, dtype=np.uint8),
        "mask": np.array([True, False]),
        "index": np.array(index),
        "empty": np.zeros((0, 3)),
    }


def save_all(directory: Path, indices: range, size: int = 2, **options: Any) -> list[Checkpoints]:
    """Save `indices` of all ranks in one process and close."""
    ranks = [Checkpoints(directory, rank, size, **options) for rank in range(size)]
    for index in indices:
        for rank in reversed(range(size)):
            ranks[rank].save(index, state(index, rank), {"note": f"{index}.{rank}"})
            ranks[rank].wait(0 if rank else 30)
    for each in ranks:
        each.close()
    return ranks


def assert_state(directory: Path, index: int, size: int = 2) -> None:
    for rank in range(size):
        arrays, meta = load(directory, rank)
        assert meta == {"note": f"{index}.{rank}", "index": index, "rank": rank, "size": size}
        expected = state(index, rank)
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(arrays[name], array, strict=True)


def flip_a_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_all(tmp_path, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_state(tmp_path, 2)
    assert good_indices(tmp_path, 0) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name
        for index in ("checkpoint00000001", "checkpoint00000002")
        for name in (f"{index}.json", f"{index}.rank00000.h5", f"{index}.rank00001.h5")
    )


def test_files_are_contiguous_with_digests(tmp_path: Path) -> None:
    save_all(tmp_path, range(1))
    with h5py.File(tmp_path / "checkpoint00000000.rank00000.h5") as file:
        model = file["arrays/model"]
        assert model.chunks is None
        assert len(model.attrs["xxh3_128"]) == 32
        digest = file.attrs["digest"]
    manifest = json.loads((tmp_path / "checkpoint00000000.json").read_text())
    assert manifest["files"][0]["digest"] == digest


def test_save_takes_a_copy(tmp_path: Path) -> None:
    release = threading.Event()
    writer().submit(lambda: release.wait(30))
    saves = Checkpoints(tmp_path, 0, 1)
    model = np.ones(1000)
    saves.save(0, {"model": model}, {})
    model[:] = 2
    assert not list(tmp_path.iterdir())
    release.set()
    assert saves.close()
    assert (load(tmp_path, 0)[0]["model"] == 1).all()


def test_no_manifest_without_the_files_of_all_ranks(tmp_path: Path) -> None:
    first, second = (Checkpoints(tmp_path, rank, 2) for rank in range(2))
    for saves, rank in ((first, 0), (second, 1)):
        saves.save(0, state(0, rank), {"note": f"0.{rank}"})
    assert first.wait()
    first.save(1, state(1, 0), {"note": "1.0"})
    assert not first.wait(timeout=0.3)
    assert (tmp_path / "checkpoint00000001.rank00000.h5").exists()
    assert_state(tmp_path, 0)
    # The late file makes it complete without any call by rank 0.
    second.save(1, state(1, 1), {"note": "1.1"})
    second.close()
    deadline = time.monotonic() + 20
    while not (tmp_path / "checkpoint00000001.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert_state(tmp_path, 1)
    assert first.close()


def test_files_of_the_dead_are_not_waited_for(tmp_path: Path) -> None:
    first, second, third = (Checkpoints(tmp_path, rank, 3) for rank in range(3))
    first.save(0, state(0, 0), {"note": "0.0"})
    third.save(0, state(0, 2), {"note": "0.2"})
    third.close()

    def late() -> None:
        second.save(0, state(0, 1), {"note": "0.1"})
        second.close()

    # Rank 2 died after it had saved: the file of rank 1, which lives, makes the checkpoint whole.
    timer = threading.Timer(0.3, late)
    timer.start()
    assert first.wait(20, dead=lambda: {2})
    timer.join()
    assert_state(tmp_path, 0, 3)

    first.save(1, state(1, 0), {"note": "1.0"})
    started = time.monotonic()
    assert not first.close(20, dead=lambda: {2} if time.monotonic() - started > 0.3 else set())
    assert 0.3 <= time.monotonic() - started < 10
    assert good_indices(tmp_path, 0) == [0]


class Budget:
    """Training whose budget runs out while something else is done: its progress is 0.9, then 1."""

    def __init__(self, last: float) -> None:
        self.seen = iter((0.0, 0.0, 0.3, 0.6, last))
        self.now = 0.0
        self.computes_gradients = False

    @property
    def progress(self) -> float:
        self.now = next(self.seen)
        return self.now

    @property
    def finished(self) -> bool:
        return self.now >= 0.9

    def serve(self) -> None:
        pass


@pytest.mark.parametrize("last", [0.9, 1.0])
def test_the_last_checkpoint_is_saved_after_the_last_step(
    last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "state_dict", lambda training: (training.now, None))
    saved: list[tuple[int, float]] = []
    rank = object.__new__(trainer.Trainer)
    vars(rank).update(
        training=Budget(last),
        config=SimpleNamespace(
            evaluation=SimpleNamespace(count=1), checkpoint=SimpleNamespace(count=2)
        ),
        checkpoints=SimpleNamespace(save=lambda index, now, _: saved.append((index, now))),
        progress_line=SimpleNamespace(due=False),
        step=SimpleNamespace(flush=lambda: None),
    )
    rank._train()
    assert saved == [(1, 0.6), (2, last)]


def test_a_lost_rank_does_not_fill_the_disk(tmp_path: Path) -> None:
    first, second = (Checkpoints(tmp_path, rank, 2) for rank in range(2))
    for index in range(2):
        for saves, rank in ((first, 0), (second, 1)):
            saves.save(index, state(index, rank), {"note": f"{index}.{rank}"})
            saves.wait(0 if rank == 0 else 30)
    for index in range(2, 12):
        first.save(index, {"model": np.zeros(10)}, {})
    first.close(timeout=0)
    assert_state(tmp_path, 1)
    assert len(list(tmp_path.glob("*.rank00000.h5"))) == 2 + 4


@pytest.mark.parametrize("which", [0, 1])
def test_damage_falls_back_to_the_older_checkpoint(tmp_path: Path, which: int) -> None:
    save_all(tmp_path, range(2))
    damaged = tmp_path / f"checkpoint00000001.rank0000{which}.h5"
    flip_a_bit(damaged, 6_000_000)
    with pytest.warns(UserWarning, match=rf"{damaged.name} is damaged.*back to checkpoint 0"):
        assert_state(tmp_path, 0)
    # The rank whose own file is good would take index 1; agreement needs the intersection.
    assert good_indices(tmp_path, 1 - which) == [0, 1]
    with pytest.warns(UserWarning, match="checkpoint 1 left out"):
        assert good_indices(tmp_path, which) == [0]
    assert load(tmp_path, 1 - which, index=1)[1]["index"] == 1
    with pytest.raises(UserError, match=damaged.name):
        load(tmp_path, which, index=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"has \d+ bytes, not the \d+"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "is damaged"),
    ],
)
def test_every_file_damaged_names_them(tmp_path: Path, damage: Any, message: str) -> None:
    save_all(tmp_path, range(2))
    for index in range(2):
        damage(tmp_path / f"checkpoint0000000{index}.rank00001.h5")
    with pytest.raises(
        UserError, match=rf"checkpoint00000001.rank00001.h5 {message}.*; .*checkpoint00000000"
    ):
        load(tmp_path, 0)


def test_a_changed_meta_is_found(tmp_path: Path) -> None:
    save_all(tmp_path, range(1))
    with h5py.File(tmp_path / "checkpoint00000000.rank00000.h5", "r+") as file:
        meta = file.attrs["meta_json"]
        file.attrs["meta_json"] = meta.replace("0.0", "0.1")
    with pytest.raises(UserError, match=r"checkpoint00000000\.rank00000\.h5"):
        load(tmp_path, 0)


def test_a_torn_manifest_falls_back(tmp_path: Path) -> None:
    save_all(tmp_path, range(2))
    manifest = tmp_path / "checkpoint00000001.json"
    manifest.write_text(manifest.read_text()[:50])
    with pytest.warns(UserWarning, match="no complete manifest"):
        assert_state(tmp_path, 0)


def test_large_meta(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, 0, 1)
    meta = {"log": "x" * 200_000}
    saves.save(0, {}, meta)
    saves.close()
    assert load(tmp_path, 0)[1]["log"] == meta["log"]


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a checkpoint"):
        load(tmp_path, 0)
    with pytest.raises(UserError, match="keep: expected at least 2"):
        Checkpoints(tmp_path, 0, 1, keep=1)
    save_all(tmp_path, range(1))
    with pytest.raises(UserError, match="expected a checkpoint of 3 ranks, found one of 2"):
        load(tmp_path, 0, size=3)
    with pytest.raises(UserError, match="expected the state of rank 2"):
        load(tmp_path, 2)
    with pytest.raises(UserError, match="earlier run"):
        Checkpoints(tmp_path, 0, 2)


def test_resuming_removes_the_abandoned_branch(tmp_path: Path) -> None:
    save_all(tmp_path, range(3))
    stale = tmp_path / "checkpoint00000003.rank00001.h5"
    stale.write_bytes(b"of the attempt that broke")
    (tmp_path / "checkpoint00000003.rank00000.h5.tmp").write_bytes(b"torn")
    resumed = Checkpoints(tmp_path, 0, 2, resumed=1)
    assert {path.name[:18] for path in tmp_path.iterdir()} == {"checkpoint00000001"}
    resumed.save(2, state(2, 0), {"note": "again"})
    assert not resumed.close(timeout=0)
    assert_state(tmp_path, 1)


def test_a_failed_write_is_reported(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path / "gone", 0, 1)
    (tmp_path / "gone").rmdir()
    saves.save(0, {"model": np.zeros(3)}, {})
    with pytest.raises(OSError, match="gone"):
        saves.wait()


@pytest.mark.slow
def test_sigkill_keeps_the_last_acknowledged_checkpoint(tmp_path: Path) -> None:
    delays = random.Random(1)
    for trial in range(5):
        directory = tmp_path / str(trial)
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(directory)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            acknowledged = int(child.stdout.readline())
            time.sleep(delays.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
            for line in child.stdout:
                if line.endswith("\n"):
                    acknowledged = int(line)
        arrays, meta = load(directory, 0)
        assert meta["index"] >= acknowledged
        assert meta["next"] == meta["index"] + 1
        assert (arrays["model"] == meta["index"]).all()
