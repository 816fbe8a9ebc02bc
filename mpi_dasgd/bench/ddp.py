"""Baseline: torch's DistributedDataParallel over gloo, with the task and straggler of a run."""

from __future__ import annotations

import functools
import math
import os
import socket
import struct
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mpi_dasgd.config.schema import Config
from mpi_dasgd.device import binding
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.storage.runfile import RunFile, rank_path
from mpi_dasgd.storage.schema import TrainRow
from mpi_dasgd.storage.snapshots import Snapshot, Snapshots
from mpi_dasgd.training.device_stream import device_stream
from mpi_dasgd.training.evaluator import Evaluator
from mpi_dasgd.training.finalize import RankRoles, write_results
from mpi_dasgd.training.late_rows import LateRows
from mpi_dasgd.training.workload import build_workload
from mpi_dasgd.world import expected_ranks

__all__ = ["DdpTrainer", "join_gloo", "tcp_bytes_sent"]

_TIMEOUT = timedelta(seconds=120)
_CALIBRATION = 0.5  # seconds to measure a gradient for


class DdpTrainer:
    """One rank of a DDP job on this machine; it needs no MPI, only the launcher's numbers.

    Weights, batches, records and snapshots are those of `mpi_dasgd.training.trainer.Trainer`. A
    slowed rank works or sleeps before the gradient that it shares. How long it sleeps is measured
    before the training, since DDP's gradient contains the wait for the others. Where this process
    sees GPUs, the ranks take them in turn, as those of a training do.

    Args:
        config: configuration of the run; the algorithm is ignored, the budget must be in seconds.

    Attributes:
        rank, size: this rank, and the number of ranks.
        started: `time.monotonic` at the beginning of the training.
    """

    def __init__(self, config: Config) -> None:
        self.size, self.rank = expected_ranks()
        self.config = config
        directory = Path(config.run.directory)
        join_gloo(directory, self.rank, self.size)
        self.device = binding.choose_device(self.rank, torch.cuda.device_count())
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        self.workload = build_workload(
            config, self.rank, self.size, workers=range(self.size), device=self.device
        )
        self.parameters = FlatParameters(self.workload.model)
        in_vector = set(map(id, self.parameters.parameters))
        self.buffers = ModelBuffers(self.workload.model, in_vector)
        self._gradient_seconds = self._measure_gradient() if self.workload.straggler.active else 0.0
        self.ddp = DistributedDataParallel(self.workload.model, gradient_as_bucket_view=True)
        self.step = self.samples = 0
        self.snapshots = Snapshots(config.run_directory / "snapshots")
        self.evaluator = Evaluator(
            self.workload.model, self.parameters, self.buffers, self.workload.data
        )
        self.file = RunFile(
            rank_path(config.run_directory, self.rank),
            rank=self.rank,
            size=self.size,
            attributes={"config_json": config.model_dump_json(), "algorithm": "ddp"},
        )
        self.stream = stream = device_stream(self.device)
        self._late_rows: LateRows | None = None
        if stream is not None:
            self._late_rows = LateRows(
                stream,
                self.workload.optimizer,
                self._append_late,
                rank=self.rank,
                lr=config.optimizer.lr,
            )
        if self.rank == 0:
            np.zeros(1, np.int64).tofile(directory / "last-step")
        dist.barrier()
        self._last_step = np.memmap(directory / "last-step", np.int64, "r+", shape=(1,))
        self._sent = tcp_bytes_sent()
        dist.barrier()
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self.started

    def run(self) -> None:
        """Train until the budget is spent, evaluate, and write results.h5. Collective."""
        self._train()
        counters: dict[str, Any] = {"steps": self.step, "samples": self.samples}
        if self._sent is not None:
            counters["bytes_sent"] = (tcp_bytes_sent() or 0) - self._sent
        points = self.config.evaluation.count
        self._pass_milestone(points)
        self.file.close("finished", counters)
        dist.barrier()
        dist.destroy_process_group()
        if self.rank == 0:
            ranks = range(self.size)
            write_results(
                self.config.run_directory, RankRoles(ranks, ranks, ranks), points, self.evaluator
            )

    def _measure_gradient(self) -> float:
        """Return the seconds that a gradient of this rank alone takes, slowed as in training."""
        seconds: list[float] = []
        end = time.monotonic() + _CALIBRATION
        while len(seconds) < 4 or time.monotonic() < end:
            started = time.perf_counter()
            x, y = self.workload.batches.batch(len(seconds))
            self.workload.compute_gradient(x.to(self.device), y.to(self.device))
            seconds.append(time.perf_counter() - started)
            if len(seconds) > 1:  # the first one warms up
                time.sleep(self.workload.straggler.extra_seconds(0, seconds[-1]))
        return float(np.median(seconds[1:]))

    def _train(self) -> None:
        seconds, points = self.config.budget.seconds, self.config.evaluation.count
        assert seconds is not None, "the budget of a DDP run is in seconds"
        step = self._step if self._late_rows is None else self._step_on_device
        milestone = 1
        while True:
            step(seconds)
            elapsed = self.elapsed
            while milestone < points and elapsed * points >= milestone * seconds:
                self._pass_milestone(milestone)
                milestone += 1
            if 0 < self._last_step[0] <= self.step:
                self._catch_up()
                return

    def _step(self, seconds: float) -> None:
        """Make a step of all ranks; begin no other when `seconds` of training are over."""
        workload = self.workload
        started = time.perf_counter()
        x, y = workload.batches.batch(self.step)
        if workload.straggler.active:
            with self.ddp.no_sync():
                again = functools.partial(workload.compute_gradient, x, y)
                workload.straggler.slow_down(self.step, self._gradient_seconds, again)
        self._declare_last_step(seconds)
        loss = workload.compute_gradient(x, y, self.ddp)
        workload.optimizer.step()
        row = self._count_step(len(x))
        row.loss, row.compute_s = loss, time.perf_counter() - started
        self.file.append(row)

    def _step_on_device(self, seconds: float) -> None:
        """Ask the GPU for a step, whose row comes when its figures are there."""
        workload, stream, rows = self.workload, self.stream, self._late_rows
        assert stream is not None and rows is not None
        rows.begin()
        x, y = map(stream.to_device, workload.batches.batch(self.step))
        if workload.straggler.active:
            with self.ddp.no_sync():
                workload.straggler.slow_down(
                    self.step,
                    self._gradient_seconds,
                    functools.partial(workload.queue_gradient, x, y),
                    wait=lambda: stream.mark().wait(),
                    keep_busy=stream.keep_busy,
                )
        self._declare_last_step(seconds)
        rows.computed(workload.queue_gradient(x, y, self.ddp))
        workload.optimizer.step()
        rows.end(self._count_step(len(x)))

    def _declare_last_step(self, seconds: float) -> None:
        """Say that this step is the last, if it is time: before the all-reduce of all ranks."""
        if self.rank == 0 and self.elapsed >= seconds:
            self._last_step[0] = self.step + 1

    def _count_step(self, samples: int) -> TrainRow:
        """Count a step; return its row, without the figures that were measured."""
        self.step += 1
        self.samples += samples
        return TrainRow(
            step=self.step,
            time_s=self.elapsed,
            samples=self.samples,
            total_samples=self.samples * self.size,
            loss=math.nan,
            learning_rate=self.config.optimizer.lr,
            compute_s=math.nan,
            exchange_s=0.0,
            wait_s=0.0,
            delay=0,
            delay_factor=1.0,
        )

    def _append_late(self, row: TrainRow) -> None:
        """Append a row whose figures a GPU has measured: DDP's exchange is in its gradient."""
        row.compute_s += row.exchange_s
        row.exchange_s = 0.0
        self.file.append(row)

    def _catch_up(self) -> None:
        """Wait for what a GPU still computes of the steps made."""
        if self._late_rows is not None:
            self._late_rows.flush()

    def _pass_milestone(self, milestone: int) -> None:
        self._catch_up()
        self.parameters.copy_to_host()
        snapshot = Snapshot(
            self.parameters.host_view,
            self.buffers.pack(),
            self.elapsed,
            self.samples,
            self.samples * self.size,
        )
        self.snapshots.save(milestone, self.rank, snapshot)


def join_gloo(directory: Path, rank: int, size: int) -> None:
    """Join the process group of torch over gloo. Collective.

    Args:
        directory: existing directory of this job alone, on a file system of all ranks.
        rank, size: this rank, and the number of ranks.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of a host may lead nowhere
    dist.init_process_group(
        "gloo",
        init_method=f"file://{(directory / 'rendezvous').resolve()}",
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )


def tcp_bytes_sent() -> int | None:
    """Return the payload bytes that this process has sent on the TCP connections it has open.

    From ``tcpi_bytes_sent`` of ``struct tcp_info`` (Linux 4.19 or newer); None on older systems.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (not files that stay)
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                continue
            copy = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        with socket.socket(fileno=copy) as connection:
            families = (socket.AF_INET, socket.AF_INET6)
            if connection.family not in families or connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) < 208:
                return None
            total += struct.unpack_from("Q", info, 200)[0]
    return total
