"""Whether the module and its optimizer still have the parameters that are exchanged."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.parameter_selection import optimizer_parameters

__all__ = ["ModelStructure"]

_params = operator.itemgetter("params")


class ModelStructure:
    """The parameters of a module and its optimizer, as objects, at construction.

    Args:
        module: the model.
        optimizer: its optimizer, or None.
        parameters: the parameters that are exchanged.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        parameters: Sequence[torch.Tensor],
    ) -> None:
        self._module, self._optimizer = module, optimizer
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._known = list(module.parameters())  # their ids stay theirs as long as they live
        self._exchanged = {id(p): p for p in parameters}
        self._look()

    def _look(self) -> None:
        """Note every place where the module and the optimizer have a parameter or a submodule."""
        modules = list(self._module.modules())
        tables = [*(m._parameters for m in modules), *(m._modules for m in modules)]
        self._places = [_members_of(table) for table in tables if table]
        self._members = self._look_up()

    def _look_up(self) -> list[Any]:
        groups = self._optimizer.param_groups if self._optimizer else ()
        return [*itertools.chain.from_iterable([*self._places, *map(_params, groups)])]

    @property
    def is_unchanged(self) -> bool:
        """Whether all of them are where they were: tested in every step, so it must be fast."""
        members = self._look_up()
        return len(members) == len(self._members) and all(map(operator.is_, members, self._members))

    def require_unchanged(self) -> None:
        """Refuse parameters that are trained and would not be exchanged.

        Raises:
            UserError: the module or the optimizer has others than at construction; says which.
        """
        old = {name: id_ for id_, name in self._names.items()}
        new: dict[int, str] = {}
        for name, p in self._module.named_parameters():
            new[id(p)] = name
            if id(p) in self._names or id(p) in self._exchanged or not p.requires_grad:
                continue
            what = "is another object than" if name in old else "did not exist"
            raise UserError(
                f"model: parameter {name} {what} when the model was made decentralized: a layer "
                "was added or replaced, or weights were loaded with assign=True; do so before, or "
                "copy the values: load_state_dict(..., assign=False)"
            )
        for place, tensor in optimizer_parameters(self._optimizer) if self._optimizer else ():
            if id(tensor) not in self._exchanged and tensor.requires_grad:
                raise UserError(
                    f"optimizer: parameter {new.get(id(tensor), place)} was added after the model "
                    "was made decentralized (add_param_group), and would not be exchanged; give "
                    "all parameters to the optimizer before, those that are to be trained later "
                    "with requires_grad=False"
                )
        self._look()


def _members_of(table: Any) -> Iterable[Any]:
    """Return what a module's table of parameters or submodules has, now and later."""
    return table.values() if isinstance(table, dict) else _ScriptedMembers(table)


class _ScriptedMembers:
    """What a table of a scripted module has: its `values` are a copy."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __iter__(self) -> Iterator[Any]:
        return iter(self._table.values())
