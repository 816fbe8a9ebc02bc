"""What a rank must remember to go on after a restart, as arrays and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mpi_dasgd.decentralized import Decentralized

__all__ = ["load_state", "save_state"]


def save_state(training: Decentralized) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state of a rank: model, buffers, optimizer, random numbers, counts.

    Deltas that have arrived are absorbed first. Those still on their way are not part of it: a
    restart of an asynchronous run changes the sum of the models by at most these.
    """
    training.algorithm.absorb(training.local.step)
    training.parameters.push()
    arrays = {
        "model": training.parameters.host,
        "buffers": training.parameters.buffers(),
        "torch_rng": torch.get_rng_state().numpy(),
    }
    scalars: dict[str, Any] = {}
    for index, values in training.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"optimizer/{index}/{key}"
            if isinstance(value, torch.Tensor):
                arrays[name] = value.detach().cpu().numpy()
            else:
                scalars[name] = value
    meta = {
        "local_step": training.local.step,
        "samples": training.samples,
        "elapsed": training.elapsed,
        "scalars": scalars,
        "rng": training.algorithm.rng.bit_generator.state,
    }
    return arrays, meta


def load_state(
    training: Decentralized, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
    """Take a state back; to be called before the first step."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*arrays.items(), *meta["scalars"].items()]:
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
            state.setdefault(int(index), {})[key] = tensor
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(torch.from_numpy(arrays["torch_rng"].copy()))
    training.parameters.set(arrays["model"])
    training.parameters.set_buffers(arrays["buffers"])
    training.algorithm.rng.bit_generator.state = meta["rng"]
    training.resume(meta["local_step"], meta["samples"], meta["elapsed"])
