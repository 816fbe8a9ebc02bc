"""`bench gpu overhead` on a late device: all its Python runs before it sees a GPU.

Arguments: those of the benchmark.
"""

from __future__ import annotations

import sys

from mpi_dasgd.bench import gpu_overhead
from tests.support.late_stream import LateStream
from tests.support.late_training import late_training


def main() -> int:
    """Measure; return the exit code."""
    gpu_overhead.device_stream = lambda device: LateStream(lag=0)
    with late_training((1e-4, 1e-3), 0, memory="ipc") as codecs:
        code = gpu_overhead.main(sys.argv[1:])
    (codec,) = codecs
    work = codec.work
    assert work.launches > 0 and not work.given_back and not work.taken_away, vars(work)
    return code


if __name__ == "__main__":
    sys.exit(main())
