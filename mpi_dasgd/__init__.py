"""Decentralized, asynchronous, quantized SGD for PyTorch over MPI one-sided communication."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi_dasgd.storage.model import load_model
    from mpi_dasgd.training.attach import attach
    from mpi_dasgd.training.decentralized import Decentralized
    from mpi_dasgd.training.sampler import sampler

__all__ = ["Decentralized", "__version__", "attach", "load_model", "sampler"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use: commands that need no MPI or torch do not load them."""
    if name == "Decentralized":
        from mpi_dasgd.training.decentralized import Decentralized

        return Decentralized
    if name == "attach":
        from mpi_dasgd.training.attach import attach

        return attach
    if name == "load_model":
        from mpi_dasgd.storage.model import load_model

        return load_model
    if name == "sampler":
        from mpi_dasgd.training.sampler import sampler

        return sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _watch_process_end() -> None:
    """Let the end of a rank that `mpi-dasgd launch` started be known to the others from now on."""
    from mpi_dasgd.process_end import is_launched, process_end
    from mpi_dasgd.world import expected_ranks

    if is_launched():
        size, rank = expected_ranks()
        process_end.watch(rank, size)
        process_end.report_exceptions()


if "MPI_DASGD_STAGE" in os.environ:
    _watch_process_end()
