"""Vectors that `bench kernel` updates: a model, its gradient, and the state of its optimizer."""

from __future__ import annotations

from types import ModuleType

import numpy as np

__all__ = ["Models", "uniform"]


class Models:
    """A model with gradient and optimizer state in the memory of one device.

    Args:
        origin: initial model, float32, shape (elements,), in host memory.
        gradient: gradient, float32, shape (elements,), in host memory.
        xp: NumPy or CuPy.

    Attributes:
        origin, host_gradient: the arguments.
        x: model, float32, shape (elements,), on the device; operations change it.
        first, second: state of an optimizer, float32, shape (elements,), on the device.
        gradient: copy of the gradient on the device.
    """

    def __init__(self, origin: np.ndarray, gradient: np.ndarray, xp: ModuleType = np) -> None:
        self.origin, self.host_gradient, self.xp = origin, gradient, xp
        self.gradient = xp.asarray(gradient)
        self._start = xp.asarray(origin)  # on the host no copy; from there it would take longest
        self.x, self.first, self.second = (xp.empty(origin.size, np.float32) for _ in range(3))

    @classmethod
    def make(cls, elements: int) -> Models:
        """Return random models in host memory, the same for the same number of elements."""
        rng = np.random.default_rng(elements)
        return cls(uniform(rng, elements, 0.1), uniform(rng, elements, 0.01))

    def restore(self) -> None:
        """Reset the model to `origin`."""
        self.x[:] = self._start

    def restore_state(self) -> None:
        """Reset the state of the optimizer."""
        self.first[:] = self._start
        self.second[:] = self._start
        self.second *= self.second  # a mean of squares


def uniform(rng: np.random.Generator, elements: int, limit: float) -> np.ndarray:
    """Return uniform random numbers in [-limit, limit), float32, shape (elements,)."""
    values = rng.random(elements, np.float32)
    values -= np.float32(0.5)
    values *= np.float32(2 * limit)
    return values
