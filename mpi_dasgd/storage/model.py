"""The trained model in HDF5: one dataset per entry of a torch state dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.atomic_file import atomic
from mpi_dasgd.storage.schema import LIBVER

if TYPE_CHECKING:
    import torch

__all__ = ["load_model", "save_model"]


def save_model(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state dictionary atomically: the file appears whole or not at all."""
    with atomic(Path(path)) as temporary, h5py.File(temporary, "w", libver=LIBVER) as file:
        for name, value in state.items():
            file.create_dataset(name, data=value.detach().cpu().numpy())


def load_model(path: str | Path) -> dict[str, torch.Tensor]:
    """Read what `save_model` wrote, for ``module.load_state_dict``.

    Raises:
        UserError: if the file is missing or damaged.
    """
    import torch

    try:
        with h5py.File(path, "r") as file:
            return {name: torch.as_tensor(file[name][()]) for name in file}
    except OSError as error:
        raise UserError(
            f"model {path}: expected an HDF5 file of a trained model: {error}"
        ) from error
