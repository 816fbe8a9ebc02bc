"""The state of an optimizer in flat vectors, which a pass reads and writes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mpi_dasgd.model.flat_memory import FlatMemory, holders, storage_id
from mpi_dasgd.model.parameter_layout import Segment

__all__ = ["STEP", "NotServed", "OptimizerState"]

STEP = "step"
"""Name of the number of steps in the state of Adam, which is in host memory."""

_pointer = torch.Tensor.data_ptr
_flat = itertools.chain.from_iterable


class NotServed(Exception):
    """Torch must make its own step; its text says why."""


class OptimizerState:
    """The tensors of `optimizer.state`, as views of one vector for each name.

    `optimizer.state` stays what torch has there: the same dictionaries and tensors under the same
    names, so that `state_dict`, `load_state_dict` and torch's own step go on from each other. Only
    their memory is here. Each view has a storage of its own; see `FlatMemory`.

    Args:
        optimizer: an optimizer of torch.
        segments: the parameters that may be served, one in each, and where they are in a vector.
        elements: elements of a vector, as of that of the parameters.
        device: where the parameters are.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        segments: Sequence[Segment],
        elements: int,
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._places = [(s, s.placements[0]) for s in segments]
        self._parameters = [place.parameter for _, place in self._places]
        self._own: set[int] = set()  # storages of the homes
        self._elements, self._device = elements, device
        self._vectors: dict[str, FlatMemory] = {}
        self._homes: dict[str, list[torch.Tensor]] = {}
        self._addresses: dict[str, list[int]] = {}
        self._table: Any = None  # `optimizer.state` when it was looked at, its keys and values
        self._keys: list[torch.Tensor] = []
        self._values: list[dict[str, Any]] = []
        # Of parameters whose state has as many names: what takes it, from where, and its addresses.
        self._checks: list[tuple[int, Callable[[Any], Any], list[dict[str, Any]], list[int]]] = []

    @property
    def is_known(self) -> bool:
        """Whether all state that `adopt` has found is where it was; asked in every step."""
        table = self._optimizer.state
        if table is not self._table or len(table) != len(self._keys):
            return False
        if not all(map(operator.is_, table, self._keys)):
            return False
        if not all(map(operator.is_, table.values(), self._values)):
            return False
        try:
            for names, get, tables, addresses in self._checks:
                tensors = map(get, tables)
                if [*map(_pointer, tensors if names == 1 else _flat(tensors))] != addresses:
                    return False
        except (KeyError, TypeError, RuntimeError):
            return False
        return True

    def adopt(self, names: Mapping[int, tuple[str, ...]], *, starts_empty: bool) -> set[int]:
        """Move the state of some parameters to the vectors, with its values.

        Args:
            names: what the state of a parameter holds, by the parameter's index.
            starts_empty: whether a parameter without any of them, but with a dictionary that may
                hold other things, has no state yet (SGD); else torch refuses it (Adam).

        Returns:
            The indices of the parameters that have no state yet.

        Raises:
            NotServed: a tensor cannot be moved.
        """
        self._table = None
        self._own = {storage_id(home) for homes in self._homes.values() for home in homes}
        fresh: set[int] = set()
        found: dict[int, tuple[torch.Tensor, str, int]] = {}
        checks: dict[tuple[str, ...], tuple[list[dict[str, Any]], list[int]]] = {}
        for index, wanted in names.items():
            state = self._optimizer.state.get(self._parameters[index])
            if not state or (starts_empty and all(state.get(name) is None for name in wanted)):
                fresh.add(index)
                continue
            tables, addresses = checks.setdefault(wanted, ([], []))
            tables.append(state)
            for name in wanted:
                self._make(name)
                tensor = state.get(name)
                self._require_movable(tensor, name, index)
                if found.setdefault(id(tensor), (tensor, name, index))[1:] != (name, index):
                    raise NotServed(f"parameters share {name} in its state")
                addresses.append(self._addresses[name][index])
        self._move([*found.values()])
        self._checks = [
            (len(wanted), operator.itemgetter(*wanted), *check) for wanted, check in checks.items()
        ]
        self._table = self._optimizer.state
        self._keys, self._values = [*self._table], [*self._table.values()]
        return fresh

    def add(self, index: int, names: Sequence[str], *, zero: bool) -> None:
        """Give a parameter its state.

        Args:
            index: its index.
            names: what it holds.
            zero: whether it begins with zeros, else with what the vectors hold.
        """
        state = self._optimizer.state[self._parameters[index]]
        for name in names:
            self._make(name)
            home = self._home(name, index)
            if zero:
                home.zero_()
            state[name] = home.data
        self._table = None

    def vector(self, name: str) -> torch.Tensor:
        """Return the vector of a name: float32, (elements,), on the device.

        That of `STEP` is (segments,), in host memory.
        """
        self._make(name)
        return self._vectors[name].tensor

    def _make(self, name: str) -> None:
        if name in self._vectors:
            return
        if name == STEP:
            is_double = torch.get_default_dtype() == torch.float64  # as torch itself does
            dtype = torch.float64 if is_double else torch.float32
            memory = FlatMemory(len(self._places), dtype, torch.device("cpu"))
        else:
            memory = FlatMemory(self._elements, torch.float32, self._device)
        self._vectors[name] = memory
        self._homes[name] = [self._view(name, index) for index in range(len(self._places))]
        self._addresses[name] = [*map(_pointer, self._homes[name])]

    def _view(self, name: str, index: int) -> torch.Tensor:
        if name == STEP:
            return self._vectors[name].part(index, index + 1).view(()).data
        segment, place = self._places[index]
        part = self._vectors[name].part(segment.start, segment.part.stop)
        return place.view(part).data

    def _home(self, name: str, index: int) -> torch.Tensor:
        """Return the view of a parameter, made anew if its storage was moved elsewhere."""
        home = self._homes[name][index]
        if home.data_ptr() != self._addresses[name][index]:
            home = self._homes[name][index] = self._view(name, index)
        return home

    def _require_movable(self, tensor: Any, name: str, index: int) -> None:
        p = self._parameters[index]
        shape, device = ((), torch.device("cpu")) if name == STEP else (p.shape, p.device)
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            raise NotServed(f"{name} in its state is no dense tensor")
        is_type = tensor.dtype.is_floating_point if name == STEP else tensor.dtype == torch.float32
        if not is_type or tensor.shape != shape or tensor.device != device:
            raise NotServed(f"{name} in its state is {tensor.dtype}, {tuple(tensor.shape)}")
        if tensor.data_ptr() == self._addresses[name][index] or not tensor.numel():
            return
        is_shared = device.type == "cpu" and tensor.untyped_storage().is_shared()
        if is_shared or tensor.is_inference() or tensor.requires_grad:
            raise NotServed(f"{name} in its state is shared, or has a gradient")
        if storage_id(tensor) not in self._own and holders(tensor) > 1:
            raise NotServed(f"{name} in its state shares its memory with other tensors")

    @torch.no_grad()
    def _move(self, found: Sequence[tuple[torch.Tensor, str, int]]) -> None:
        moved = [
            (tensor, name, index)
            for tensor, name, index in found
            if tensor.data_ptr() != self._addresses[name][index]
        ]
        values = [
            tensor.clone() if storage_id(tensor) in self._own else tensor for tensor, _, _ in moved
        ]
        for (tensor, name, index), value in zip(moved, values, strict=True):
            home = self._home(name, index)
            home.copy_(value)
            tensor.data = home  # who holds the tensor sees what becomes of it, as in plain torch
