"""Tensors as bytes: every dtype exactly, whatever the strides."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["read_bytes", "write_bytes"]


def read_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the elements of `tensor` in row-major order as bytes, (bytes,), uint8.

    On the CPU these may be the memory of the tensor: copy what must not change with it.
    """
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not values.numel():
        return np.empty(0, np.uint8)
    line = values.as_strided((values.numel(),), (1,))  # a single element may have any stride
    return np.asarray(line.view(torch.uint8).numpy())


def write_bytes(tensor: torch.Tensor, data: np.ndarray) -> None:
    """Set the elements of `tensor` from what `read_bytes` returned of an equal one.

    A tensor that has these bytes is not touched: it may be expanded, or memory that is read-only.
    """
    if np.array_equal(read_bytes(tensor), data):
        return
    values = torch.from_numpy(data.copy()).view(tensor.dtype).to(tensor.device)
    # Tensors of the inference mode can be changed in it only.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if _has_own_memory(tensor):
            tensor.copy_(values.view(tensor.shape))
        else:
            _write_overlapping(tensor.detach(), values)


def _has_own_memory(tensor: torch.Tensor) -> bool:
    """Return whether each element has its own memory; False also where that is not obvious."""
    span = 1
    dimensions = [d for d in zip(tensor.stride(), tensor.shape, strict=True) if d[1] > 1]
    for stride, size in sorted(dimensions):
        if stride < span:
            return False
        span += stride * (size - 1)
    return True


def _write_overlapping(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Set a tensor of which elements share memory, as those of expanded ones do."""
    offsets = (s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    span = 1 + sum(offsets)
    memory = tensor.as_strided((span,), (1,))
    places = torch.arange(span, device=tensor.device).as_strided(tensor.shape, tensor.stride(), 0)
    memory[places.reshape(-1)] = values
