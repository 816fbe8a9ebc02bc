"""One rank of a measured job: ``python -m mpi_dasgd.bench.measured_rank ALGORITHM CONFIG.json``."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from mpi_dasgd import launch, world
from mpi_dasgd.config.schema import Config
from mpi_dasgd.device import binding

__all__ = ["Meter", "cpu_path", "main"]

_METER_SECONDS = 0.05


def cpu_path(directory: Path, rank: int) -> Path:
    """Return the path of the CPU times of `rank` in a run directory."""
    return directory / "cpu" / f"rank{rank:05d}.npy"


def busy_seconds(cores: set[int]) -> float:
    """Return the seconds since boot that `cores` were busy, or taken by a hypervisor."""
    total = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")


class Meter:
    """Reads CPU time 20 times per second: of this process, all threads together, and of its cores.

    Args:
        started: `time.monotonic` at the beginning of the training.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._cores = os.sched_getaffinity(0)
        self._rows: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._read()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        now = time.monotonic() - self._started
        self._rows.append((now, time.process_time(), busy_seconds(self._cores)))

    def _run(self) -> None:
        while not self._stop.wait(_METER_SECONDS):
            self._read()

    def save(self, path: Path) -> None:
        """Stop, and write the readings, (readings, 3): seconds of training, CPU, all cores."""
        self._stop.set()
        self._thread.join()
        self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.array(self._rows))


def main(algorithm: str, file: str) -> int:
    """Train as the configuration in `file` says, and leave the record and the CPU time."""
    config = Config.model_validate_json(Path(file).read_text(encoding="utf-8"))
    launch.enable_stack_dump()
    if algorithm == "ddp":
        from mpi_dasgd.bench.ddp import DdpTrainer

        baseline = DdpTrainer(config)
        meter = Meter(baseline.started)
        baseline.run()
        meter.save(cpu_path(config.run_directory, baseline.rank))
        return 0
    world.log_to_stderr()
    binding.bind_before_mpi()
    environment = world.start()
    environment.abort_on_exception()
    return environment.run(lambda: _train(config, environment))


def _train(config: Config, environment: world.World) -> int:
    from mpi_dasgd.training.trainer import Trainer

    trainer = Trainer(config, environment)
    meter = Meter(time.monotonic() - trainer.training.elapsed)
    code = trainer.run()
    meter.save(cpu_path(config.run_directory, environment.rank))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
