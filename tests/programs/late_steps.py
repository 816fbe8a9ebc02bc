"""Train with a stream whose results come later: the runs must be those of the host.

Arguments: the directory of the results, what is late, as in host,late,exchange, and overrides of
the quick start's job. ``host``: nothing is; ``late``: losses and times; ``exchange``: exchanges in
memory of a device as well, by adpsgd.
"""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

from mpi_dasgd import config, world
from mpi_dasgd.training import trainer, trainer_step
from tests.support.late_stream import LateStream
from tests.support.late_training import late_training
from tests.support.pace import in_pace
from tests.support.training import JOB

LAG = 5  # marks: more than a step asks for


def main() -> None:
    """Train on the host, and then on a late stream, on all ranks."""
    environment = world.start()
    directory, names, *overrides = sys.argv[1:]
    for name in names.split(","):
        stream = None if name == "host" else LateStream(LAG)
        keys = [*overrides, f"run.directory={directory}", f"run.name={name}"]
        with contextlib.ExitStack() as stack:
            late = mock.patch.object(trainer_step, "device_stream", return_value=stream)
            stack.enter_context(late)
            if name == "exchange":
                keys.append("algorithm.name=adpsgd")
                codecs = stack.enter_context(
                    late_training((1e-4, 1e-3), environment.rank, memory="ipc")
                )
            stack.enter_context(in_pace())
            code = trainer.train(config.load(JOB, keys), environment)
        assert code == 0, f"{name}: exit code {code}"
        if name == "exchange":
            (codec,) = codecs
            assert codec.work.launches and not codec.work.wrong, vars(codec.work)


if __name__ == "__main__":
    main()
