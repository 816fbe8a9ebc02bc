"""``mpi-dasgd launch`` of a script, with ranks that are copies.

``warm_launch.py SOCKET ARGUMENT...``: the socket of a `WarmServer`, and the program's arguments.
"""

from __future__ import annotations

import sys
from unittest import mock

from mpi_dasgd.cli import main
from mpi_dasgd.launch import job
from tests.support.warm_start import warm_command

if __name__ == "__main__":
    socket_name, *arguments = sys.argv[1:]
    rank_command = job._rank_command
    with mock.patch.object(
        job, "_rank_command", lambda words: warm_command(socket_name, rank_command(words))
    ):
        sys.exit(main(arguments))
