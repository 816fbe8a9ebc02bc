"""Steps of optimizers on random models, the same for all back ends: all flags, odd segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mpi_dasgd.kernels import optimizer
from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, OptimizerStep, adam_group, sgd_group

SIZES = (1, 17, 1024, 1025, 5000)


@dataclass
class OptimizerCase:
    """A model, and the groups of a step on it."""

    name: str
    elements: int
    groups: list[optimizer.Group]
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, {self.elements} elements"

    def make(self) -> tuple[np.ndarray, OptimizerStep]:
        """Return the model and the step; segments have gaps, and some have no gradient."""
        rng = np.random.default_rng(self.seed)
        n = self.elements
        cuts = np.unique(rng.integers(0, n + 1, min(n, 9)))
        edges = [0, *cuts.tolist(), n]
        segments = np.zeros(len(edges) - 1, SEGMENT)
        gradients = []
        for i, (first, last) in enumerate(pairwise(edges)):
            gap = i % 4 == 3 and last > first + 1  # elements of no parameter
            count = last - first - gap
            gradients.append(_values(rng, count))
            address = 0 if i % 5 == 4 or not count else gradients[-1].ctypes.data
            segments[i] = first, count, address, i % len(self.groups)
        state = [np.abs(_values(rng, n)) for _ in range(3)]
        state[0] *= rng.choice([-1, 1], n).astype(np.float32)
        step = OptimizerStep(segments, np.array(self.groups, GROUP), *state)
        step.gradients = gradients
        return _values(rng, n), step


def cases(sizes: tuple[int, ...] = SIZES) -> Iterator[OptimizerCase]:
    """Yield all kinds of steps on models of some sizes."""
    for size in sizes:
        for name, groups in kinds():
            yield OptimizerCase(name, size, groups, seed=size)


def kinds() -> Iterator[tuple[str, list[optimizer.Group]]]:
    """Yield groups of steps: all combinations of flags that there are."""
    for bits in range(8):
        maximize, decay = bool(bits & 1), 0.01 * bool(bits & 2)
        factor = 0.37 if bits & 4 else 1.0
        more = {"maximize": maximize, "factor": factor}
        name = f"maximize={maximize}, decay={decay}, factor={factor}"
        yield f"SGD, {name}", [sgd_group(0.1, 0.0, 0.0, decay, **more)]  # type: ignore[arg-type]
        for nesterov in (False, True):
            dampening = 0.0 if nesterov else 0.25
            yield (
                f"SGD, momentum, nesterov={nesterov}, {name}",
                [
                    sgd_group(
                        0.1 / (1 + first), 0.9, dampening, decay, nesterov=nesterov, first=first,
                        maximize=maximize, factor=factor, fused=fused,
                    )
                    for fused in (False, True)
                    for first in (False, True)
                ],
            )  # fmt: skip
        for amsgrad in (False, True):
            for decoupled in (False, True):
                yield (
                    f"Adam, amsgrad={amsgrad}, decoupled={decoupled}, {name}",
                    [
                        adam_group(
                            0.01, (beta, 0.99), 1e-8, decay, number, amsgrad=amsgrad,
                            decoupled=decoupled, maximize=maximize, factor=factor,
                        )
                        for beta, number in ((0.9, 1), (0.4, 7))
                    ],
                )  # fmt: skip


def _values(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return numbers of many magnitudes, of both signs, some of them zero."""
    values = rng.standard_normal(count) * 10.0 ** rng.integers(-6, 2, count)
    values[rng.random(count) < 0.01] = 0
    return values.astype(np.float32)
