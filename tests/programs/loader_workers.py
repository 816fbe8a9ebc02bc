"""Trains from DataLoaders whose workers start in every way; the script imports MPI at its top.

What a worker imports is imported by spawned ones again: MPI with it, as many scripts do.
"""

from __future__ import annotations

import sys
import warnings

import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, Dataset, get_worker_info

import mpi_dasgd

RANK = MPI.COMM_WORLD.rank


class Numbers(Dataset):
    """The numbers from 0, and the worker that has read each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        info = get_worker_info()
        assert info is not None
        return torch.tensor([float(index), float(info.id)])


def main() -> None:
    warnings.simplefilter("ignore")  # there is no memory to pin without a GPU
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    training = mpi_dasgd.Decentralized(model, optimizer)
    for method, more in (
        ("fork", {}),
        ("fork", {"persistent_workers": True, "pin_memory": True}),
        ("spawn", {}),
        ("forkserver", {"persistent_workers": True}),
    ):
        loader = DataLoader(
            Numbers(), 2, num_workers=1, multiprocessing_context=method, timeout=50, **more
        )
        for _ in range(2 if more else 1):
            read = []
            for x in loader:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                training.step(len(x))
                read += x[:, 0].tolist()
            assert read == list(range(8)), (method, read)
        del loader
    training.close()
    sys.stdout.write(f"rank {RANK}: {training.samples} samples\n")  # in one piece


if __name__ == "__main__":
    main()
