"""The gradient as a flat vector, for algorithms that exchange gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.parameter_layout import Segment

__all__ = ["GradientVector", "require_exchangeable_gradients"]


class GradientVector:
    """Gradients of the parameters in one vector.

    Args:
        segments: layout of the vector.
        vector: a vector of the same length, type and device, of which it has the layout.
    """

    def __init__(self, segments: Sequence[Segment], vector: torch.Tensor) -> None:
        self._vector = torch.zeros_like(vector)
        self._entries = [
            (placement, placement.view(self._vector[segment.part]))
            for segment in segments
            for placement in segment.placements
        ]

    def gather(self) -> torch.Tensor:
        """Return the gradient, (padded,), on the device of the parameters.

        Afterwards each `p.grad` of the vector's type is a view of it. Parameters without a gradient
        count as zero; those that are frozen are left without one.

        Raises:
            UserError: a gradient is sparse.
        """
        for placement, view in self._entries:
            p = placement.parameter
            grad = p.grad
            if grad is None:
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
        return self._vector

    def scatter(self) -> None:
        """Give parameters of other types the gradient that the vector holds."""
        for placement, view in self._entries:
            p = placement.parameter
            if p.dtype == view.dtype:
                continue
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
