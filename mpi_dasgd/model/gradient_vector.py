"""The gradient as a flat vector, for algorithms that exchange gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.parameter_layout import Placement, Segment

__all__ = ["GradientVector", "require_exchangeable_gradients"]


class GradientVector:
    """Gradients of the parameters in one vector.

    A parameter without a gradient has zeros, of which the first is -0. In a sum of gradients it
    stays -0 only if no rank has one, since -0 + 0 is 0: the optimizer then leaves the parameter
    alone, as in plain torch. A gradient that is there never begins with -0.

    Args:
        segments: layout of the vector.
        vector: a vector of the same length, type and device, of which it has the layout.
    """

    def __init__(self, segments: Sequence[Segment], vector: torch.Tensor) -> None:
        self._vector = torch.zeros_like(vector)
        members = [(s, p) for s in segments for p in s.placements if p.parameter.numel()]
        self._entries = [(p, p.view(self._vector[segment.part])) for segment, p in members]
        firsts = [segment.start + p.offset * (1 + p.is_complex) for segment, p in members]
        self._firsts = _Elements(self._vector, firsts)
        self._retyped: list[tuple[Placement, torch.Tensor]] = []  # entries of another type

    def gather(self) -> torch.Tensor:
        """Return the gradient, (padded,), on the device of the parameters.

        Afterwards each `p.grad` of the vector's type is a view of it; frozen parameters are left
        without one.

        Raises:
            UserError: a gradient is sparse.
        """
        absent: list[int] = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        owners: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._retyped = []
        for index, entry in enumerate(self._entries):
            placement, view = entry
            p = placement.parameter
            grad = p.grad
            if grad is None:
                absent.append(index)
            elif grad.layout != torch.strided:
                raise UserError(
                    f"model: the gradient of parameter {placement.name} is sparse, and the "
                    "algorithm exchanges gradients, expected dense ones; use an algorithm that "
                    "exchanges models, such as 'adpsgd' or 'local_sgd', or sparse=False"
                )
            elif grad.data_ptr() != view.data_ptr():
                copies.append((view, grad))
            if p.dtype != view.dtype:
                self._retyped.append(entry)
            elif grad is not None or p.requires_grad:
                owners.append((p, view))
        with torch.no_grad():  # those of backward(create_graph=True) have a history
            for view, grad in copies:
                view.copy_(grad)
        for p, view in owners:
            p.grad = view
        for index in absent:
            self._entries[index][1].zero_()
        self._firsts.clear_signs()
        if absent:
            self._firsts.set_negative(absent)
        return self._vector

    def scatter(self) -> None:
        """Give the parameters the gradients that the vector holds, and none where no rank has one.

        Those of the vector's type have views of it already.
        """
        for placement, view in self._retyped:
            p = placement.parameter
            if p.grad is not None:
                p.grad.copy_(view)
            elif p.requires_grad:
                p.grad = view.to(p.dtype)
        for index in self._firsts.negative():
            self._entries[index][0].parameter.grad = None


class _Elements:
    """Elements of a vector, which are looked at for zeros that are negative.

    In host memory one by one: indexing by torch takes longer than it does for 100 of them.

    Args:
        vector: the vector, of real numbers.
        positions: where the elements are.
    """

    def __init__(self, vector: torch.Tensor, positions: Sequence[int]) -> None:
        self._vector = vector
        self._positions = positions
        self._on_host = vector.device.type == "cpu"
        if self._on_host:
            self._numbers: Any = memoryview(vector.numpy())
        else:
            self._index = torch.tensor(positions, device=vector.device)
            self._zeros = torch.zeros(len(positions), dtype=vector.dtype, device=vector.device)

    def _read(self) -> list[float]:
        if self._on_host:
            return [self._numbers[position] for position in self._positions]
        numbers: list[float] = self._vector[self._index].tolist()
        return numbers

    def negative(self) -> list[int]:
        """Return which of the elements are -0."""
        numbers = self._read()
        if 0 not in numbers:
            return []
        return [i for i, x in enumerate(numbers) if x == 0 and math.copysign(1, x) < 0]

    def clear_signs(self) -> None:
        """Set those that are -0 to 0."""
        if not self._on_host:
            self._vector.index_add_(0, self._index, self._zeros)  # -0 + 0 is 0
            return
        for i in self.negative():
            self._numbers[self._positions[i]] = 0.0

    def set_negative(self, indices: Sequence[int]) -> None:
        """Set some of them to -0."""
        if not self._on_host:
            self._vector.index_fill_(0, self._index[indices], -0.0)
            return
        for i in indices:
            self._numbers[self._positions[i]] = -0.0


def require_exchangeable_gradients(
    module: torch.nn.Module, segments: Sequence[Segment], algorithm: str
) -> None:
    """Refuse parameters whose gradients cannot be parts of one vector.

    Args:
        module: the model.
        segments: layout of the vector.
        algorithm: name of the algorithm, which exchanges gradients.

    Raises:
        UserError: a layer makes sparse gradients, or two parameters share memory, which have two
            gradients.
    """
    remedy = (
        f"algorithm.name: {algorithm!r} exchanges gradients, and {{}}; use an algorithm that "
        "exchanges models, such as 'adpsgd' or 'local_sgd'{}"
    )
    exchanged = {id(placement.parameter) for s in segments for placement in s.placements}
    for name, layer in module.named_modules():
        is_embedding = isinstance(layer, torch.nn.Embedding | torch.nn.EmbeddingBag)
        if is_embedding and layer.sparse and id(layer.weight) in exchanged:
            weight = f"{name}.weight".removeprefix(".")
            what = f"those of {weight} are sparse ({type(layer).__name__}(sparse=True))"
            raise UserError(remedy.format(what, ", or sparse=False"))
    for segment in segments:
        if len(segment.placements) > 1:
            names = " and ".join(placement.name for placement in segment.placements)
            what = f"{names} share memory but have gradients of their own"
            raise UserError(remedy.format(what, ", or tie the parameters: a.weight = b.weight"))
