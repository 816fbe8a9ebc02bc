"""A torch module as one flat vector: views where possible, one copy where not."""

from __future__ import annotations

import numpy as np
import torch
import xxhash

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.encoded import BUCKET

__all__ = ["FlatParameters"]


class FlatParameters:
    """Trainable parameters of a module in one contiguous float32 vector.

    The parameters become views of the vector, so that the module computes with what an exchange
    changes. Padding behind them is zero.

    Args:
        module: module whose parameters are on one device.

    Raises:
        UserError: no trainable parameters, dtypes other than float32, or several devices.

    Attributes:
        size: number of parameters, without padding.
        host_view: the vector, (padded,), float32, in host memory. On the CPU it is the memory of
            the parameters; on a GPU `copy_to_host` and `copy_to_device` copy between the two.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise UserError(f"model: {type(module).__name__} has no trainable parameters")
        for name, p in named:
            if p.dtype != torch.float32:
                raise UserError(
                    f"model: parameter {name} is {p.dtype}, expected torch.float32: keep float32 "
                    "weights, and use torch.autocast for lower precision"
                )
        devices = {p.device for _, p in named}
        if len(devices) > 1:
            raise UserError(f"model: parameters are on several devices ({devices}), expected one")
        self._parameters = [p for _, p in named]
        self.size = sum(p.numel() for p in self._parameters)
        padded = -(-self.size // BUCKET) * BUCKET
        self._flat = torch.zeros(padded, device=devices.pop())
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
        self._buffers = [
            *module.buffers(),
            *(p for p in module.parameters() if not p.requires_grad),
        ]
        self._on_host = self._flat.device.type == "cpu"
        pinned = not self._on_host
        self._mirror = self._flat if self._on_host else torch.zeros(padded, pin_memory=pinned)
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

    def buffers(self) -> np.ndarray:
        """Return a copy of all buffers and frozen parameters, (buffer elements,), float64.

        Buffers are, for example, the running statistics of batch normalization.
        """
        parts = [b.detach().reshape(-1).to("cpu", torch.float64) for b in self._buffers]
        return torch.cat(parts).numpy() if parts else np.empty(0)

    def set_buffers(self, values: np.ndarray) -> None:
        """Set buffers and frozen parameters from `values`, (buffer elements,), float64.

        Values of integer buffers are rounded.
        """
        start = 0
        with torch.no_grad():
            for b in self._buffers:
                part = torch.from_numpy(values[start : start + b.numel()]).view(b.shape)
                b.copy_(part if b.is_floating_point() else part.round())
                start += b.numel()

    def set(self, vector: np.ndarray) -> None:
        """Set all parameters from `vector`, (padded,), any float dtype."""
        self.host_view[:] = vector
        self.copy_to_device()

    def digest(self) -> str:
        """Return a hash, 32 hexadecimal digits, of parameters and buffers."""
        self.copy_to_host()
        digest = xxhash.xxh3_128(self.host_view.data)
        digest.update(self.buffers().data)
        return digest.hexdigest()
