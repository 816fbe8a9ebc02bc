"""What a model has beside the vector of its parameters: buffers and parameters outside of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from mpi_dasgd.errors import UserError
from mpi_dasgd.model import packed_tensors
from mpi_dasgd.model.buffer_rules import (
    KEEP,
    checked_rules,
    combine,
    require_matches,
    require_rule,
    rule_of,
)
from mpi_dasgd.model.packed_tensors import PackedTensor
from mpi_dasgd.model.tensor_bytes import read_bytes, write_bytes

__all__ = ["ModelBuffers"]


class ModelBuffers:
    """Buffers of a module, and parameters that are not in the vector, each with its own dtype.

    They are looked up by name at each use, since modules replace them: a running mean that is
    assigned, a model that is converted. What shares memory with a parameter of the vector is part
    of that parameter, and no concern of this class.

    When the models of several ranks are combined (`Decentralized.average`, the mean model of a
    run), an element that has the same bits on all ranks keeps them, and one that differs becomes
    what the rule of its buffer says:

    * ``mean``, the default of real and complex numbers, as the running statistics of batch-norm:
      the mean, in double precision, over the ranks where the element is finite;
    * ``max``, the default of integers and truth values, as the number of batches: the maximum;
    * ``rank0``: the value of the first rank that computes gradients;
    * ``keep``: each rank's own. Such a buffer is neither sent nor compared, also before training.

    Before training all others become those of rank 0.

    Args:
        module: the module.
        in_vector: ids of the parameters in the vector.
        rules: rules by patterns of names, as in ``{"*.cos_cached": "keep"}``; the first one that
            matches a name counts.

    Raises:
        UserError: a rule or name that does not exist, a rule that the dtype does not have, or a
            buffer whose memory cannot be read and that is not kept.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        in_vector: Collection[int] = frozenset(),
        rules: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._in_vector = in_vector
        self._rules: dict[str, str] = {}
        self.rules = {} if rules is None else rules

    @property
    def rules(self) -> Mapping[str, str]:
        """Rules by patterns of names; they may be set, on all ranks alike."""
        return self._rules

    @rules.setter
    def rules(self, rules: Mapping[str, str]) -> None:
        rules = checked_rules(rules)
        named = self._named()
        require_matches(rules, named)
        for name, tensor in named.items():
            rule = rule_of(name, tensor.dtype, rules)
            if rule != KEEP:
                _require_readable(name, tensor)
                require_rule(name, tensor.dtype, rule)
                self._require_own_memory(name, tensor)
        self._rules = rules

    def _named(self) -> dict[str, torch.Tensor]:
        """Return all by name: buffers, then parameters; those that are kept included."""
        named: dict[str, torch.Tensor] = dict(self._module.named_buffers())
        known = {id(tensor) for tensor in named.values()} | set(self._in_vector)
        named |= {n: p for n, p in self._module.named_parameters() if id(p) not in known}
        spans = self._spans()
        return {n: tensor for n, tensor in named.items() if not _is_inside(tensor, spans)}

    def _spans(self) -> list[tuple[int, int]]:
        """Return where the parameters of the vector begin and end in memory."""
        parameters = self._module.parameters()
        return [_span(p) for p in parameters if id(p) in self._in_vector]

    def _require_own_memory(self, name: str, tensor: torch.Tensor) -> None:
        start, end = _span(tensor)
        if any(start < last and first < end for first, last in self._spans()):
            raise UserError(
                f"model: buffer {name} shares a part of its memory with a trained parameter; make "
                "it a view of that parameter alone, or a copy (.clone())"
            )

    def rule(self, name: str, tensor: torch.Tensor) -> str:
        """Return the rule of a buffer."""
        return rule_of(name, tensor.dtype, self._rules)

    def shared(self) -> dict[str, torch.Tensor]:
        """Return those that are not kept, by name, in the order of the names."""
        named = sorted(self._named().items())
        return {name: tensor for name, tensor in named if self.rule(name, tensor) != KEEP}

    def description(self) -> list[tuple[str, dict[str, Any]]]:
        """Return name, and dtype, shape and rule by label, of each, in the order of the names.

        These are to be equal on all ranks; of those that are kept it is the rule alone.
        """
        rows = []
        for name, tensor in sorted(self._named().items()):
            details: dict[str, Any] = {"rule": self.rule(name, tensor)}
            if details["rule"] != KEEP:
                details |= {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
            rows.append((name, details))
        return rows

    def digests(self) -> dict[str, bytes]:
        """Return a hash, 16 bytes, of each of `shared`."""
        return {
            name: xxhash.xxh3_128_digest(read_bytes(tensor).data)
            for name, tensor in self.shared().items()
        }

    def pack(self) -> np.ndarray:
        """Return a copy of all, (bytes,), uint8; see `packed_tensors.pack`.

        Those that are kept are part of it, where they can be read.
        """
        return packed_tensors.pack(
            {
                name: PackedTensor(str(tensor.dtype), tuple(tensor.shape), read_bytes(tensor))
                for name, tensor in self._named().items()
                if _obstacle(tensor) is None
            }
        )

    def unpack(self, packed: np.ndarray) -> None:
        """Set all from what `pack` or `combine` returned.

        One that is kept, or not in the module's state dictionary, as a cache that grows, stays as
        it is where its shape or dtype has changed since.

        Args:
            packed: (bytes,), uint8; or, from files that hold it so, (elements,), float64.

        Raises:
            UserError: names, shapes or dtypes are not those of the module.
        """
        saved = packed_tensors.unpack(self._of_today(packed))
        named = self._named()
        for name in saved.keys() - named.keys():
            raise UserError(
                f"buffers: {name} was saved, but the model has none of this name; give the model "
                "of then"
            )
        same = {name for name, each in saved.items() if each.kind == _kind(named[name])}
        for name, tensor in self.shared().items():
            if name not in same and not _is_cache(self._module, name):
                found = saved[name].kind if name in saved else "none of this name"
                raise _changed(name, tensor, found)
        for name in same:
            write_bytes(named[name], saved[name].data)

    def combine(self, packed: Sequence[np.ndarray]) -> np.ndarray:
        """Combine what `pack` returned on several ranks, by the rules.

        Returns:
            As of `pack`, without those that are kept.

        Raises:
            UserError: names, shapes or dtypes are not those of the module on each rank.
        """
        ranks = [packed_tensors.unpack(self._of_today(each)) for each in packed]
        combined = {}
        for name, tensor in self.shared().items():
            kinds = {rank[name].kind if name in rank else "none of this name" for rank in ranks}
            if kinds != {_kind(tensor)}:
                raise _changed(name, tensor, " and ".join(sorted(kinds)))
            pieces = [rank[name].data for rank in ranks]
            data = combine(self.rule(name, tensor), tensor.dtype, pieces)
            combined[name] = ranks[0][name]._replace(data=data)
        return packed_tensors.pack(combined)

    def _of_today(self, packed: np.ndarray) -> np.ndarray:
        """Turn elements in float64, as of format version 2 and before, into bytes by name."""
        if packed.dtype == np.uint8 or not packed.size:
            return packed
        named = self._named()
        elements = sum(tensor.numel() for tensor in named.values())
        if packed.size != elements:
            raise UserError(
                f"buffers: the model has {elements} elements of buffers and parameters that are "
                f"not trained, but {packed.size} were saved; give the model of then"
            )
        tensors, start = {}, 0
        for name, tensor in named.items():
            part = torch.from_numpy(packed[start : start + tensor.numel()])
            exact = tensor.is_floating_point() or tensor.is_complex()
            data = read_bytes((part if exact else part.round()).to(tensor.dtype))
            tensors[name] = PackedTensor(str(tensor.dtype), tuple(tensor.shape), data)
            start += tensor.numel()
        return packed_tensors.pack(tensors)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _is_cache(module: torch.nn.Module, name: str) -> bool:
    """Return whether a buffer is not part of the state dictionary: the module makes it anew."""
    owner, _, own_name = name.rpartition(".")
    return own_name in getattr(module.get_submodule(owner), "_non_persistent_buffers_set", ())


def _changed(name: str, tensor: torch.Tensor, saved: str) -> UserError:
    return UserError(
        f"buffers: {name} of the model is {_kind(tensor)}, but saved was {saved}; give the model "
        f"of then, or leave it out with buffer_rules={{{name!r}: {KEEP!r}}}"
    )


def _require_readable(name: str, tensor: torch.Tensor) -> None:
    obstacle = _obstacle(tensor)
    if obstacle is not None:
        what = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        raise UserError(
            f"model: {what} {name} {obstacle}, and cannot be compared between ranks; make it a "
            f"dense tensor with values, or leave it alone with buffer_rules={{{name!r}: {KEEP!r}}}"
        )


def _obstacle(tensor: torch.Tensor) -> str | None:
    """Return why the memory of a tensor cannot be read; None if it can."""
    if torch.nn.parameter.is_lazy(tensor):
        return "has no shape before the first call of the model"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is not dense ({tensor.layout})"
    if tensor.is_meta:
        return "has no values (it is on the meta device)"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}"
    return None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses at which a tensor begins and ends; (0, 0) if it has no memory."""
    if _obstacle(tensor) is not None or not tensor.numel():
        return 0, 0
    last = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _is_inside(tensor: torch.Tensor, spans: Sequence[tuple[int, int]]) -> bool:
    start, end = _span(tensor)
    return any(first <= start < end <= last for first, last in spans)
