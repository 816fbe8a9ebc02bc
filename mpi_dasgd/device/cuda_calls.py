"""Calls of CUDA: every status that is not success becomes a `DeviceFailed`, and stays one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mpi_dasgd.errors import DeviceFailed

__all__ = ["CudaCalls"]


class CudaCalls:
    """What CUDA says to the calls of a device.

    Errors of a GPU are sticky: nothing that is asked of it later is done. The first one is kept,
    so that every later call reports it and not its consequences.

    Args:
        cupy: the module.
        device: name of the device, for messages.

    Attributes:
        runtime: CUDA's runtime as CuPy binds it.
        device: name of the device.
    """

    def __init__(self, cupy: Any, device: str) -> None:
        self.runtime = cupy.cuda.runtime
        self.device = device
        self._driver = cupy.cuda.driver
        self._errors: tuple[type[Exception], ...] = (
            self.runtime.CUDARuntimeError,
            self._driver.CUDADriverError,
        )
        if hasattr(torch, "AcceleratorError"):  # since 2.8; before, it is a RuntimeError
            self._errors += (torch.AcceleratorError,)
        self._failure: str | None = None

    def require_working(self) -> None:
        """Raise if the device has failed.

        Raises:
            DeviceFailed: the device has failed.
        """
        if self._failure is not None:
            raise DeviceFailed(self._failure)

    @contextmanager
    def checked(self, operation: str) -> Iterator[None]:
        """Turn CUDA's errors in the ``with`` block, and all that follow them, into `DeviceFailed`.

        Args:
            operation: what the block does, for the message.

        Raises:
            DeviceFailed: the device has failed, here or before.
        """
        self.require_working()
        try:
            yield
        except self._errors as error:
            raise self._failed(operation, error) from error

    def refused(self, operation: str, error: Exception) -> DeviceFailed:
        """Return the error of an operation that leaves the device as it was."""
        return DeviceFailed(f"{self.device}: {operation} failed: {error}")

    def require_success(self, operation: str, status: int) -> None:
        """Raise if a call of the runtime has returned an error.

        Raises:
            DeviceFailed: it has.
        """
        if status:
            raise self._failed(operation, self.runtime.CUDARuntimeError(status))

    def require_driver_success(self, operation: str, status: int) -> None:
        """Raise if a call of the driver has returned an error.

        Raises:
            DeviceFailed: it has.
        """
        if status:
            raise self._failed(operation, self._driver.CUDADriverError(status))

    def _failed(self, operation: str, error: Exception) -> DeviceFailed:
        failure = self.refused(operation, error)
        self._failure = self._failure or str(failure)
        return failure
