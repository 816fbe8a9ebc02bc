"""A model that torch trains, and an equal one whose optimizer's steps are made in our passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from mpi_dasgd.device.host import HOST
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer

__all__ = ["OptimizerPair"]


def _model(channels_last: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 1)
    )
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups, in another order than the model's."""
    parameters = [*model.parameters()]
    return [{"params": parameters[::-2]}, {"params": parameters[-2::-2], "weight_decay": 0.03}]


class OptimizerPair:
    """A model that torch trains, and an equal one whose steps are made by a `TorchLocalOptimizer`.

    Torch computes as passes do: Adam and AdamW with ``fused=True``.

    Args:
        kind: class of the optimizers.
        options: their options.
        device: where the second model is exchanged.
        model: options of the models.

    Attributes:
        torchs_steps: steps that torch has made of the second model.
    """

    def __init__(
        self, kind: Any, options: dict[str, Any], device: Any = HOST, **model: bool
    ) -> None:
        self.plain, self.model = _model(**model), _model(**model)
        options = options if issubclass(kind, SGD) else {**options, "fused": True}
        self.reference = kind(_groups(self.plain), **copy.deepcopy(options))
        if not issubclass(kind, SGD):
            options["fused"] = None
        self.set_up(self.model, kind(_groups(self.model), **copy.deepcopy(options)), device)
        self._generator = torch.Generator().manual_seed(4)

    def set_up(self, model: nn.Module, optimizer: Any, device: Any = HOST) -> None:
        """Train `model`, exchanged on `device`."""
        self.optimizer = optimizer
        self.parameters = FlatParameters(model, optimizer, device)
        self.local = TorchLocalOptimizer(optimizer, self.parameters)
        self.local.run_step = self._run_torch
        self.torchs_steps = 0

    def _run_torch(self, closure: object) -> Any:
        self.torchs_steps += 1
        return self.optimizer.step(*(() if closure is None else (closure,)))

    def set_gradients(self, present: Callable[[int], bool] = lambda i: True) -> None:
        """Give both models the same gradients, those whose index is `present`.

        Those of the first have the layout of their parameters, since torch's fused kernels do not
        look at it; those of the second are contiguous.
        """
        pairs = zip(self.plain.parameters(), self.model.parameters(), strict=True)
        for index, (p, q) in enumerate(pairs):
            noise = torch.randn(p.shape, generator=self._generator)
            p.grad = torch.empty_like(p).copy_(noise) if present(index) else None
            q.grad = noise.clone() if present(index) else None

    def step(self, *, torchs: bool = False) -> None:
        """Make a step of both with new gradients.

        Args:
            torchs: whether torch is to make that of the second model.
        """
        self.set_gradients()
        self.apply(torchs=torchs)

    def apply(self, *, torchs: bool = False) -> None:
        """Make a step of both; see `step`."""
        self.reference.step()
        self.parameters.gather()
        self.local.begin_step(None)
        made = self.torchs_steps
        if torchs:
            hook = self.optimizer.register_step_pre_hook(_nothing)
            self.local.apply()
            hook.remove()
        else:
            self.local.apply()
        assert (self.torchs_steps > made) == torchs, "torch's step, or a pass's, was expected"

    def require_equal(self) -> None:
        """Assert that models and state of the optimizers are equal to the bit."""
        pairs = zip(self.model.named_parameters(), self.plain.parameters(), strict=True)
        for (name, p), q in pairs:
            assert torch.equal(p, q), name
            assert p.stride() == q.stride(), name
            ours, theirs = self.optimizer.state.get(p, {}), self.reference.state.get(q, {})
            assert [*ours] == [*theirs], name
            for key in ours:
                assert torch.equal(ours[key], theirs[key]), (name, key)
                assert ours[key].stride() == theirs[key].stride(), (name, key)
                assert ours[key].dtype == theirs[key].dtype, (name, key)


def _nothing(*_: object) -> None:
    pass
