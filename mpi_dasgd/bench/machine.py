"""Memory and cores that other programs leave to a benchmark."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["available_memory", "load_average"]


def available_memory() -> int | None:
    """Return the bytes of memory that can still be allocated, or None if the system does not say.

    Linux only: the value is MemAvailable of ``/proc/meminfo``.
    """
    try:
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def load_average() -> float:
    """Return the load average of the last minute, in runnable processes."""
    return os.getloadavg()[0]
