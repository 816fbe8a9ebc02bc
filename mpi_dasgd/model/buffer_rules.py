"""What becomes of a buffer that differs between ranks when a model is made of their models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch

from mpi_dasgd.errors import UserError, nearest

__all__ = [
    "KEEP",
    "RULES",
    "checked_rules",
    "combine",
    "has_nan",
    "require_matches",
    "require_rule",
    "rule_of",
]

_log = logging.getLogger("mpi_dasgd")

_BLOCK = 1 << 16  # elements that are combined at a time

KEEP = "keep"
"""Rule of buffers that are each rank's own: they are never sent, set or compared."""

Values = Sequence[np.ndarray]


def _mean(ranks: Values) -> np.ndarray:
    """Mean over the ranks where an element is finite; where it is nowhere, that of IEEE 754."""
    if ranks[0].dtype.kind in "iu":
        return _integer_mean(ranks)
    values = np.stack(ranks)
    finite = np.isfinite(values)
    count = finite.sum(0)
    known = np.where(finite, values, 0)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        total = known.sum(0)
        mean = total / count
        large = ~np.isfinite(total)
        mean[large] = (known[:, large] / count[large]).sum(0)
        nowhere = count == 0
        mean[nowhere] = values[:, nowhere].sum(0)
    return mean


def _integer_mean(ranks: Values) -> np.ndarray:
    """Mean to the nearest integer, halves up, exact beyond 2^53: of quotients and remainders."""
    n = len(ranks)
    wide = np.uint64 if ranks[0].dtype.kind == "u" else np.int64
    values = np.stack(ranks).astype(wide)
    quotients = values // wide(n)
    remainders = (values - quotients * wide(n)).sum(0)
    mean = quotients.sum(0) + (2 * remainders + wide(n)) // wide(2 * n)
    return np.asarray(mean.astype(ranks[0].dtype))


def _maximum(ranks: Values) -> np.ndarray:
    """Maximum over the ranks where an element is a number."""
    values = np.stack(ranks)
    if values.dtype.kind != "f":
        return np.asarray(values.max(0))
    unknown = np.isnan(values)  # not np.fmax: it errs with signalling ones
    return np.where(unknown.all(0), values[0], np.where(unknown, -np.inf, values).max(0))


def _first(ranks: Values) -> np.ndarray:
    return ranks[0]


RULES: Mapping[str, Callable[[Values], np.ndarray] | None] = {
    "mean": _mean,
    "max": _maximum,
    "rank0": _first,
    KEEP: None,
}
"""Rules by name, over the elements of all ranks."""


def checked_rules(rules: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `rules`.

    Raises:
        UserError: it is no mapping of strings to names of rules.
    """
    if not isinstance(rules, Mapping):
        raise UserError(
            "buffer_rules: expected a mapping of names of buffers to rules, as in "
            f"{{'*.cos_cached': 'keep'}}, got {type(rules).__name__}"
        )
    for pattern, rule in rules.items():
        if not isinstance(pattern, str) or rule not in RULES:
            raise UserError(
                f"buffer_rules: {rule!r} of {pattern!r} is no rule{nearest(str(rule), RULES)} "
                f"(valid: {', '.join(RULES)})"
            )
    return dict(rules)


def require_matches(rules: Mapping[str, str], names: Collection[str]) -> None:
    """Refuse a rule of a name that is none of `names`; warn of a pattern that matches none.

    A module may have a buffer later, which a pattern can stand for.

    Raises:
        UserError: names what was meant, perhaps.
    """
    for pattern in rules:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        if not set(pattern) & set("*?["):
            raise UserError(
                f"buffer_rules: {pattern!r} is no buffer of the model, and no parameter outside of "
                f"the optimizer{nearest(pattern, names)}"
            )
        _log.warning("buffer_rules: %r matches no buffer of the model", pattern)


def rule_of(name: str, dtype: torch.dtype, rules: Mapping[str, str]) -> str:
    """Return the rule of a buffer: that of the first pattern that matches its name, or the default.

    The default is ``mean`` for real and complex numbers, ``max`` for integers and truth values.

    Args:
        name: name of the buffer in its module, for example ``layer1.0.bn1.running_mean``.
        dtype: its dtype.
        rules: names of rules by patterns of names (``*``, ``?``, ``[abc]``).
    """
    for pattern, rule in rules.items():
        if fnmatchcase(name, pattern):
            return rule
    return "mean" if dtype.is_floating_point or dtype.is_complex else "max"


def require_rule(name: str, dtype: torch.dtype, rule: str) -> None:
    """Refuse a rule that cannot be applied to a dtype.

    Args:
        name: name of the buffer.
        dtype: its dtype.
        rule: its rule.

    Raises:
        UserError: says so, with another one.
    """
    undefined = (dtype.is_complex and rule == "max") or (dtype == torch.bool and rule == "mean")
    zeros, ones = (np.full(dtype.itemsize, value, np.uint8) for value in (0, 1))
    try:
        if undefined:
            raise TypeError
        torch.from_numpy(zeros).view(dtype).clone()
        combine(rule, dtype, [zeros, ones])
    except (TypeError, RuntimeError):
        raise UserError(
            f"buffer_rules: there is no {rule} of {dtype}, which buffer {name} is; give it another "
            f"rule, for example buffer_rules={{{name!r}: {KEEP!r}}}"
        ) from None


def combine(rule: str, dtype: torch.dtype, ranks: Sequence[np.ndarray]) -> np.ndarray:
    """Combine the elements that the ranks have: where all have the same bits, these stay.

    Args:
        rule: name of a rule.
        dtype: dtype of the elements.
        ranks: elements of each rank, (bytes,), uint8.

    Returns:
        The elements, (bytes,), uint8; means are formed in float64 or complex128.
    """
    function = RULES[rule]
    if function in (None, _first) or all(np.array_equal(piece, ranks[0]) for piece in ranks[1:]):
        return ranks[0]
    assert function is not None
    result = ranks[0].copy()
    block = _BLOCK * dtype.itemsize
    for start in range(0, len(result), block):
        rows = [_words(piece[start:][:block], dtype) for piece in ranks]
        differs = np.logical_or.reduce([row != rows[0] for row in rows])
        if differs.ndim > 1:
            differs = differs.any(axis=1)
        if differs.any():
            values = function([_numbers(row[differs].view(np.uint8), dtype) for row in rows])
            part = _words(result[start:][:block], dtype)
            part[differs] = _words(_bytes(values, dtype), dtype)
    return result


def _words(data: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return elements as integers of the same bits, one for each or, of 16 bytes, two."""
    if dtype.itemsize > 8:
        return data.view(np.uint64).reshape(-1, dtype.itemsize // 8)
    return data.view(f"u{dtype.itemsize}")


def has_nan(dtype: torch.dtype, data: np.ndarray) -> bool:
    """Return whether one of the elements, (bytes,), uint8, of a dtype is not a number."""
    real = dtype.is_floating_point or dtype.is_complex
    return real and bool(np.isnan(_numbers(data, dtype)).any())


def _numbers(data: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return elements of `dtype` as numbers: of real and complex dtypes in double precision."""
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return np.asarray(torch.from_numpy(data.reshape(-1).copy()).view(dtype).to(wide).numpy())
    return data.view(str(dtype).removeprefix("torch."))


def _bytes(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype.is_floating_point or dtype.is_complex:
        numbers = torch.from_numpy(np.ascontiguousarray(values))
        return np.asarray(numbers.to(dtype).view(torch.uint8).numpy())
    return np.ascontiguousarray(values).view(np.uint8)
