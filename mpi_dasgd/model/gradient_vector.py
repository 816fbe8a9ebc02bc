"""The gradient as a flat vector, for algorithms that exchange gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.parameter_layout import Segment

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
        self._firsts = torch.tensor(firsts, device=vector.device)
        self._zeros = torch.zeros(len(firsts), dtype=vector.dtype, device=vector.device)

    def gather(self) -> torch.Tensor:
        """Return the gradient, (padded,), on the device of the parameters.

        Afterwards each `p.grad` of the vector's type is a view of it; frozen parameters are left
        without one.

        Raises:
            UserError: a gradient is sparse.
        """
        absent = []
        for index, (placement, view) in enumerate(self._entries):
            p = placement.parameter
            grad = p.grad
            if grad is None:
                absent.append(index)
                view.zero_()
                if not p.requires_grad:
                    continue
            elif grad.layout != torch.strided:
                raise UserError(
                    f"model: the gradient of parameter {placement.name} is sparse, and the "
                    "algorithm exchanges gradients, expected dense ones; use an algorithm that "
                    "exchanges models, such as 'adpsgd' or 'local_sgd', or sparse=False"
                )
            elif grad.data_ptr() != view.data_ptr():
                view.copy_(grad)
            if p.dtype == view.dtype:
                p.grad = view
        self._vector.index_add_(0, self._firsts, self._zeros)  # -0 + 0 is 0
        if absent:
            self._vector.index_fill_(0, self._firsts[absent], -0.0)
        return self._vector

    def scatter(self) -> None:
        """Give the parameters the gradients that the vector holds, and none where no rank has one.

        Those of the vector's type have views of it already.
        """
        firsts = self._vector[self._firsts].tolist()
        for first, (placement, view) in zip(firsts, self._entries, strict=True):
            p = placement.parameter
            if first == 0 and math.copysign(1, first) < 0:
                p.grad = None
            elif p.dtype != view.dtype:
                if p.grad is not None:
                    p.grad.copy_(view)
                elif p.requires_grad:
                    p.grad = view.to(p.dtype)


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
