"""Which GPU a rank has: by its number on the node, and one that no other rank has by accident."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_dasgd.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

    from mpi_dasgd.world import World

__all__ = [
    "RankGpu",
    "bind_before_mpi",
    "choose_device",
    "device_of_rank",
    "has_driver",
    "hidden_peers",
    "local_rank",
    "read_rank_gpu",
    "require_own_device",
    "shared_gpu",
    "slice_of",
]

# Variables in which launchers pass a process its number on the node. Launchers of MPI come before
# Slurm, whose batch script passes its own number to all that it starts.
_LOCAL_RANK_VARIABLES = (
    "MPI_LOCALRANKID",  # MPICH, Intel MPI
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",  # Cray
    "FLUX_TASK_LOCAL_ID",
    "SLURM_LOCALID",
)
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")


@dataclass(frozen=True)
class RankGpu:
    """The GPU of a rank's model, as the ranks tell each other.

    Attributes:
        host: name of its node.
        device: its name in torch's notation; a model without a GPU has the CPU.
        identity: what no other GPU has, whatever the process sees of it; "" if unknown.
        visible: number of GPUs that the process sees.
        setting: CUDA_VISIBLE_DEVICES; None if that is not set.
        may_share: whether `device.share` is set.
    """

    host: str
    device: str = "cpu"
    identity: str = ""
    visible: int = 0
    setting: str | None = None
    may_share: bool = False


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return this rank's number on its node, as its launcher says; None if it does not."""
    for name in _LOCAL_RANK_VARIABLES:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def choose_device(number: int, visible: int) -> str:
    """Return the torch device of a rank.

    Args:
        number: this rank's number on its node.
        visible: number of GPUs that this process sees. 0: the rank uses the CPU. 1: the launcher
            has chosen. More: the ranks take them in turn.
    """
    return f"cuda:{number % visible}" if visible else "cpu"


def has_driver() -> bool:
    """Return whether this machine has an NVIDIA driver; nothing is asked of it."""
    return any(Path(name).exists() for name in _DRIVER_FILES)


def bind_before_mpi() -> None:
    """Make this rank's GPU the current one before MPI starts, which may open the current one.

    Without an NVIDIA driver it does nothing, and does not import torch.
    """
    number = local_rank()
    if number is None or not has_driver():
        return
    with contextlib.suppress(UserError):  # `device_of_rank` reports it, once for all ranks
        _bind(number)


def device_of_rank(environment: World) -> str:
    """Choose the torch device of this rank by its number on the node, and make it the current one.

    Raises:
        UserError: the GPU cannot be used.
    """
    number = local_rank()
    return _bind(environment.node_rank if number is None else number)


def _bind(number: int) -> str:
    import torch

    device = choose_device(number, torch.cuda.device_count())
    if device != "cpu":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise UserError(
                f"{device} cannot be used ({first_line(error)}): free it, or choose others by "
                "CUDA_VISIBLE_DEVICES; CUDA_VISIBLE_DEVICES= trains on the CPU"
            ) from error
    return device


def require_own_device(environment: World, device: torch.device, may_share: bool) -> None:
    """Refuse models of several ranks on one GPU, where they would take turns. Collective.

    Args:
        environment: the ranks.
        device: where this rank's model is.
        may_share: `device.share`; it counts if all ranks have set it.

    Raises:
        UserError: on all ranks: at least two models are on one GPU.
    """
    own = read_rank_gpu(device, may_share)
    ranks: tuple[RankGpu, ...] = tuple(environment.comm.allgather(own))
    shared = shared_gpu(ranks)
    if shared and not all(rank.may_share for rank in ranks):
        raise UserError(
            f"{shared}, where they would take turns: start at most one rank per GPU, give each "
            "rank's model another one (cuda:0, cuda:1, ... by its number on the node), or set "
            "device.share=true if this is a test",
            on_all_ranks=True,
        )


def read_rank_gpu(device: torch.device, may_share: bool = False) -> RankGpu:
    """Return what this rank tells of the device of its model; a GPU is only looked at."""
    host = socket.gethostname()
    if device.type != "cuda":
        return RankGpu(host, str(device), may_share=may_share)
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:  # torch reports it since 2.5, the same for all slices of a card that is cut into some
        identity = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    except (RuntimeError, AssertionError):  # whoever uses the GPU reports it
        identity = ""
    identity = f"{identity} {slice_of(setting, index)}".strip()
    visible = torch.cuda.device_count()
    return RankGpu(host, f"cuda:{index}", identity, visible, setting, may_share)


def slice_of(setting: str | None, index: int) -> str:
    """Return the name of the slice (MIG) of a card that GPU `index` is; "" for a whole card.

    Args:
        setting: CUDA_VISIBLE_DEVICES; None if that is not set.
        index: number of the GPU among those that it makes visible.
    """
    entries = (setting or "").split(",")
    entry = entries[index] if index < len(entries) else ""
    return entry if entry.startswith("MIG-") else ""


def shared_gpu(ranks: Sequence[RankGpu]) -> str:
    """Say which ranks are on one GPU, as the beginning of a sentence; "" if none are."""
    for found in _grouped(ranks, lambda rank: rank.identity).values():
        if len(found) > 1:
            first = ranks[found[0]]
            return (
                f"ranks {_listed(found)} have their models on one GPU ({first.device} of rank "
                f"{found[0]}, on {first.host})"
            )
    return ""


def hidden_peers(ranks: Sequence[RankGpu]) -> str:
    """Say that ranks of a node cannot see each other's GPUs, if so; "" otherwise.

    CUDA_VISIBLE_DEVICES alone does no harm. But where each rank sees one GPU, another one, by the
    same number, a cgroup or a container hides the others, and CUDA refuses to open their memory.

    Args:
        ranks: what the ranks told of their GPUs.
    """
    for host, found in _grouped(ranks, lambda rank: rank.identity and rank.host).items():
        on_node = [ranks[rank] for rank in found if ranks[rank].visible == 1]
        settings = {rank.setting for rank in on_node if not _names_gpus(rank.setting)}
        if len({rank.identity for rank in on_node}) > len(settings) > 0 and len(on_node) > 1:
            return (
                f"on {host} ranks see a GPU each, and not those of the others: a cgroup of Slurm "
                "(--gpus-per-task, --gpu-bind) or a container hides them, and with them their "
                "memory. Give the GPUs to the node, and each rank takes its own: --gpus-per-node=4 "
                "--ntasks-per-node=4, without --gpu-bind"
            )
    return ""


def _names_gpus(setting: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES names a GPU by more than its number."""
    return (setting or "").startswith(("GPU-", "MIG-"))


def _grouped(ranks: Sequence[RankGpu], key: Callable[[RankGpu], str]) -> dict[str, list[int]]:
    """Return the ranks with the same key, those with "" left out."""
    groups: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        if key(rank):
            groups.setdefault(key(rank), []).append(number)
    return groups


def _listed(ranks: Sequence[int]) -> str:
    *most, last = map(str, ranks)
    return f"{', '.join(most)} and {last}"
