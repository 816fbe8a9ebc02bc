"""State of a rank for a checkpoint, as arrays and JSON, and its return into a resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpi_dasgd.codecs import Codec
from mpi_dasgd.device.base import Array
from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.storage.checkpoint import good_indices, load
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.transport.release import await_release

__all__ = ["load_checkpoint", "state_dict"]


def state_dict(training: Decentralized) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state of a rank: model, buffers, optimizer, codec, algorithm, RNGs, counts.

    Deltas that have arrived are absorbed first. Those in flight are not part of it: a restart of
    an asynchronous run changes the sum of the models by at most these.

    Returns:
        Arrays by name: `model`, (padded,), float32, is the memory of the model itself and changes
        with the next step; and the rest, which JSON can hold.
    """
    parameters = training.parameters
    with parameters.device.current_stream():
        parameters.gather()
        training.algorithm.absorb(training.local.local_step)
        training.endpoint.flush()
        parameters.scatter()
        parameters.copy_to_host()
        arrays = {
            "model": parameters.host_view,
            "buffers": training.buffers.pack(),
            **_random_states(parameters),
        }
        for name, array in training.codec.state().items():
            arrays[f"codec/{name}"] = _to_host(parameters, array)
        for name, array in training.algorithm.state().items():
            arrays[f"algorithm/{name}"] = _to_host(parameters, array)
    scalars: dict[str, Any] = {}
    for index, values in training.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"optimizer/{index}/{key}"
            if isinstance(value, torch.Tensor):
                arrays[name] = _numbers(value)
            else:
                scalars[name] = value
    meta = {
        "local_step": training.local.local_step,
        "samples": training.samples,
        "elapsed": training.elapsed,
        "scalars": scalars,
        "rng": training.algorithm.rng.getstate(),
    }
    return arrays, meta


def load_checkpoint(training: Decentralized, directory: Path) -> int:
    """Load the newest checkpoint that is complete on all ranks, before the first step. Collective.

    Returns:
        Its index.

    Raises:
        UserError: there is none, or ranks in lockstep are at different steps.
    """
    world = training.world
    with world.collective_errors():
        arrays, meta = load(directory, training.rank, size=training.size)
        common = set(good_indices(directory, training.rank))
    for indices in world.comm.allgather(common):
        common &= indices
    with world.collective_errors():
        if not common:
            raise UserError(f"{directory}: no checkpoint is whole for all ranks")
        if meta["index"] != max(common):
            arrays, meta = load(directory, training.rank, index=max(common), size=training.size)
        _load_state(training, arrays, meta)
    local_steps = world.comm.allgather(training.local.local_step)
    with world.collective_errors():
        _count_seen_gradients(training, local_steps)
    return max(common)


def _load_state(
    training: Decentralized, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*arrays.items(), *meta["scalars"].items()]:
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
            state.setdefault(int(index), {})[key] = tensor
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    _set_random_states(training.parameters, arrays)
    version, numbers, gauss = meta["rng"]  # JSON has made lists of tuples
    training.algorithm.rng.setstate((version, tuple(numbers), gauss))
    training.buffers.unpack(arrays["buffers"])
    with training.parameters.device.current_stream():
        _load_codec(training.codec, _part(arrays, "codec/"))
        training.parameters.set(arrays["model"])
        training.algorithm.load_state(_of_device(training.parameters, _part(arrays, "algorithm/")))
        _resume(training, meta["local_step"], meta["samples"], meta["elapsed"])


def _random_states(parameters: FlatParameters) -> dict[str, np.ndarray]:
    """Return the states of torch's random generators that this rank uses."""
    states = {"torch_rng": torch.get_rng_state()}
    if parameters.flat.is_cuda:
        states["torch_cuda_rng"] = torch.cuda.get_rng_state(parameters.flat.device)
    return {name: state.numpy() for name, state in states.items()}


def _set_random_states(parameters: FlatParameters, arrays: Mapping[str, np.ndarray]) -> None:
    """Set the generators to what `_random_states` returned, on a device like the one of then."""
    torch.set_rng_state(torch.from_numpy(arrays["torch_rng"].copy()))
    if parameters.flat.is_cuda and "torch_cuda_rng" in arrays:
        state = torch.from_numpy(arrays["torch_cuda_rng"].copy())
        torch.cuda.set_rng_state(state, parameters.flat.device)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor of an optimizer's state in host memory.

    NumPy has no bf16: float32 holds it exactly, and `load_state_dict` returns it to its type.
    """
    values = tensor.detach().cpu()
    array: np.ndarray = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return array


def _to_host(parameters: FlatParameters, array: Array) -> np.ndarray:
    """Return an array of the state of codec or algorithm in host memory."""
    if array.shape == parameters.vector.shape:
        return parameters.to_host(array)
    return array if isinstance(array, np.ndarray) else parameters.device.to_host(array)


def _of_device(parameters: FlatParameters, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Array]:
    """Return the arrays of an algorithm's state as it has them: those like the model on a device.

    The others are counts, which it reads.
    """
    if not parameters.device.is_asynchronous:
        return arrays
    shape = parameters.host_view.shape
    return {
        name: parameters.to_device(array) if array.shape == shape else array
        for name, array in arrays.items()
    }


def _load_codec(codec: Codec, arrays: dict[str, np.ndarray]) -> None:
    """Load the state of a codec, but no estimates of a vector of another length.

    On a device parameters are aligned, so that a model may have more elements there than on the
    host; zeros are the state in which the estimates are made anew.
    """
    for name, own in codec.state().items():
        if arrays[name].shape != own.shape:
            arrays[name] = np.zeros(own.shape, arrays[name].dtype)
    codec.load_state(arrays)


def _resume(training: Decentralized, local_step: int, samples: int, elapsed: float) -> None:
    """Take over the counts of a checkpoint, and publish them and the model that has been set."""
    training.local.local_step = local_step
    training.budget.resume(samples, elapsed)
    training.endpoint.membership.report_samples(samples)
    training.endpoint.report_gradients(local_step)
    training.algorithm.restart(local_step)
    training.endpoint.flush()
    await_release(training.endpoint.release)  # the other ranks go on once they know the step


def _count_seen_gradients(training: Decentralized, local_steps: Sequence[int]) -> None:
    """Count the gradients of the earlier part of the run, given the steps of all ranks, as seen.

    Raises:
        UserError: ranks in lockstep are at different steps.
    """
    if training.lockstep and len(set(local_steps)) > 1:
        raise UserError(
            f"run.resume: ranks of {training.algorithm.name!r} are in lockstep, but their "
            f"checkpoints are of steps {list(local_steps)}; start a new run"
        )
    for rank, step in enumerate(local_steps):
        training.endpoint.membership.gradients[rank] = step
    training.learning_rate.gradients_seen = sum(local_steps)


def _part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names start with `prefix`, by the rest of their names."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
