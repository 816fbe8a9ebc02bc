"""The settings of an optimizer's groups, as the scalars of a step."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpi_dasgd.kernels.optimizer import OptimizerStep, adam_group, sgd_group
from mpi_dasgd.training.optimizer_state import STEP, NotServed

__all__ = ["AdamGroups", "SgdGroups", "StepGroups"]

_LARGE = 1e30  # float32, which a pass computes with, ends at 3e38, where torch raises an error


class StepGroups:
    """Base of the groups of a kind of optimizers.

    Attributes:
        order: names of the state that is as large as the model, as a step takes them.
        starts_empty: whether state begins with what the first step writes, else with zeros.
        names: names of the state of the parameters of each group.
        lr: learning rate of the first group.
    """

    order: tuple[str, ...]
    starts_empty: bool
    _keys: tuple[str, ...]

    def __init__(self) -> None:
        self.names: list[tuple[str, ...]] = []
        self.lr = 0.0
        self._get = operator.itemgetter(*self._keys)
        self._settings: list[Any] = []
        self._types: list[type] = []
        self._factors: tuple[float, ...] = ()
        self._scalars: list[Any] = []  # of each group, the learning rate as a number
        self.forget()

    def forget(self) -> None:
        """Have the next step written as a whole: it is another object, or of other parameters."""
        self._written: object = None  # which parameter has which group
        self._rows_written = False

    def read(self, groups: Sequence[dict[str, Any]], factors: tuple[float, ...]) -> None:
        """Read the settings, where they have changed.

        Args:
            groups: groups of the optimizer.
            factors: on the learning rates.

        Raises:
            NotServed: a pass cannot do what they say.
            KeyError: one is missing.
        """
        settings = [*map(self._get, groups)]
        types = [*map(type, itertools.chain.from_iterable(settings))]  # some are equal to others'
        if types == self._types and settings == self._settings and factors == self._factors:
            return
        self._settings, self._types = [], types
        scalars = [(self._rate(setting[0], factors), *setting[1:]) for setting in settings]
        for setting in scalars:
            self._require_served(setting)
        self.names = [*map(self._state_names, scalars)]
        self._scalars, self._factors = scalars, factors
        self._rows_written = False
        self.lr = scalars[0][0] if scalars else 0.0
        if not any(isinstance(setting[0], torch.Tensor) for setting in settings):
            self._settings = settings  # else one may be changed in place

    @staticmethod
    def _rate(lr: Any, factors: tuple[float, ...]) -> float:
        if isinstance(lr, torch.Tensor) and (
            lr.requires_grad or lr.device.type != "cpu" or lr.numel() != 1
        ):
            raise NotServed("a learning rate is a tensor with a gradient, or elsewhere")
        if isinstance(lr, np.ndarray):  # may be changed in place, and Adam of torch refuses it
            raise NotServed("a learning rate is an array")
        if any(factor != 1 for factor in factors):
            for factor in factors:
                lr = lr * factor
        return float(lr)

    def _require_served(self, setting: Sequence[Any]) -> None:
        raise NotImplementedError

    def _state_names(self, setting: Sequence[Any]) -> tuple[str, ...]:
        raise NotImplementedError


class SgdGroups(StepGroups):
    """Groups of SGD: two rows for each, of which the second is of momentum that begins."""

    order = ("momentum_buffer",)
    starts_empty = True
    _keys = (
        "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable",
        "fused",
    )  # fmt: skip

    def write(self, step: OptimizerStep, group_of: Sequence[int], starting: Sequence[int]) -> None:
        """Write groups, and which segment has which.

        Args:
            step: the step.
            group_of: group of each segment.
            starting: segments whose momentum begins with this step.
        """
        if not self._rows_written:
            self._rows_written = True
            for group, setting in enumerate(self._scalars):
                for first in (False, True):
                    step.groups[2 * group + first] = _sgd_row(setting, first)
        if starting or self._written is not group_of:
            which = [2 * group for group in group_of]
            for segment in starting:
                which[segment] += 1
            step.segments["group"] = which
            self._written = None if starting else group_of

    def _require_served(self, setting: Sequence[Any]) -> None:
        _require_numbers(setting[:4])
        _require_eager(setting[6:7])

    def _state_names(self, setting: Sequence[Any]) -> tuple[str, ...]:
        return self.order if setting[1] != 0 else ()


class AdamGroups(StepGroups):
    """Groups of Adam and AdamW: a row for each, at each number of steps made.

    Args:
        on_device: whether the parameters are on a device, where torch's fused steps count there.
    """

    order = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    starts_empty = False
    _keys = (
        "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay",
        "capturable", "differentiable", "fused",
    )  # fmt: skip

    def __init__(self, *, on_device: bool) -> None:
        super().__init__()
        self._on_device = on_device

    def write(
        self,
        step: OptimizerStep,
        group_of: Sequence[int],
        counts: Sequence[float],
        present: Sequence[int] | None,
    ) -> None:
        """Write groups, and which segment has which.

        Args:
            step: the step.
            group_of: group of each segment.
            counts: steps made of each segment that has a gradient.
            present: these segments; None: all.
        """
        if not counts:
            return
        if counts.count(counts[0]) == len(counts):
            for group, setting in enumerate(self._scalars):
                step.groups[group] = _adam_row(setting, counts[0] + 1)
            if self._written is not group_of:
                step.segments["group"] = group_of
                self._written = group_of
            return
        self._written = None
        rows: dict[tuple[int, float], int] = {}
        which = step.segments["group"]
        segments = range(len(group_of)) if present is None else present
        for segment, count in zip(segments, counts, strict=True):
            key = group_of[segment], count
            if key not in rows:
                rows[key] = len(rows)
                step.groups[rows[key]] = _adam_row(self._scalars[key[0]], count + 1)
            which[segment] = rows[key]

    def _require_served(self, setting: Sequence[Any]) -> None:
        _require_numbers((setting[0], *setting[1], *setting[2:4]))
        _require_eager(setting[7:9])
        if self._on_device and setting[9]:
            raise NotServed("fused=True counts the steps on the device")

    def _state_names(self, setting: Sequence[Any]) -> tuple[str, ...]:
        names = STEP, *self.order
        return names if setting[4] else names[:-1]


def _sgd_row(setting: Sequence[Any], first: bool) -> tuple[Any, ...]:
    lr, momentum, dampening, decay = map(float, setting[:4])
    nesterov, maximize, _, fused = map(bool, setting[4:8])
    return sgd_group(
        lr, momentum, dampening, decay, nesterov=nesterov, maximize=maximize, first=first,
        fused=fused,
    )  # fmt: skip


def _adam_row(setting: Sequence[Any], count: float) -> tuple[Any, ...]:
    lr, betas, eps, decay, amsgrad, maximize, decoupled, *_ = setting
    try:
        return adam_group(
            lr,
            (float(betas[0]), float(betas[1])),
            float(eps),
            float(decay),
            count,
            amsgrad=bool(amsgrad),
            maximize=bool(maximize),
            decoupled=bool(decoupled),
        )
    except (ArithmeticError, ValueError) as error:
        raise NotServed(f"its settings give no step: {error}") from error


def _require_numbers(values: Sequence[Any]) -> None:
    if not all(isinstance(value, int | float | np.floating) for value in values):
        raise NotServed("its settings are not all numbers")
    if any(_LARGE < abs(value) < math.inf for value in values):
        raise NotServed("its settings are too large")


def _require_eager(flags: Sequence[Any]) -> None:
    if any(flags):
        raise NotServed("it is differentiable or capturable")
