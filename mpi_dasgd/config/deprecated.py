"""Old names of keys and values of a configuration: read for one release, with a warning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Mapping
from typing import Any

from mpi_dasgd.world import expected_ranks

__all__ = ["KEYS", "VALUES", "current_key", "renamed"]

_log = logging.getLogger("mpi_dasgd")

KEYS: dict[str, dict[str, str]] = {
    "schedule": {"warmup_start": "warmup_start_factor", "final": "end_factor"},
    "algorithm": {
        "local_steps_law": "local_steps_distribution",
        "tries": "max_attempts",
        "weight": "mixing_weight",
        "step_rule": "delay_adaptive_rule",
        "clients": "client_sampling",
        "server_works": "server_trains",
        "elasticity": "moving_rate",
        "overlap": "overlap_tau",
    },
    "codec": {"gamma": "scale_margin", "rho": "scale_decay"},
    "transport": {"path": "mode", "silence": "heartbeat_timeout"},
    "straggler": {"kind": "distribution"},
    "evaluation": {"points": "count"},
    "checkpoint": {"points": "count"},
    "simulation": {
        "compute": "compute_time",
        "times": "recorded_run",
        "mean": "compute_mean",
        "sigma": "compute_sigma",
        "precision": "dtype",
    },
}
"""New name of each old key, by section."""

VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "algorithm": {
        "order": {"gradient": "adapt_then_combine", "average": "adapt_with_combine"},
        "client_sampling": {"free": "idle"},
    },
    "topology": {"graph": {"edges": "edge_list"}},
    "transport": {"mode": {"node": "shared_memory", "remote": "rma"}},
    "straggler": {"mode": {"work": "busy"}},
    "simulation": {"gradients": {"on": True, "off": False}},
}
"""New spelling of each old value, by section and new key."""


def current_key(section: str, key: str) -> str:
    """Return the present name of a key, which may be an old one."""
    return KEYS.get(section, {}).get(key, key)


def renamed(section: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys and values of a section under their present names.

    Each old name is warned of once, by rank 0.

    Raises:
        ValueError: if a key is given under its old and its new name.
    """
    current: dict[str, Any] = {}
    for key, value in data.items():
        name = current_key(section, key)
        if name != key:
            if name in data:
                raise ValueError(f"{key} is the old name of {name}: give {name} alone")
            _warn(f"{section}.{key}", f"{section}.{name}")
        values = VALUES.get(section, {}).get(name, {})
        if isinstance(value, Hashable) and value in values:
            new = values[value]
            _warn(f"{section}.{name}={value}", f"{section}.{name}={str(new).lower()}")
            value = new
        current[name] = value
    return current


@functools.cache
def _warn(old: str, new: str) -> None:
    if expected_ranks()[1] == 0:
        _log.warning("%s is deprecated and will be removed: it is now called %s", old, new)
