"""Train with a stream whose results come later: the runs must be those of the host.

Arguments: the directory of the results, the streams as in host,late, and overrides of the quick
start's job.
"""

from __future__ import annotations

import sys

from mpi_dasgd import config, world
from mpi_dasgd.training import trainer, trainer_step
from tests.support.late_stream import LateStream
from tests.support.training import JOB

LAG = 5  # marks: more than a step asks for


def main() -> None:
    """Train on the host, and then on a late stream, on all ranks."""
    environment = world.start()
    directory, names, *overrides = sys.argv[1:]
    for name in names.split(","):
        stream = LateStream(LAG) if name == "late" else None
        trainer_step.device_stream = lambda device, stream=stream: stream
        place = [f"run.directory={directory}", f"run.name={name}"]
        code = trainer.train(config.load(JOB, [*overrides, *place]), environment)
        assert code == 0, f"{name}: exit code {code}"


if __name__ == "__main__":
    main()
