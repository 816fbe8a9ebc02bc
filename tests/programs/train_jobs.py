"""Train with each given job file, one after the other in one job: imports take most of the time.

Arguments: the directory of the results, then the files.
"""

from __future__ import annotations

import sys

from mpi_dasgd import config, world
from mpi_dasgd.training import trainer


def main() -> None:
    """Train, on all ranks."""
    environment = world.start()
    directory, *files = sys.argv[1:]
    for file in files:
        overrides = [f"run.directory={directory}", "evaluation.live=false", "evaluation.count=1"]
        code = trainer.train(config.load(file, overrides), environment)
        assert code == 0, f"{file}: exit code {code}"


if __name__ == "__main__":
    main()
