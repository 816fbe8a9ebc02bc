"""What a rank is given by what starts it: rank 0 prints it of all ranks, as JSON."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import stat
import sys
import threading
from pathlib import Path
from typing import Any

SLOW = {"torch", "torch._dynamo", "h5py"}
OURS = {"mpi4py", "mpi_dasgd.training", "mpi_dasgd.model"}
imported = {"slow": sorted(SLOW & set(sys.modules)), "ours": sorted(OURS & set(sys.modules))}
files = [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists()]
inherited = [stat.S_IFMT(os.fstat(fd).st_mode) for fd in sorted(files) if os.get_inheritable(fd)]

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import __main__  # noqa: E402
from mpi_dasgd.process_end import is_launched  # noqa: E402


def main() -> None:
    """See the module."""
    status = Path("/proc/self/status").read_text()
    state: dict[str, Any] = {
        "arguments": sys.argv[1:],
        "cores": sorted(os.sched_getaffinity(0)),
        "directory": str(Path.cwd()),
        "files": inherited,
        "host": socket.gethostname(),
        "ignored": next(line for line in status.splitlines() if line.startswith("SigIgn")),
        "launched": is_launched(),
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
        "main": [__main__.__file__ == __file__, sys.path[0] == str(Path(__file__).parent)],
        "main thread": threading.current_thread() is threading.main_thread(),
        "namespaces": [str(Path(f"/proc/self/ns/{n}").readlink()) for n in ("net", "ipc", "mnt")],
        "on SIGINT": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "umask": os.umask(0o22),
        "variables": {
            k: v for k, v in os.environ.items() if k in ("OMP_NUM_THREADS", "MPI_DASGD_RANKS")
        },
    }
    draws = [os.getpid(), random.random(), np.random.random(), os.urandom(4).hex()]
    everyone = MPI.COMM_WORLD.gather({"imported": imported, "state": state, "draws": draws})
    if everyone:
        print(json.dumps(everyone))


if __name__ == "__main__":
    main()
