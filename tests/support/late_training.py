"""Training on a late device: `Decentralized` and the trainer, on real ranks, unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from mpi_dasgd.algorithms.build import RunParts
from mpi_dasgd.codecs import Codec
from mpi_dasgd.training import rank_parts
from mpi_dasgd.training.device_choice import DeviceChoice
from tests.support.late_codec import LateCodec
from tests.support.late_device import LateDevice

__all__ = ["GRID", "GridSteps", "late_training"]

GRID = 2.0**-8
"""Of values that no addition rounds."""


@contextlib.contextmanager
def late_training(
    delays: tuple[float, float],
    rank: int,
    *,
    memory: str = "host",
    make_codec: Callable[[int, np.dtype], Codec] | None = None,
) -> Iterator[list[LateCodec]]:
    """Within it, what is built to train on this rank exchanges on a late device.

    Args:
        delays: those of `LateDevice`.
        rank: seed of the delays.
        memory: memory of the payload slots.
        make_codec: makes the codec that computes, given elements and dtype; None: that of the run.

    Yields:
        The codecs that were made, whose `work` says what was found.
    """
    codecs: list[LateCodec] = []
    devices: list[LateDevice] = []
    original = RunParts.make_codec

    def choose(*_: Any) -> DeviceChoice:
        devices.append(LateDevice(delays, seed=rank))
        return DeviceChoice(devices[-1], memory, "a test")  # type: ignore[arg-type]

    def make(run: RunParts, rank: int, elements: int, dtype: np.dtype, *_: Any, **__: Any) -> Codec:
        inner = (
            original(run, rank, elements, dtype)
            if make_codec is None
            else make_codec(elements, dtype)
        )
        codecs.append(LateCodec(inner, devices[-1]))
        return codecs[-1]

    with (
        mock.patch.object(rank_parts, "choose_device", choose),
        mock.patch.object(RunParts, "make_codec", make),
    ):
        yield codecs


class GridSteps(torch.optim.Optimizer):
    """Steps without gradients, by multiples of `GRID`: they pull the model back and add noise.

    They keep the models apart, or a lost delta would soon be too small to be seen.

    Args:
        parameters: one vector, of multiples of `GRID`.
        seed: of the noise.

    Attributes:
        change: sum of all steps, float64.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], seed: int) -> None:
        super().__init__(parameters, {"lr": 1.0})
        (self._x,) = parameters
        self._random = torch.Generator().manual_seed(seed)
        self.change = torch.zeros(self._x.shape, dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        x = self._x
        noise = torch.randint(-256, 257, x.shape, generator=self._random)
        change = (noise - torch.trunc(x / (8 * GRID))) * GRID
        x += change
        self.change += change
