"""What ties parameters to the flat vector, also after a user has re-pointed them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_memory import (
    FlatMemory,
    group_overlapping,
    holders,
    move_elsewhere,
    same_format,
    storage_id,
)
from mpi_dasgd.model.parameter_layout import Placement, Segment
from mpi_dasgd.model.parameter_ties import require_same_ties
from mpi_dasgd.model.working_copy import WorkingCopy

__all__ = ["ParameterAttachment"]

_pointer = torch.Tensor.data_ptr


class ParameterAttachment:
    """Parameters and the memory that they have in the vector, their home.

    A parameter of the vector's type lives in the vector, one of lower precision in a working copy.
    One whose memory others see (a buffer, another process, a tensor of the user's) stays there as
    a *guest*, and is copied from and to its home.

    Args:
        segments: layout of the vector.
        vector: memory of the vector.
        others: returns the tensors of the module that are not in the vector.

    Attributes:
        has_copies: whether some parameters have memory of their own: else `push` does nothing.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        vector: FlatMemory,
        others: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        self._segments, self._vector, self._others = segments, vector, others
        self._placements = [placement for s in segments for placement in s.placements]
        self._parameters = [placement.parameter for placement in self._placements]
        self._masters = [p.view(vector.tensor[s.part]) for s in segments for p in s.placements]
        self._homes: list[torch.Tensor] = []
        self._working_copies: list[WorkingCopy] = []
        self._make_homes()
        self._guests: list[int] = []
        self._pointers: list[int | None] = [None] * len(self._parameters)
        self._strides = [p.stride() for p in self._parameters]
        self._storages = [storage_id(p) for p in self._parameters]
        self.attach()
        self.pull()

    @property
    def guests(self) -> list[str]:
        """Names of the parameters that stay in memory of their own."""
        return [self._placements[index].name for index in self._guests]

    def pull(self, update: bool = False) -> None:
        """Have the vector hold what the parameters hold.

        Args:
            update: whether they were changed by the optimizer; a master keeps its remainder then.
        """
        if [*map(_pointer, self._parameters)] != self._pointers:
            self.attach()
        if self.has_copies:
            with torch.no_grad():
                self._pull_copies(update)

    def _pull_copies(self, update: bool) -> None:
        if self._guests:
            torch._foreach_copy_(self._guest_homes, self._guest_parameters)
        for copy in self._working_copies:
            if update:
                copy.take_update()
            else:
                copy.take_writes()

    def push(self) -> None:
        """Have the parameters hold what the vector holds."""
        with torch.no_grad():
            for copy in self._working_copies:
                copy.write()
            if self._guests:
                torch._foreach_copy_(self._guest_parameters, self._guest_homes)

    def attach_reshaped(self) -> None:
        """Take back parameters whose strides or shapes have changed in place, and former guests."""
        for index, p in enumerate(self._parameters):
            if p.stride() != self._strides[index] or p.shape != self._placements[index].shape:
                self._pointers[index] = None
        if self._guests or None in self._pointers:
            self.attach()
            self.pull()

    @torch.no_grad()
    def attach(self) -> None:
        """Take back the parameters that have left their homes, with their values.

        Raises:
            UserError: one cannot be taken back: its shape, its device or what it shares memory with
                is another than at construction, or its type does not fit the vector.
        """
        moved = [
            index
            for index, p in enumerate(self._parameters)
            if p.data_ptr() != self._pointers[index] or index in self._guests
        ]
        for index in moved:
            self._require_fitting(self._placements[index])
            self._storages[index] = storage_id(self._parameters[index])
        require_same_ties(self._segments, self._storages, moved)
        retyped = self._retyped()
        if retyped:
            moved = [*range(len(self._parameters))]
        homes, shares = Counter(map(storage_id, self._homes)), Counter(self._storages)
        guests = {index for index in moved if self._keeps_its_memory(index, homes, shares)}
        values = [self._parameters[index].detach() for index in moved]
        values = [
            value.clone() if self._storages[index] in homes else value
            for index, value in zip(moved, values, strict=True)
        ]
        self._leave_old_homes(moved, homes, shares)  # the last that may refuse
        if retyped:
            self._retype(retyped)
            self._make_homes()
        else:
            self._renew_homes()
        for index, value in zip(moved, values, strict=True):
            self._homes[index].copy_(value)
            if index in retyped:  # the master keeps nothing of the values of before
                self._masters[index].copy_(value)
            if index not in guests:
                self._parameters[index].data = self._homes[index]
        self._guests = sorted(guests)
        self._guest_homes = [self._homes[index] for index in self._guests]
        self._guest_parameters = [self._parameters[index] for index in self._guests]
        self.has_copies = bool(self._guests or self._working_copies)
        for index in moved:
            p = self._parameters[index]
            self._pointers[index], self._strides[index] = p.data_ptr(), p.stride()
            self._storages[index] = storage_id(p)
        if retyped:
            for copy in self._working_copies:
                copy.take_writes()

    def _make_homes(self) -> None:
        """Make the working copies for the types of the segments, and the home of each parameter."""
        self._memories: list[tuple[FlatMemory, int]] = []  # of each segment, and its place there
        self._working_copies = []
        for dtype, run in itertools.groupby(self._segments, key=lambda segment: segment.dtype):
            segments = list(run)
            start, memory = 0, self._vector
            if dtype != self._vector.dtype:
                start, stop = segments[0].start, segments[-1].part.stop
                copy = WorkingCopy(self._vector.tensor[start:stop], dtype)
                self._working_copies.append(copy)
                memory = copy.memory
            self._memories += [(memory, segment.start - start) for segment in segments]
        self._homes = [torch.empty(0)] * len(self._parameters)
        self._home_pointers = [-1] * len(self._parameters)
        self._renew_homes()

    def _renew_homes(self) -> None:
        """Make the homes anew whose storages were moved elsewhere."""
        stop = 0
        for segment, (memory, start) in zip(self._segments, self._memories, strict=True):
            first, stop = stop, stop + len(segment.placements)
            if self._homes[first].data_ptr() == self._home_pointers[first]:
                continue
            part = memory.part(start, start + segment.elements)
            for index, placement in enumerate(segment.placements, first):
                self._homes[index] = placement.view(part).data  # as a parameter, without a base
                self._home_pointers[index] = self._homes[index].data_ptr()

    def _retyped(self) -> set[int]:
        """Return the parameters that are of another type than their segments."""
        members = [(s, p) for s in self._segments for p in s.placements]
        return {
            index
            for index, (segment, placement) in enumerate(members)
            if placement.parameter.dtype.to_real() != segment.dtype
        }

    def _retype(self, changed: Iterable[int]) -> None:
        """Give the segments of some parameters the types that these have now."""
        for copy in self._working_copies:  # what those that have stayed hold
            copy.take_writes()
        segments = [segment for segment in self._segments for _ in segment.placements]
        for index in changed:
            segments[index].dtype = self._parameters[index].dtype.to_real()

    def _keeps_its_memory(
        self, index: int, homes: Mapping[int, int], shares: Mapping[int, int]
    ) -> bool:
        """Return whether a parameter must stay where it is, since others see this memory.

        Args:
            index: the parameter.
            homes: number of homes in each storage.
            shares: number of parameters in each storage.
        """
        p, home = self._parameters[index], self._homes[index]
        if torch._debug_has_internal_overlap(p) == 1:  # an expanded one: nobody can write to it
            return False
        if p.device.type == "cpu" and p.untyped_storage().is_shared():
            return True
        if not same_format(p, home) and p.stride() == torch.empty_like(p, device="meta").stride():
            return True  # in another memory format, of the user's choice
        storage = self._storages[index]
        unknown = 0 if storage in homes else holders(p) - shares[storage]
        if unknown == 0:
            return False
        outside = [t for t in self._others() if storage_id(t) == storage]
        bases = {id(t._base) for t in outside if t._base is not None}
        groups = group_overlapping([p, *outside])  # the group of `p` is the first
        return unknown != len(outside) + len(bases) or len(groups[0]) > 1

    def _leave_old_homes(
        self, moved: Iterable[int], homes: Mapping[int, int], shares: Mapping[int, int]
    ) -> None:
        """Have tensors of the user's that are still in the home of a parameter keep their values.

        ``backup = p.data; p.data = other`` leaves `backup` in memory that exchanges change.

        Raises:
            UserError: they cannot keep them; see `move_elsewhere`.
        """
        for index in moved:
            home = self._homes[index]
            storage = storage_id(home)
            if holders(home) > homes[storage] + shares.get(storage, 0):
                move_elsewhere(home, self._placements[index].name)

    def _require_fitting(self, placement: Placement) -> None:
        """Refuse a parameter for which its segment has no room.

        Raises:
            UserError: says what it has become.
        """
        p, vector = placement.parameter, self._vector.tensor
        problem = ""
        if p.is_meta or p.layout != torch.strided or p.device != vector.device:
            problem = f"is {p.layout} on {p.device} now, and was {torch.strided} on {vector.device}"
        elif p.shape != placement.shape:
            problem = f"has the shape {tuple(p.shape)} now, and had {tuple(placement.shape)}"
        elif p.is_complex() != placement.is_complex:
            problem = f"is {p.dtype} now: real numbers cannot become complex, nor the reverse"
        elif not (p.is_complex() or p.is_floating_point()) or (
            p.dtype.to_real().itemsize > vector.itemsize
        ):
            problem = f"is {p.dtype} now, which the exchanged vector of {vector.dtype} cannot hold"
        if problem:
            raise UserError(
                f"model: parameter {placement.name} {problem}; convert, move or replace it before "
                "the model is made decentralized"
            )
