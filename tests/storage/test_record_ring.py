"""Rows go through the ring in order, none is lost, and native code writes what Python would."""

from __future__ import annotations

import ctypes
import math
import shutil
import struct
import subprocess
import threading
import time
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.storage.record_ring import RecordRing, row_dtype
from mpi_dasgd.storage.schema import ABSORBED, SKIPPED, TABLES, UNKNOWN_AGE
from tests.support.mpi_ranks import ROOT, missing

NATIVE = """
#include "record_ring.h"
extern "C" int64_t room(MpdRecordRing* ring) { return mpd_record_room(ring); }
extern "C" double seconds(MpdRecordRing* ring) { return mpd_record_time(ring); }
extern "C" void exchange(MpdRecordRing* ring, int64_t step) {
  mpd_record_exchange(ring, MPD_ABSORBED, step, 3, step - 2, 1000000000, 1500000000, 64, 2, 0.5, 7);
}
extern "C" void skip(MpdRecordRing* ring, int64_t step) { mpd_record_skip(ring, step, 4); }
// Writes `rows` rows as fast as there is room, as a rank would without the interpreter.
extern "C" void write(MpdRecordRing* ring, int64_t rows) {
  for (int64_t step = 0; step < rows; ++step) {
    while (!mpd_record_room(ring)) {
    }
    mpd_record_skip(ring, step, static_cast<int32_t>(step % 1000));
  }
}
"""


def exchange(step: int, retries: int = 0) -> tuple[Any, ...]:
    """Return the values of a row."""
    return (step, 0.5, 1, 0, step - 3, 3, 0.25, 64, retries, 1.5, 2, 4)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of the header."""
    if shutil.which("g++") is None:
        missing("no g++")
    folder = tmp_path_factory.mktemp("ring")
    (folder / "ring.cpp").write_text(NATIVE)
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    include = f"-I{ROOT / 'mpi_dasgd' / 'kernels' / 'cpu'}"
    subprocess.run(
        [*command, include, "ring.cpp", "-o", "ring.so"], cwd=folder, check=True, timeout=120
    )
    library = ctypes.CDLL(str(folder / "ring.so"))
    library.room.restype, library.seconds.restype = ctypes.c_int64, ctypes.c_double
    library.room.argtypes = library.seconds.argtypes = [ctypes.c_void_p]
    for function in (library.exchange, library.skip, library.write):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], None
    return library


@pytest.mark.parametrize("table", TABLES)
def test_a_row_comes_back_as_it_was_written(table: str) -> None:
    ring = RecordRing(table, 4)
    values = tuple(range(1, 1 + len(TABLES[table])))
    ring.append(*values)
    rows = ring.take()
    assert rows.dtype == row_dtype(table) and rows[0].item() == values
    assert len(ring.take()) == 0


def test_rows_keep_their_order_however_they_are_taken() -> None:
    ring = RecordRing("exchange", 8)
    rng = np.random.default_rng(1)
    taken: list[int] = []
    for step in range(500):
        ring.append(*exchange(step))
        if rng.random() < 0.1:
            ring.spill()
        if rng.random() < 0.1:
            taken += ring.take()["step"].tolist()
    taken += ring.take()["step"].tolist()
    assert taken == list(range(500))


def test_a_full_ring_loses_no_row() -> None:
    ring = RecordRing("exchange", 8)
    for step in range(100):
        ring.append(*exchange(step))
    assert ring.take()["step"].tolist() == list(range(100))


def test_who_asks_for_it_sees_each_row_once_when_it_leaves_the_ring() -> None:
    ring, seen = RecordRing("exchange", 8), []
    ring.on_taken = lambda rows: seen.extend(rows["step"].tolist())
    for step in range(20):
        ring.append(*exchange(step))
    assert seen == list(range(16)), "moved when the ring was full"
    ring.spill()
    ring.take()
    ring.take()
    assert seen == list(range(20))


def test_rows_that_nobody_takes_are_forgotten() -> None:
    ring = RecordRing("exchange", 4)
    for step in range(100):
        ring.append(*exchange(step))
        ring.discard()
    ring.append(*exchange(100))
    assert ring.take()["step"].tolist() == [100]


def test_a_row_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    ring = RecordRing("exchange", 8)
    ring.append(*exchange(1))
    for wrong in (exchange(2)[:-1], exchange(2, retries=1 << 31), ("x", *exchange(2)[1:])):
        with pytest.raises(struct.error):
            ring.append(*wrong)
    ring.append(*exchange(3))
    assert ring.take()["step"].tolist() == [1, 3]


@pytest.mark.parametrize("capacity", [0, 3, -4])
def test_the_capacity_is_a_power_of_two(capacity: int) -> None:
    with pytest.raises(ValueError, match="power of 2"):
        RecordRing("exchange", capacity)


def test_a_thread_takes_what_another_writes() -> None:
    ring = RecordRing("exchange", 16)
    taken: list[int] = []
    is_done = threading.Event()

    def take() -> None:
        while not is_done.is_set():
            taken.extend(ring.take()["step"].tolist())
        taken.extend(ring.take()["step"].tolist())

    taker = threading.Thread(target=take)
    taker.start()
    for step in range(20_000):
        ring.append(*exchange(step))
    is_done.set()
    taker.join()
    assert taken == list(range(20_000))


def test_native_code_writes_without_the_interpreter(native: ctypes.CDLL) -> None:
    ring, rows = RecordRing("exchange", 64), 5_000
    writer = threading.Thread(target=native.write, args=(ring.address, rows))
    writer.start()
    taken: list[np.ndarray] = []
    while sum(map(len, taken)) < rows:
        taken.append(ring.take())
    writer.join()
    whole = np.concatenate(taken)
    np.testing.assert_array_equal(whole["step"], np.arange(rows))
    np.testing.assert_array_equal(whole["retries"], np.arange(rows) % 1000)


def test_native_rows_are_those_of_python(native: ctypes.CDLL) -> None:
    ring = RecordRing("exchange", 4)
    ring.origin = time.monotonic()
    native.exchange(ring.address, 9)
    native.skip(ring.address, 10)
    ring.append(*exchange(11))
    absorbed, skipped, own = ring.take().tolist()
    time_s = absorbed[1]
    assert absorbed == (9, time_s, 3, ABSORBED, 7, 2, 0.5, 64, 2, 0.5, 7, -1)
    assert skipped[2:9] == (-1, SKIPPED, -1, UNKNOWN_AGE, 0.0, 0, 4)
    assert math.isnan(skipped[9]) and skipped[10:] == (0, -1)
    assert own == exchange(11)
    assert 0.0 <= time_s <= skipped[1] <= time.monotonic() - ring.origin


def test_native_code_sees_whether_there_is_room(native: ctypes.CDLL) -> None:
    ring = RecordRing("exchange", 4)
    assert native.room(ring.address) == 4
    for step in range(4):
        native.skip(ring.address, step)
    assert native.room(ring.address) == 0
    ring.spill()
    native.skip(ring.address, 4)
    assert native.room(ring.address) == 3
    assert ring.take()["step"].tolist() == [0, 1, 2, 3, 4]


def test_native_time_is_that_of_python(native: ctypes.CDLL) -> None:
    ring = RecordRing("exchange", 4)
    ring.origin = 1.0
    before = time.monotonic() - 1.0
    assert before <= native.seconds(ring.address) <= time.monotonic() - 1.0
