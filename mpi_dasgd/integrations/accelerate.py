"""The ranks of the job as the processes of Hugging Face accelerate, without a process group.

    from mpi_dasgd.integrations.accelerate import use_mpi_ranks

    use_mpi_ranks()                  # before anything of accelerate is constructed
    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    training = mpi_dasgd.attach(model, optimizer)

To accelerate every rank is a process that trains alone (its type is "NO": no `torch.distributed`,
no `DistributedDataParallel`), but that has a number among `num_processes`: so loaders are sharded,
and the main process alone prints and saves. What accelerate does on all processes at once (gather,
reduce, broadcast, wait) is done over MPI.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from mpi_dasgd import world
from mpi_dasgd.device import binding
from mpi_dasgd.errors import UserError
from mpi_dasgd.integrations.collectives import Collectives, collectives

try:
    from accelerate import data_loader
    from accelerate.state import PartialState
    from accelerate.utils import operations
except ImportError as error:
    raise ImportError(
        f"accelerate cannot be imported ({error}); pip install 'mpi_dasgd[huggingface]'"
    ) from error

__all__ = ["use_mpi_ranks"]

# In which accelerate looks for ranks, to start a process group of its own.
_LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    *("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


@functools.cache
def use_mpi_ranks() -> None:
    """Let accelerate take the ranks of the job for its processes, in this process from now on.

    Call it before the first `Accelerator`, `PartialState` or `TrainingArguments` is constructed;
    `mpi_dasgd.integrations.huggingface` does so where it is imported. Later calls do nothing.

    Raises:
        UserError: accelerate has begun already, or `torch.distributed` is in use.
    """
    if PartialState._shared_state:
        raise UserError(
            "accelerate: call use_mpi_ranks(), or import mpi_dasgd.integrations.huggingface, "
            "before the first Accelerator, PartialState or TrainingArguments is constructed"
        )
    originals = {name: getattr(operations, name) for name in _OPERATIONS}
    for name, operation in _OPERATIONS.items():
        _replace(originals[name], functools.wraps(originals[name])(operation))
    prepare = data_loader.prepare_data_loader
    _replace(prepare, functools.wraps(prepare)(functools.partial(_prepare_data_loader, prepare)))
    PartialState.__init__ = _numbered(PartialState.__init__)
    PartialState.wait_for_everyone = lambda self: collectives().barrier()
    PartialState.use_distributed = property(lambda self: self.num_processes > 1)


def _replace(original: Any, replacement: Any) -> None:
    """Put `replacement` wherever accelerate, transformers and the user's script hold `original`."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("accelerate", "transformers", "__main__"):
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, replacement)


def _numbered(initialize: Callable[..., None]) -> Callable[..., None]:
    """Return `PartialState.__init__` with the number of this rank, and without a process group."""

    @functools.wraps(initialize)
    def numbered(self: PartialState, *args: Any, **kwargs: Any) -> None:
        if PartialState._shared_state:
            return initialize(self, *args, **kwargs)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError(
                "torch.distributed is initialized, but mpi_dasgd averages the ranks: start the "
                "script with `mpi-dasgd launch` or mpirun, and without init_process_group"
            )
        ranks = collectives().world
        with _hidden(_LAUNCHER_VARIABLES):
            initialize(self, *args, **kwargs)
        self.num_processes, self.process_index = ranks.size, ranks.rank
        self.local_process_index = ranks.node_rank
        if self.device.type == "cuda" and self.device.index is None:
            self.device = device_of(ranks)
        return None

    return numbered


def device_of(ranks: world.World) -> torch.device:
    """Return the GPU of this rank, and make it the current one."""
    return torch.device(binding.device_of_rank(ranks))


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _prepare_data_loader(
    prepare: Callable[..., DataLoader], dataloader: DataLoader, *args: Any, **kwargs: Any
) -> DataLoader:
    """Prepare a loader of this rank's shard, as accelerate does; ranks never wait for batches."""
    state = PartialState()
    if state.num_processes == 1:
        return prepare(dataloader, *args, **kwargs)
    if kwargs.get("dispatch_batches"):
        raise UserError(
            "dispatch_batches: rank 0 would read for all ranks, and all would wait for it; leave "
            "it out, and every rank reads its own shard"
        )
    kwargs["dispatch_batches"] = False
    sampler = data_loader.get_sampler(dataloader)
    if isinstance(sampler, DistributedSampler):  # also that of `mpi_dasgd.sampler`
        return prepare(dataloader, *args, **{**kwargs, "num_processes": 1, "process_index": 0})
    # Ranks must draw the same order to take disjoint parts of it. It is agreed on once, here:
    # accelerate does not, for processes of the type "NO".
    if isinstance(sampler, RandomSampler):
        seed = kwargs.get("data_seed")
        seed = torch.random.initial_seed() if seed is None else seed
        kwargs |= {"use_seedable_sampler": True, "data_seed": collectives().broadcast(seed)}
    elif hasattr(sampler, "generator"):
        if sampler.generator is None:
            sampler.generator = torch.Generator().manual_seed(torch.random.initial_seed())
        sampler.generator.set_state(collectives().broadcast(sampler.generator.get_state()))
    return prepare(dataloader, *args, **kwargs)


def _over_ranks(tensors: Any, function: Callable[[Collectives, torch.Tensor], torch.Tensor]) -> Any:
    together = collectives()
    return operations.recursively_apply(
        lambda tensor: function(together, tensor), tensors, error_on_other_type=True
    )


def _gather(tensor: Any) -> Any:
    def concatenated(together: Collectives, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(together.gather_tensor(tensor[None] if tensor.ndim == 0 else tensor))

    return _over_ranks(tensor, concatenated)


def _gather_object(object: Any) -> Any:
    return [value for part in collectives().gather(object) for value in part]


def _broadcast(tensor: Any, from_process: int = 0) -> Any:
    def copied(together: Collectives, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(together.broadcast(tensor.detach().cpu(), from_process))

    return _over_ranks(tensor, copied)


def _broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    object_list[:] = collectives().broadcast(object_list, from_process)
    return object_list


def _reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    # accelerate's "none" sums, too
    operation = {"none": "sum"}.get(reduction, reduction)
    return _over_ranks(tensor, lambda together, each: together.reduce_tensor(each, operation))


_OPERATIONS = {
    "gather": _gather,
    "gather_object": _gather_object,
    "broadcast": _broadcast,
    "broadcast_object_list": _broadcast_object_list,
    "reduce": _reduce,
}
"""What replaces accelerate's operations on all processes, by name in `accelerate.utils`."""
