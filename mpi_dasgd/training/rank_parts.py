"""Builder of one rank over MPI: its flat model, its windows, and the algorithm on both."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpi_dasgd import world
from mpi_dasgd.algorithms import Algorithm, RecordSink
from mpi_dasgd.algorithms.build import RunParts, build_run
from mpi_dasgd.codecs import Codec, Layout
from mpi_dasgd.config import Config, consistency
from mpi_dasgd.device import binding
from mpi_dasgd.device.base import Device
from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.model.parameter_layout import vector_type
from mpi_dasgd.model.parameter_selection import select_parameters
from mpi_dasgd.training import synchronize
from mpi_dasgd.training.agreement import (
    facts_of_model,
    facts_of_optimizer,
    facts_of_run,
    require_agreement,
)
from mpi_dasgd.training.device_choice import DeviceChoice, choose_device
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer

if TYPE_CHECKING:
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint

__all__ = ["RankParts", "build_rank", "start_world"]

_log = logging.getLogger("mpi_dasgd")


@dataclass(frozen=True)
class RankParts:
    """Parts of one rank.

    Attributes:
        run: parts that all ranks share.
        parameters: parameters of the model, equal on all ranks.
        buffers: its buffers, and parameters that are not exchanged.
        local: optimizer of this rank.
        codec: codec of the messages.
        endpoint: transport on MPI windows.
        algorithm: algorithm on all of these, not started.
        device_choice: where the model is exchanged, and why.
    """

    run: RunParts
    parameters: FlatParameters
    buffers: ModelBuffers
    local: TorchLocalOptimizer
    codec: Codec
    endpoint: RmaEndpoint
    algorithm: Algorithm
    device_choice: DeviceChoice


def build_rank(
    config: Config,
    environment: world.World,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    record: RecordSink,
    buffer_rules: Mapping[str, str] | None = None,
) -> RankParts:
    """Build a rank as `config` says. Collective.

    Args:
        config: configuration of the run.
        environment: the ranks, and this one's place among them.
        model: its parameters become those of rank 0.
        optimizer: optimizer over the parameters of `model`.
        record: gets the record of every exchange.
        buffer_rules: rules of buffers that differ between ranks; see `ModelBuffers`.

    Raises:
        UserError: settings that do not fit each other, the model, or the number of ranks, or that
            are not those of all ranks.
    """
    with environment.collective_errors():
        tensors = [p for _, p in select_parameters(model, optimizer)]
        run = build_run(config, environment.size, vector_type(tensors))
    binding.require_own_device(environment, tensors[0].device, config.device.share)
    choice = choose_device(environment, tensors[0].device, config, run)
    with environment.collective_errors():
        parameters = FlatParameters(model, optimizer, choice.device)
        buffers = ModelBuffers(model, set(map(id, parameters.parameters)), buffer_rules)
        if run.algorithm_cls.capabilities.exchanges_gradients:
            parameters.require_exchangeable_gradients(run.algorithm_cls.name)
        codec = _make_codec(run, environment.rank, parameters, choice.device)
        for warning in run.warnings if environment.rank == 0 else ():
            _log.warning(warning)
        consistency.validate(config, run.algorithm_cls.name, run.lockstep)
    facts = {**facts_of_run(run), **facts_of_model(parameters, buffers)}
    if run.applies_gradients_everywhere:
        facts |= facts_of_optimizer(optimizer)
    require_agreement(
        environment.comm,
        facts,
        "give all ranks the same settings and model (buffer_rules={name: 'keep'} leaves alone a "
        "buffer that is each rank's own)",
    )
    synchronize.broadcast_model(environment.comm, parameters, buffers)
    threads = config.codec.threads
    local = TorchLocalOptimizer(
        optimizer,
        parameters,
        environment.rank,
        check_finite=config.run.check_finite,
        fused=config.optimizer.fused != "off",
        threads=threads if threads != "auto" else torch.get_num_threads(),
    )
    endpoint = _make_endpoint(environment, codec.layout, run, choice)
    algorithm = run.make_algorithm(endpoint, codec, parameters.vector, record)
    algorithm.local = local
    return RankParts(run, parameters, buffers, local, codec, endpoint, algorithm, choice)


def _make_codec(run: RunParts, rank: int, parameters: FlatParameters, device: Device) -> Codec:
    try:
        return run.make_codec(
            rank,
            parameters.vector.size,
            parameters.dtype,
            device,
            torch.get_num_threads(),
        )
    except UserError as error:
        if parameters.dtype == np.float32:
            raise
        raise UserError(
            f"{error}. Models are exchanged as {parameters.dtype}, since parameter "
            f"{parameters.names[0]} is {parameters.parameters[0].dtype}"
        ) from None


def _make_endpoint(
    environment: world.World, layout: Layout, run: RunParts, choice: DeviceChoice
) -> RmaEndpoint:
    # not before: it starts MPI
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint

    return RmaEndpoint(
        environment.comm,
        layout,
        run.topology,
        run.config.transport,
        publication_slots=run.publication_slots(choice.memory),
        inbox_slots=run.inbox_slots,
        device=choice.device,
        memory=choice.memory,
    )


def start_world() -> world.World:
    """Start MPI for a program that has not done so; an uncaught exception then ends all ranks."""
    environment = world.start()
    environment.abort_on_exception()
    return environment
