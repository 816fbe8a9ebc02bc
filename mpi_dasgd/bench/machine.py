"""What the machine has left for a benchmark."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["available_memory", "load"]


def available_memory() -> int | None:
    """Return the bytes of memory that programs can still take, or None where nobody says."""
    try:
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def load() -> float:
    """Return how many processes ran or wanted to, in the mean of the last minute."""
    return os.getloadavg()[0]
