"""The step of a user's optimizer as one that a pass over memory makes, before it exchanges.

The optimizer stays the user's object: its groups say the rates of each step, and its state is where
torch has it (`optimizer_state`). Whether torch's own step can be replaced is decided anew in every
step, so that both may alternate: hooks, closures, other gradients, and what else a pass does not
know come and go. The bits are those of torch's optimizer; of Adam and AdamW with ``fused=True``
(`mpi_dasgd.kernels.optimizer`).
"""

from __future__ import annotations

import array
import itertools
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, OptimizerStep, adam_group, sgd_group
from mpi_dasgd.model.flat_memory import same_format
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.optimizer_eligibility import Eligibility
from mpi_dasgd.training.optimizer_state import STEP, NotServed, OptimizerState

__all__ = ["FusedOptimizer"]

_log = logging.getLogger("mpi_dasgd")
_params = operator.itemgetter("params")
_pointer = torch.Tensor.data_ptr
_is_contiguous = torch.Tensor.is_contiguous
_stride = torch.Tensor.stride
_nbytes = operator.attrgetter("nbytes")
_flat = itertools.chain.from_iterable

_SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable")
_ADAM = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay",
    "capturable", "differentiable",
)  # fmt: skip
_BUFFER = ("momentum_buffer",)
_MOMENTS = (STEP, "exp_avg", "exp_avg_sq")
_LARGEST = "max_exp_avg_sq"


class FusedOptimizer:
    """Describes the steps of an optimizer for a pass: `prepare`, the pass, `complete`.

    Args:
        optimizer: any optimizer of torch.
        parameters: parameters of its model.

    Attributes:
        lr: learning rate of the first group in the newest step that was prepared.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: FlatParameters) -> None:
        self.lr = 0.0
        self._optimizer, self._parameters = optimizer, parameters
        self._eligibility = Eligibility(optimizer)
        self._is_sgd = isinstance(optimizer, torch.optim.SGD)
        self._get = operator.itemgetter(*(_SGD if self._is_sgd else _ADAM))
        self._said: set[str] = set()
        segments = parameters.segments if parameters.dtype == np.float32 else ()
        self._segments = [s for s in segments if len(s.placements) == 1]
        self._segments = [s for s in self._segments if not s.placements[0].is_complex]
        self._index = {id(s.placements[0].parameter): i for i, s in enumerate(self._segments)}
        device = parameters.flat.device
        self._state = OptimizerState(optimizer, self._segments, parameters.flat.numel(), device)
        self._members: list[torch.Tensor] = []
        self._sizes: list[int] = []
        self._settings: list[Any] | None = None
        self._factors: tuple[float, ...] = ()
        self._scalars: list[tuple[Any, ...]] = []  # of each group, as numbers
        self._fresh: set[int] | None = None  # places in the step without state; None: look
        self._step: OptimizerStep | None = None
        self._groups_of_step: list[float] | list[bool] = []
        self._present: list[int] | None = None  # places that have a gradient; None: all
        self._starting: list[int] = []

    def prepare(self, *factors: float) -> OptimizerStep | None:
        """Return the step that the optimizer would make; None: torch has to make it.

        Args:
            factors: on the learning rates.
        """
        try:
            return self._prepare(factors)
        except NotServed as error:
            reason = str(error)
        except KeyError as error:
            reason = f"its groups lack {error}"
        if reason not in self._said:
            self._said.add(reason)
            _log.debug("optimizer: torch makes its own step: %s", reason)
        return None

    def complete(self) -> None:
        """Note that a pass has made the step that was prepared."""
        step, optimizer = self._step, self._optimizer
        assert step is not None
        present = self._present
        if not self._is_sgd:
            if present is None:
                self._counts[self._places] += 1
            else:
                self._counts[self._places[present]] += 1
        for place in self._starting:
            self._state.add(self._indices[place], _BUFFER, zero=False)
        if self._starting:
            self._fresh = None
        changed = self._served if present is None else [self._served[i] for i in present]
        torch.autograd.graph.increment_version(changed)  # backward refuses what it has saved
        if "step" in optimizer.__dict__:  # a scheduler's, which wants to know
            optimizer._opt_called = True  # type: ignore[attr-defined]
        step.gradients = None

    def _prepare(self, factors: tuple[float, ...]) -> OptimizerStep:
        if obstacle := self._eligibility.obstacle():
            raise NotServed(obstacle)
        if not self._parameters.lives_in_vector:
            raise NotServed("parameters have memory of their own")
        groups = self._optimizer.param_groups
        tables = [*map(_params, groups)]
        members = [*_flat(tables)]
        if (
            len(members) != len(self._members)
            or not all(map(operator.is_, members, self._members))
            or [*map(len, tables)] != self._sizes
        ):
            self._lay_out(members, [*map(len, tables)])
        self._take_settings(groups, factors)
        gradients, pointers, present = self._gradients()
        if self._fresh is None or not self._state.is_known:
            self._adopt()
        starting: list[int] = []
        if self._fresh:
            starting = self._begin_state(present)
        self._present, self._starting = present, starting
        step = self._step
        if step is None:
            step = self._step = self._make_step()
        self._set_groups(step, present, starting)
        if pointers != self._pointers:
            self._pointers = pointers
            step.segments["gradient"] = array.array("Q", pointers)
        step.gradients = gradients
        step.nonfinite[0] = 0
        return step

    def _lay_out(self, members: list[torch.Tensor], sizes: list[int]) -> None:
        """Note which parameters the groups have.

        Raises:
            NotServed: one is not alone in its place of a vector of float32.
        """
        self._members = []  # look again, if this fails
        group_of = [g for g, size in enumerate(sizes) for _ in range(size)]
        placed: list[tuple[int, int]] = []
        for p, group in zip(members, group_of, strict=True):
            index = self._index.get(id(p))
            if index is None:
                raise NotServed("not all of its parameters are real, float32 and disjoint")
            placed.append((index, group))
        placed.sort()
        self._indices = [index for index, _ in placed]
        if len(set(self._indices)) < len(placed):
            raise NotServed("it has a parameter twice")
        self._places = np.array(self._indices, np.intp)
        self._group_of = [group for _, group in placed]
        segments = [self._segments[index] for index in self._indices]
        self._served = [s.placements[0].parameter for s in segments]
        self._bytes = [s.elements * 4 for s in segments]
        self._strides: list[tuple[int, ...]] | None = None
        if not all(map(_is_contiguous, self._served)):
            self._strides = [*map(_stride, self._served)]
        self._single = [i for i, s in enumerate(segments) if s.elements == 1]
        self._members, self._sizes = members, sizes
        self._settings, self._fresh, self._step = None, None, None

    def _take_settings(self, groups: list[dict[str, Any]], factors: tuple[float, ...]) -> None:
        """Read the settings of all groups, where they have changed.

        Raises:
            NotServed: a pass cannot do what they say.
        """
        settings = [*map(self._get, groups)]
        if self._settings is not None and factors == self._factors and settings == self._settings:
            return
        self._settings, self._factors = None, factors
        scalars, names, is_plain = [], [], True
        for setting in settings:
            lr, *others = setting
            if setting[-1] or (not self._is_sgd and setting[-2]):
                raise NotServed("it is differentiable or capturable")
            if isinstance(lr, torch.Tensor):
                is_plain = False  # it may be changed in place
                if lr.requires_grad or lr.device.type != "cpu" or lr.numel() != 1:
                    raise NotServed("its learning rate is a tensor with a gradient, or elsewhere")
            if factors != (1.0,) * len(factors):
                for factor in factors:
                    lr = lr * factor
            flat = (*others[0], *others[1:]) if isinstance(others[0], tuple) else others
            if not all(isinstance(x, int | float | np.floating) for x in flat):
                raise NotServed("its settings are not all numbers")
            scalars.append((float(lr), *others))
            names.append(self._state_names(others))
        if [*map(type, self._first_of(settings))] != [float] * len(settings):
            is_plain = False  # an equal number of another type
        if names != getattr(self, "_names", None):
            self._names, self._fresh, self._step = names, None, None
        self._scalars = scalars
        self.lr = scalars[0][0] if scalars else 0.0
        self._rows: list[tuple[Any, ...]] | None = None
        if is_plain:
            self._settings = settings

    @staticmethod
    def _first_of(settings: Sequence[Any]) -> list[Any]:
        return [setting[0] for setting in settings]

    def _state_names(self, others: Sequence[Any]) -> tuple[str, ...]:
        if self._is_sgd:
            return _BUFFER if others[0] != 0 else ()
        return (*_MOMENTS, _LARGEST) if others[3] else _MOMENTS

    def _gradients(self) -> tuple[list[Any], list[int], list[int] | None]:
        """Return the gradients, their addresses, and the places that have one; None: all.

        Raises:
            NotServed: one is sparse.
        """
        gradients = [p.grad for p in self._served]
        try:
            pointers = [*map(_pointer, gradients)]
            is_plain = (
                all(map(_is_contiguous, gradients))
                if self._strides is None
                else [*map(_stride, gradients)] == self._strides
            )
            if is_plain and [*map(_nbytes, gradients)] == self._bytes and 0 not in pointers:
                if not any(gradients[i].is_neg() for i in self._single):
                    return gradients, pointers, None
        except (TypeError, RuntimeError):  # None has no address, and a sparse one neither
            pass
        return self._odd_gradients(gradients)

    @torch.no_grad()
    def _odd_gradients(
        self, gradients: list[torch.Tensor | None]
    ) -> tuple[list[Any], list[int], list[int] | None]:
        """Return gradients that are missing, or that cannot be read as they are, as copies."""
        pointers: list[int] = []
        present: list[int] = []
        for place, grad in enumerate(gradients):
            if grad is None:
                pointers.append(0)
                continue
            p = self._served[place]
            if grad.layout != torch.strided:
                raise NotServed("a gradient is sparse")
            if grad.shape != p.shape:
                raise NotServed("a gradient has another shape than its parameter")
            present.append(place)
            if (
                grad.dtype != torch.float32
                or grad.is_neg()
                or not same_format(grad, p)
                or (grad.data_ptr() == 0 and grad.numel())
            ):
                gradients[place] = grad = torch.empty_like(p).copy_(grad)
            pointers.append(grad.data_ptr())
        return gradients, pointers, present if len(present) < len(gradients) else None

    def _adopt(self) -> None:
        """Find the state of all parameters, wherever it is now."""
        names = {
            index: self._names[group]
            for index, group in zip(self._indices, self._group_of, strict=True)
            if self._names[group]
        }
        fresh = self._state.adopt(names, starts_empty=self._is_sgd)
        self._fresh = {place for place, index in enumerate(self._indices) if index in fresh}

    def _begin_state(self, present: list[int] | None) -> list[int]:
        """Give those their state that have a gradient for the first time.

        Returns:
            The places whose state begins with what the step writes there.
        """
        assert self._fresh is not None
        places = range(len(self._served)) if present is None else present
        if not any(place in self._fresh for place in places):
            return []
        self._adopt()  # some may have got one that is not ours
        starting = [place for place in places if place in self._fresh]
        for place in starting:
            names = self._names[self._group_of[place]]
            self._state.ensure(names)
            if not self._is_sgd:
                self._state.add(self._indices[place], names, zero=True)
        if starting and not self._is_sgd:
            self._adopt()
            return []
        return starting

    def _make_step(self) -> OptimizerStep:
        segments = np.zeros(len(self._served), SEGMENT)
        segments["offset"] = [self._segments[index].start for index in self._indices]
        segments["count"] = [self._segments[index].elements for index in self._indices]
        groups = np.zeros(max(2 * len(self._sizes), len(self._served), 1), GROUP)
        wanted = {*_flat(self._names)}
        self._state.ensure([*wanted])
        order = _BUFFER if self._is_sgd else (*_MOMENTS[1:], _LARGEST)
        vectors = [
            self._parameters.device.vector(self._state.vectors[name].tensor)
            for name in order
            if name in wanted
        ]
        self._counts = self._state.vectors[STEP].tensor.numpy() if STEP in wanted else None
        self._pointers: list[int] = []
        self._groups_of_step = []
        self._rows = None
        return OptimizerStep(segments, groups, *vectors)

    def _set_groups(
        self, step: OptimizerStep, present: list[int] | None, starting: list[int]
    ) -> None:
        """Write the scalars of the groups, and which parameter has which."""
        if self._is_sgd:
            self._set_sgd(step, starting)
        else:
            self._set_adam(step, present)

    def _set_sgd(self, step: OptimizerStep, starting: list[int]) -> None:
        if self._rows is None:
            self._rows = []
            for group, (lr, momentum, dampening, decay, nesterov, maximize, _) in enumerate(
                self._scalars
            ):
                for first in (False, True):
                    step.groups[2 * group + first] = row = sgd_group(
                        lr,
                        float(momentum),
                        float(dampening),
                        float(decay),
                        nesterov=bool(nesterov),
                        maximize=bool(maximize),
                        first=first,
                    )
                    self._rows.append(row)
        if starting or not self._groups_of_step or self._groups_of_step[-1]:
            of_step = [2.0 * group for group in self._group_of]
            for place in starting:
                of_step[place] += 1
            step.segments["group"] = of_step
            self._groups_of_step = [bool(starting)]

    def _set_adam(self, step: OptimizerStep, present: list[int] | None) -> None:
        counts = self._counts[self._places].tolist()
        if present is not None:
            counts = [counts[place] for place in present]
        if not counts:
            return
        first = counts[0]
        if counts.count(first) == len(counts):
            for group in range(len(self._scalars)):
                step.groups[group] = self._adam_row(group, first + 1)
            if self._groups_of_step != [True]:
                step.segments["group"] = self._group_of
                self._groups_of_step = [True]
            return
        self._groups_of_step = []
        rows: dict[tuple[int, float], int] = {}
        places = range(len(self._served)) if present is None else present
        for place, count in zip(places, counts, strict=True):
            key = (self._group_of[place], count)
            if key not in rows:
                rows[key] = len(rows)
                step.groups[rows[key]] = self._adam_row(key[0], count + 1)
            step.segments["group"][place] = rows[key]

    def _adam_row(self, group: int, count: float) -> tuple[Any, ...]:
        lr, betas, eps, decay, amsgrad, maximize, decoupled = self._scalars[group][:7]
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
