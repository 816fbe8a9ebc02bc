"""Entry point of ``python -m mpi_dasgd``, the same program as ``mpi-dasgd``."""

from __future__ import annotations

import sys

from mpi_dasgd.cli import main

sys.exit(main())
