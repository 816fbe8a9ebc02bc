"""A torch module as one flat vector: views where possible, one copy where not."""

from __future__ import annotations

import numpy as np
import torch
import xxhash

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.encoded import BUCKET
from mpi_dasgd.training.parameter_selection import select_parameters

__all__ = ["FlatParameters"]


class FlatParameters:
    """Trainable parameters of a module and its optimizer in one contiguous float32 vector.

    The parameters become views of the vector, so that the module computes with what an exchange
    changes. Padding behind them is zero. Which parameters it has, `select_parameters` says.

    Args:
        module: module whose parameters are on one device.
        optimizer: its optimizer; None: only the parameters of `module` that require a gradient.

    Raises:
        UserError: no trainable parameters, dtypes other than float32, or several devices.

    Attributes:
        size: number of parameters, without padding.
        dtype: type of the vector.
        parameters: the parameters that are in the vector, in its order.
        names: their names.
        host_view: the vector, (padded,), `dtype`, in host memory. On the CPU it is the memory of
            the parameters; on a GPU `copy_to_host` and `copy_to_device` copy between the two.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        named = select_parameters(module, optimizer)
        for name, p in named:
            if p.dtype != torch.float32:
                raise UserError(
                    f"model: parameter {name} is {p.dtype}, expected torch.float32: keep float32 "
                    "weights, and use torch.autocast for lower precision"
                )
        self.names = [name for name, _ in named]
        self.parameters = self._parameters = [p for _, p in named]
        self.dtype = np.dtype(np.float32)
        self._ends = np.cumsum([p.numel() for p in self._parameters])
        self.size = int(self._ends[-1])
        padded = -(-self.size // BUCKET) * BUCKET
        self._flat = torch.zeros(padded, device=named[0][1].device, dtype=torch.float32)
        self._gradient = torch.zeros_like(self._flat)
        self._gradient_views = []
        start = 0
        with torch.no_grad():
            for p in self._parameters:
                part = slice(start, start + p.numel())
                self._flat[part].copy_(p.reshape(-1))
                p.data = self._flat[part].view_as(p)
                self._gradient_views.append(self._gradient[part].view_as(p))
                start += p.numel()
        self._on_host = self._flat.device.type == "cpu"
        pinned = not self._on_host
        self._mirror = (
            self._flat
            if self._on_host
            else torch.zeros(padded, dtype=torch.float32, pin_memory=pinned)
        )
        self.host_view: np.ndarray = self._mirror.numpy()
        self.copy_to_host()

    def copy_to_host(self) -> None:
        """Copy the parameters from the device to `host_view`, where these differ."""
        if not self._on_host:
            self._mirror.copy_(self._flat)

    def copy_to_device(self) -> None:
        """Copy `host_view` to the parameters on the device, where these differ."""
        if not self._on_host:
            self._flat.copy_(self._mirror)

    def gather_gradient(self) -> torch.Tensor:
        """Return the gradient as one vector, (padded,), float32, on the device of the parameters.

        Afterwards each `p.grad` is a view of it. Parameters without a gradient count as zero.
        """
        for p, view in zip(self._parameters, self._gradient_views, strict=True):
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
            p.grad = view
        return self._gradient

    def name_of(self, index: int) -> str:
        """Return the name of the parameter that element `index` of the vector belongs to."""
        if index >= self.size:
            return "padding"
        return self.names[int(np.searchsorted(self._ends, index, side="right"))]

    def description(self) -> list[tuple[str, tuple[int, ...], str, tuple[int, ...], int]]:
        """Return name, shape, dtype, strides and offset in the vector of each parameter.

        Ranks whose descriptions are equal have the same vector.
        """
        starts = [0, *self._ends.tolist()]
        return [
            (name, tuple(p.shape), str(p.dtype), p.stride(), start)
            for name, p, start in zip(self.names, self._parameters, starts, strict=False)
        ]

    def set(self, vector: np.ndarray) -> None:
        """Set all parameters from `vector`, (padded,), any float dtype."""
        self.host_view[:] = vector
        self.copy_to_device()

    def digest(self) -> str:
        """Return a hash, 32 hexadecimal digits, of the vector."""
        self.copy_to_host()
        return xxhash.xxh3_128_hexdigest(self.host_view.data)
