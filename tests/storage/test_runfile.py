"""The run file of a rank: exact rows, readable live and after SIGKILL at any moment."""

from __future__ import annotations

import json
import math
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.provenance import provenance
from mpi_dasgd.storage.runfile import CHUNK_ROWS, RunFile, read_run_file
from mpi_dasgd.storage.schema import FORMAT_VERSION, ROWS, TABLES, ExchangeRow, TrainRow

WRITER = """
import sys
from mpi_dasgd.storage.runfile import RunFile
from mpi_dasgd.storage.schema import ExchangeRow, TrainRow
record = RunFile(sys.argv[1], rank=3, size=4, attributes={"config_json": "{}"})
step = 0
while True:
    for _ in range(37):
        record.append(
            TrainRow(
                step=step, time_s=step / 2, samples=step, total_samples=4 * step,
                loss=1 / (step + 1), learning_rate=0.1, compute_s=1, exchange_s=2, wait_s=3,
                delay=4, delay_factor=1,
            )
        )
        step += 1
    record.append(
        ExchangeRow(
            step=step, time_s=step / 2, partner=1, kind=0, partner_step=step, age_steps=0,
            age_s=0.1, bytes=1000, retries=0, distance=0.5, rejected=0, set_staleness=-1,
        )
    )
    record.flush({"messages": step})
    print(step, flush=True)
"""


def train_row(step: int) -> TrainRow:
    return TrainRow(
        step=step,
        time_s=step * 0.5,
        samples=step * 32,
        total_samples=step * 128,
        loss=1 / (step + 1),
        learning_rate=0.1,
        compute_s=0.01,
        exchange_s=0.002,
        wait_s=0.0,
        delay=3,
        delay_factor=0.5,
    )


EXCHANGE = ExchangeRow(
    step=4,
    time_s=0.2,
    partner=2,
    kind=1,
    partner_step=9,
    age_steps=-5,
    age_s=0.01,
    bytes=4096,
    retries=1,
    distance=0.5,
    rejected=0,
    set_staleness=7,
)


def test_rows_attributes_and_counters_come_back(tmp_path: Path) -> None:
    path = tmp_path / "ranks" / "rank00001.h5"
    rows = 10 * CHUNK_ROWS + 5  # more than a ring holds
    attributes = {"config_json": '{"a": 1}', "seed": 7, **provenance()}
    with RunFile(path, rank=1, size=4, attributes=attributes) as record:
        for step in range(rows):
            record.append(train_row(step))
        record.append(EXCHANGE)
        record.close("finished", {"messages": np.int64(12), "bytes_sent": 1 << 40, "idle_s": 0.25})
    read = read_run_file(path)
    assert read.status == "finished"
    assert read.counters == {"messages": 12, "bytes_sent": 1 << 40, "idle_s": 0.25}
    assert read.attributes["seed"] == 7
    assert read.attributes["rank"] == 1
    assert read.attributes["size"] == 4
    assert read.attributes["started"] == attributes["started"]
    for column in TABLES["train"]:
        values = read.tables["train"][column.name]
        assert values.dtype == column.dtype
        expected = [getattr(train_row(step), column.name) for step in range(rows)]
        np.testing.assert_array_equal(values, expected)
    assert {name: values.tolist() for name, values in read.tables["exchange"].items()} == {
        name: [value] for name, value in asdict(EXCHANGE).items()
    }
    assert read.tables["evaluation"]["milestone"].shape == (0,)


def test_columns_have_units_names_checksums_and_a_scale(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.h5"
    RunFile(path, rank=0, size=1, attributes={}).close("finished", {})
    with h5py.File(path) as file:
        for table, columns in TABLES.items():
            scale = file[table][columns[0].name]
            assert scale.is_scale
            for column in columns:
                data = file[table][column.name]
                assert data.attrs["units"] == column.unit
                assert data.attrs["long_name"] == column.long_name
                assert data.fletcher32
                if column is not columns[0]:
                    assert data.dims[0][0] == scale


def test_append_does_not_touch_the_file(tmp_path: Path) -> None:
    with RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={}) as record:
        row = train_row(1)
        # Processor time of this thread: what else runs on the machine does not count.
        start = time.thread_time()
        for _ in range(20_000):
            record.append(row)
        mean = (time.thread_time() - start) / 20_000
    # Appended in some microseconds; a row through HDF5 takes over a hundred.
    assert mean < 50e-6


@pytest.mark.slow
def test_xarray_reads_a_live_file(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.h5"
    with RunFile(path, rank=0, size=1, attributes={}) as record:
        for step in range(10):
            record.append(train_row(step))
        record.flush({"messages": 3})
        live = read_run_file(path)
        assert live.status == "running"
        assert live.counters == {"messages": 3}
        # Another process, as HDF5 shares an open file within one.
        code = (
            "import sys, xarray as xr\n"
            "d = xr.open_dataset(sys.argv[1], engine='h5netcdf', group='train',"
            " driver_kwds={'swmr': True})\n"
            "print(d.sizes['step'], float(d.loss.sum()), d.loss.long_name)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    size, total, *name = done.stdout.split()
    assert int(size) == 10
    assert float(total) == pytest.approx(sum(train_row(step).loss for step in range(10)))
    assert " ".join(name) == "training loss of the step's batch"
    assert xr.open_dataset(path, engine="h5netcdf", group="train").sizes["step"] == 10


def test_background_flush_without_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpi_dasgd.storage.runfile.FLUSH_SECONDS", 0.05)
    with RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={}) as record:
        record.append(train_row(5))
        deadline = time.monotonic() + 20
        while not len(read_run_file(record.path).tables["train"]["step"]):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.slow
def test_sigkill_leaves_every_flushed_row(tmp_path: Path) -> None:
    delays = random.Random(0)
    for trial in range(10):
        path = tmp_path / f"rank{trial:05d}.h5"
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            acknowledged = int(child.stdout.readline())
            time.sleep(delays.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
            for line in child.stdout:
                if line.endswith("\n"):
                    acknowledged = int(line)
        read = read_run_file(path)
        steps = read.tables["train"]["step"]
        assert len(steps) >= acknowledged > 0
        np.testing.assert_array_equal(steps, np.arange(len(steps)))
        np.testing.assert_array_equal(read.tables["train"]["loss"], 1 / (steps + 1))
        assert len(read.tables["exchange"]["step"]) >= acknowledged // 37
        assert read.status == "running"
        assert read.counters["messages"] >= acknowledged


def test_context_manager_records_failure(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={}) as record,
    ):
        record.append(train_row(0))
        raise ZeroDivisionError
    read = read_run_file(tmp_path / "r.h5")
    assert read.status == "failed"
    assert len(read.tables["train"]["step"]) == 1


def test_never_overwrites(tmp_path: Path) -> None:
    RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={}).close("finished", {})
    with pytest.raises(UserError, match="earlier run"):
        RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={})


def test_values_of_a_row_are_named_so_that_none_are_exchanged() -> None:
    values = list(asdict(EXCHANGE).values())
    with pytest.raises(TypeError, match="positional"):
        ExchangeRow(*values)  # type: ignore[misc]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'partner'"):
        ExchangeRow(**{k: v for k, v in asdict(EXCHANGE).items() if k != "partner"})


def test_the_columns_of_a_table_are_the_fields_of_its_row() -> None:
    for table, row in ROWS.items():
        assert [column.name for column in TABLES[table]] == [field.name for field in fields(row)]


def test_a_row_of_no_table_is_refused_at_once(tmp_path: Path) -> None:
    with (
        RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={}) as record,
        pytest.raises(KeyError),
    ):
        record.append((1, 2.0))  # type: ignore[arg-type]


def test_an_error_in_the_background_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpi_dasgd.storage.runfile.FLUSH_SECONDS", 0.01)
    record = RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={})

    def fail(rows: np.ndarray) -> None:
        record.rings["train"].on_taken = None
        raise ZeroDivisionError(f"{len(rows)} rows")

    record.rings["train"].on_taken = fail
    record.append(train_row(0))
    time.sleep(0.3)
    with pytest.raises(ZeroDivisionError, match="1 rows"):
        record.flush()
    with pytest.raises(ZeroDivisionError, match="1 rows"):
        record.close("failed", {})
    assert read_run_file(record.path).status == "failed"


def test_a_value_that_is_no_number_is_refused_at_once(tmp_path: Path) -> None:
    with RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={}) as record:
        with pytest.raises(struct.error):
            record.append(replace(train_row(0), loss="no number"))  # type: ignore[arg-type]
        record.append(train_row(1))
    assert read_run_file(record.path).tables["train"]["step"].tolist() == [1]


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    RunFile(path, rank=0, size=1, attributes={}).close("finished", {})
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = FORMAT_VERSION + 1
    with pytest.raises(UserError, match=r"r\.h5: expected format version 2 or below, found 3"):
        read_run_file(path)


def test_not_a_run_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read_run_file(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(UserError, match="damaged"):
        read_run_file(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["format"] = "something else"
    with pytest.raises(UserError, match="another HDF5 file"):
        read_run_file(tmp_path / "other.h5")


def test_a_torn_state_falls_back_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    with RunFile(path, rank=0, size=1, attributes={}) as record:
        record.flush({"messages": 1})
        record.flush({"messages": 2})
    with h5py.File(path) as file:
        newest = max(range(2), key=lambda slot: json.loads(file["state"][slot])["sequence"])
        offset = file["state"].id.get_chunk_info(newest).byte_offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    read = read_run_file(path)
    assert read.status == "running"
    assert read.counters == {"messages": 2}


def test_a_file_cut_short_is_found_at_once(tmp_path: Path) -> None:
    cut_live, cut_closed = tmp_path / "live.h5", tmp_path / "closed.h5"
    with RunFile(tmp_path / "r.h5", rank=0, size=1, attributes={}) as record:
        record.append(train_row(0))
        record.flush()
        cut_live.write_bytes(record.path.read_bytes()[:-5000])
    cut_closed.write_bytes(record.path.read_bytes()[:-5000])
    start = time.monotonic()
    for path in (cut_live, cut_closed):
        with pytest.raises(UserError, match=rf"{path.name}.*damaged"):
            read_run_file(path)
    assert time.monotonic() - start < 10


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    with RunFile(path, rank=0, size=1, attributes={}) as record:
        for step in range(100):
            record.append(train_row(step))
    with h5py.File(path) as file:
        offset = file["train/loss"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 80] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"r\.h5.*damaged"):
        read_run_file(path)


def test_provenance_is_flat_and_true() -> None:
    entries = provenance()
    assert all(isinstance(value, str) and value for value in entries.values())
    assert entries["numpy"] == np.__version__
    assert entries["h5py"] == h5py.__version__
    assert not math.isnan(float(entries["cores_usable"]))


def test_provenance_does_not_import_torch_or_mpi() -> None:
    code = (
        "import sys; from mpi_dasgd.storage.provenance import provenance; e = provenance();"
        "assert not {'torch', 'mpi4py', 'h5py', 'numpy'} & set(sys.modules); print(e['h5py'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == h5py.__version__
