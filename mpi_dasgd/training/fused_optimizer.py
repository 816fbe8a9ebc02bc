"""The step of a user's optimizer as one that a pass over memory makes, before it exchanges.

The optimizer stays the user's object: its groups say the rates of each step, and its state is where
torch has it (`optimizer_state`). Whether torch's own step can be replaced is decided anew in every
step, so that both may alternate: hooks, closures, sparse gradients, and what else a pass does not
know come and go. The bits are those of torch's optimizer; of Adam and AdamW with ``fused=True``
(`mpi_dasgd.kernels.optimizer`).
"""

from __future__ import annotations

import array
import itertools
import logging
import operator
from typing import Any

import numpy as np
import torch

from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, OptimizerStep
from mpi_dasgd.model.flat_memory import same_format
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.optimizer_eligibility import Eligibility
from mpi_dasgd.training.optimizer_groups import AdamGroups, SgdGroups
from mpi_dasgd.training.optimizer_state import STEP, NotServed, OptimizerState
from mpi_dasgd.training.torch_internals import increment_versions, set_compiler

__all__ = ["FusedOptimizer"]

_log = logging.getLogger("mpi_dasgd")
_params = operator.itemgetter("params")
_grad = operator.attrgetter("grad")
_nbytes = operator.attrgetter("nbytes")
_dtype = operator.attrgetter("dtype")
_pointer = torch.Tensor.data_ptr
_is_contiguous = torch.Tensor.is_contiguous
_stride = torch.Tensor.stride
_flat = itertools.chain.from_iterable
_ALL = slice(None)
_Gradients = tuple[list[Any], list[int], list[int] | None]


class FusedOptimizer:
    """Describes the steps of an optimizer for a pass: `prepare`, the pass, `complete`.

    A *segment* is a parameter of the optimizer, in the order of the vector.

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
        self._groups = (
            SgdGroups()
            if isinstance(optimizer, torch.optim.SGD)
            else AdamGroups(on_device=parameters.device.is_asynchronous)
        )
        self._said: set[str] = set()
        self._places = [
            s
            for s in (parameters.segments if parameters.dtype == np.float32 else ())
            if len(s.placements) == 1 and not s.placements[0].is_complex
        ]
        self._place_of = {id(s.placements[0].parameter): i for i, s in enumerate(self._places)}
        device = parameters.flat.device
        self._state = OptimizerState(optimizer, self._places, parameters.flat.numel(), device)
        self._members: list[torch.Tensor] | None = None  # parameters of the optimizer
        self._sizes: list[int] = []
        self._obstacle = ""  # what about them forbids to serve it
        self._names: list[tuple[str, ...]] = []
        self._fresh: set[int] | None = None  # segments without state; None: to be looked at
        self._step: OptimizerStep | None = None
        self._counts = np.zeros(0, np.float32)  # steps made, of each place
        self._pointers: list[int] = []
        self._present: list[int] | None = None  # segments that have a gradient; None: all
        self._starting: list[int] = []  # of these, whose state begins with this step

    def prepare(self, *factors: float) -> OptimizerStep | None:
        """Return the step that the optimizer would make; None: torch has to make it.

        Args:
            factors: on the learning rates.
        """
        compiler = set_compiler(None)  # where the user compiles steps, this stays as it is
        try:
            return self._prepare(factors)
        except NotServed as error:
            reason = str(error)
        except KeyError as error:
            reason = f"its groups have no {error}"
        finally:
            set_compiler(compiler)
        if reason not in self._said:
            self._said.add(reason)
            _log.debug("optimizer: torch makes its own step: %s", reason)
        return None

    def complete(self) -> None:
        """Note that a pass has made the step that was prepared."""
        step, optimizer, present = self._step, self._optimizer, self._present
        assert step is not None
        step.gradients = None
        if self._counts.size:
            self._counts[self._counted_of(present)] += 1
        for segment in self._starting:
            self._state.add(self._order[segment], self._groups.order, zero=False)
            self._fresh = None
        served = self._served if present is None else [self._served[i] for i in present]
        increment_versions(served)
        if "step" in optimizer.__dict__:  # that of a scheduler, which wants to know
            optimizer._opt_called = True  # type: ignore[attr-defined]

    def _prepare(self, factors: tuple[float, ...]) -> OptimizerStep:
        if obstacle := self._eligibility.obstacle():
            raise NotServed(obstacle)
        if not self._parameters.lives_in_vector:
            raise NotServed("parameters have memory of their own")
        groups = self._optimizer.param_groups
        tables = [*map(_params, groups)]
        sizes, members = [*map(len, tables)], [*_flat(tables)]
        if (
            sizes != self._sizes
            or self._members is None
            or not all(map(operator.is_, members, self._members))
        ):
            self._lay_out(members, sizes)
        if self._obstacle:
            raise NotServed(self._obstacle)
        self._groups.read(groups, factors)
        self.lr = self._groups.lr
        if self._groups.names != self._names:
            self._names, self._fresh, self._step = self._groups.names, None, None
        gradients, pointers, present = self._gradients()
        if self._fresh is None or not self._state.is_known:
            self._adopt()
        self._present = present
        self._starting = self._begin_state(present) if self._fresh else []
        step = self._step
        if step is None:
            step = self._step = self._make_step()
        if isinstance(self._groups, SgdGroups):
            self._groups.write(step, self._group_of, self._starting)
        else:
            counts = self._counts[self._counted_of(present)].tolist()
            self._groups.write(step, self._group_of, counts, present)
        if pointers != self._pointers:
            step.segments["gradient"] = array.array("Q", pointers)
            self._pointers = pointers
        step.gradients = gradients
        step.nonfinite[0] = 0
        return step

    def _lay_out(self, members: list[torch.Tensor], sizes: list[int]) -> None:
        """Note which parameters the optimizer has, and where they are in the vector."""
        self._members, self._sizes = members, sizes
        self._fresh, self._step = None, None
        places = [self._place_of.get(id(p), -1) for p in members]
        self._obstacle = ""
        if -1 in places:
            self._obstacle = "not all of its parameters are real, float32 and disjoint"
        elif len(set(places)) < len(places):
            self._obstacle = "it has a parameter twice"
        if self._obstacle:
            return
        groups = [group for group, size in enumerate(sizes) for _ in range(size)]
        placed = sorted(zip(places, groups, range(len(places)), strict=True))
        self._order = [place for place, _, _ in placed]
        self._group_of = [group for _, group, _ in placed]
        self._turn = [turn for _, _, turn in placed]  # at which torch comes to it
        self._counted = np.array(self._order, np.intp)
        self._counts_all = len(self._order) == len(self._places)
        segments = [self._places[place] for place in self._order]
        self._served = [s.placements[0].parameter for s in segments]
        self._bytes = [s.elements * 4 for s in segments]
        self._strides = [*map(_stride, self._served)]
        self._has_contiguous = all(map(_is_contiguous, self._served))
        self._single = [i for i, s in enumerate(segments) if s.elements == 1]

    def _counted_of(self, present: list[int] | None) -> Any:
        """Return which of the counts of steps are those of some segments; None: of all."""
        if present is not None:
            return self._counted[present]
        return _ALL if self._counts_all else self._counted

    def _gradients(self) -> _Gradients:
        """Return the gradients, their addresses, and the segments that have one; None: all.

        Raises:
            NotServed: a pass cannot read one.
        """
        gradients = [*map(_grad, self._served)]
        try:
            pointers = [*map(_pointer, gradients)]
            if (
                [*map(_nbytes, gradients)] == self._bytes
                and {*map(_dtype, gradients)} == {torch.float32}
                and (
                    all(map(_is_contiguous, gradients))
                    if self._has_contiguous
                    else [*map(_stride, gradients)] == self._strides
                )
                and 0 not in pointers
                and not any(gradients[i].is_neg() for i in self._single)
            ):
                return gradients, pointers, None
        except (TypeError, AttributeError, RuntimeError):  # one is missing, or sparse
            pass
        return self._odd_gradients(gradients)

    @torch.no_grad()
    def _odd_gradients(self, gradients: list[Any]) -> _Gradients:
        """Return gradients of which some are missing, or must be copied to be read."""
        pointers, present = [0] * len(gradients), []
        for segment, (grad, p) in enumerate(zip(gradients, self._served, strict=True)):
            if grad is None:
                continue
            if grad.layout != torch.strided or grad.shape != p.shape or grad.device != p.device:
                raise NotServed("a gradient is sparse, or of another shape than its parameter")
            if grad.dtype != torch.float32:  # torch may compute with more precision then
                raise NotServed(f"a gradient is {grad.dtype}")
            present.append(segment)
            if grad.is_neg() or not same_format(grad, p) or (grad.data_ptr() == 0 and grad.numel()):
                gradients[segment] = grad = torch.empty_like(p).copy_(grad)
            pointers[segment] = grad.data_ptr()
        return gradients, pointers, present if len(present) < len(gradients) else None

    def _adopt(self) -> None:
        """Find the state of all parameters, wherever it is now."""
        self._fresh = None
        names = {
            place: self._names[group]
            for place, group in zip(self._order, self._group_of, strict=True)
            if self._names[group]
        }
        fresh = self._state.adopt(names, starts_empty=self._groups.starts_empty)
        self._fresh = {segment for segment, place in enumerate(self._order) if place in fresh}

    def _begin_state(self, present: list[int] | None) -> list[int]:
        """Give those their state that have a gradient for the first time.

        Returns:
            The segments whose state begins with what the step writes there.
        """
        segments = range(len(self._order)) if present is None else present
        if self._fresh is None or self._fresh.isdisjoint(segments):
            return []
        self._adopt()  # some may have got one from elsewhere
        starting = [segment for segment in segments if segment in self._fresh]
        starting.sort(key=self._turn.__getitem__)
        if not self._groups.starts_empty:
            for segment in starting:
                names = self._names[self._group_of[segment]]
                self._state.add(self._order[segment], names, zero=True)
            starting = []
            self._adopt()
        return starting

    def _make_step(self) -> OptimizerStep:
        """Make the arrays of a step."""
        segments = np.zeros(len(self._order), SEGMENT)
        segments["offset"] = [self._places[place].start for place in self._order]
        segments["count"] = [self._places[place].elements for place in self._order]
        groups = np.zeros(max(2 * len(self._sizes), len(self._order)), GROUP)
        wanted = {*_flat(self._names)}
        vectors = [
            self._parameters.device.vector(self._state.vector(name))
            for name in self._groups.order
            if name in wanted
        ]
        counts = self._state.vector(STEP).numpy() if STEP in wanted else np.zeros(0, np.float32)
        self._counts = counts
        self._pointers = []
        self._groups.forget()
        return OptimizerStep(segments, groups, *vectors)
