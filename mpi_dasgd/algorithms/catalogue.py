"""Catalogue of all algorithms, in words and in bytes, which `mpi-dasgd algorithms` prints."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.algorithms import ALGORITHMS, VARIANTS, Algorithm
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.errors import UserError

__all__ = ["SYMBOLS", "Sizes", "algorithm_classes", "evaluate", "markdown", "rows", "text"]

SYMBOLS = (
    "M: bytes of a model or gradient in the codec; P: of a model in its own type; n ranks; H "
    "local steps; r neighbours"
)
COLUMNS = {
    "algorithm": "algorithm",
    "paper": "paper",
    "exchanges": "what is exchanged",
    "traffic": "bytes per step",
    "memory": "memory per rank",
    "waits": "waits",
    "effective_step": "step, in eta/n",
}
"""Keys of `rows`, and the column heads of the table."""

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes for which the formulas are evaluated.

    Attributes:
        parameters: number of model elements, float32.
        ranks: number of ranks, n.
        codec: value of `codec.name`; an algorithm that cannot use it takes its own default.
        local_steps: number of local steps, H.
        degree: number of neighbours, r; None for that of the complete graph, n - 1.

    Raises:
        UserError: a number is too small.
    """

    parameters: int
    ranks: int = 16
    codec: str = "auto"
    local_steps: int = 1
    degree: int | None = None

    def __post_init__(self) -> None:
        minimums = {"parameters": 1, "ranks": 2, "local_steps": 1, "degree": 1}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                flag = name.replace("_", "-")
                raise UserError(f"algorithms: --{flag} must be at least {minimum}, got {value}")
        if self.codec not in ("auto", *codecs.CODECS):
            valid = ", ".join(("auto", *codecs.CODECS))
            raise UserError(f"algorithms: --codec {self.codec!r} is not known (valid: {valid})")


def algorithm_classes() -> list[type[Algorithm]]:
    """Return all algorithms that describe themselves, each followed by its other variants."""
    return [
        algorithm_cls
        for name, default in ALGORITHMS.items()
        for algorithm_cls in VARIANTS.get(name, (default,))
        if algorithm_cls.description.paper
    ]


def rows(sizes: Sizes | None = None) -> list[dict[str, Any]]:
    """Return a row for each algorithm and variant.

    Args:
        sizes: sizes for the columns ``codec``, ``traffic_bytes`` and ``memory_bytes``, which hold
            the bytes of each case, the usual one under ``""``; None to leave these columns out.
    """
    table = []
    for algorithm_cls in algorithm_classes():
        name, variant = algorithm_cls.name, algorithm_cls.variant
        is_default = algorithm_cls is ALGORITHMS[name]
        row: dict[str, Any] = {
            "algorithm": name if is_default else f"{name} {variant}",
            "name": name,
            "variant": variant,
            **asdict(algorithm_cls.description),
            "codecs": list(algorithm_cls.codecs),
        }
        if sizes is not None:
            symbols, row["codec"] = _symbols(algorithm_cls, sizes)
            for key in ("traffic", "memory"):
                row[f"{key}_bytes"] = evaluate(row[key], symbols)
        table.append(row)
    return table


def _symbols(algorithm_cls: type[Algorithm], sizes: Sizes) -> tuple[dict[str, float], str]:
    """Return the values of the symbols for an algorithm, and the name of the codec that it uses."""
    usable = sizes.codec in algorithm_cls.codecs
    settings = CodecConfig.model_validate(
        {"name": sizes.codec if usable else algorithm_cls.codecs[0]}
    )
    codec = codecs.make(
        settings,
        sizes.parameters,
        np.dtype(np.float32),
        seed=0,
        rank=0,
        trailer_words=algorithm_cls.trailer_words(sizes.ranks),
    )
    values = {
        "M": codec.layout.nbytes,
        "P": 4 * sizes.parameters,
        "n": sizes.ranks,
        "H": sizes.local_steps,
        "r": sizes.ranks - 1 if sizes.degree is None else sizes.degree,
    }
    return {name: float(value) for name, value in values.items()}, settings.name


def evaluate(formula: str, symbols: Mapping[str, float]) -> dict[str, float]:
    """Return the value of each case of a formula such as ``"M / H; server: (n-1) M"``.

    Args:
        formula: cases separated by semicolons, all but the first with a name and a colon. They
            consist of numbers, symbols, + - * / and brackets; adjacent factors are multiplied.
        symbols: values of the symbols.

    Raises:
        ValueError: `formula` is not of this form.
    """
    values = {}
    for case in formula.split(";"):
        name, _, text = case.rpartition(":")
        product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", text.strip())
        try:
            values[name.strip()] = _value(ast.parse(product, mode="eval").body, symbols)
        except (SyntaxError, KeyError) as error:
            raise ValueError(f"{formula!r}: {text.strip()!r} is no formula") from error
    return values


def _value(node: ast.expr, symbols: Mapping[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, symbols), _value(node.right, symbols)
        return float(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Name):
        return symbols[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    raise SyntaxError("not allowed here")


def markdown() -> list[str]:
    """Return the lines of the table in README.md."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
    for row in rows():
        name, _, variant = row["algorithm"].partition(" ")
        cells = [f"`{name}`" + (f" `{variant}`" if variant else "")]
        cells += [str(row[key]).replace("|", "\\|") for key in list(COLUMNS)[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text(sizes: Sizes | None = None) -> list[str]:
    """Return the lines of a paragraph per algorithm, for the terminal."""
    lines = []
    for row in rows(sizes):
        lines += [f"{row['algorithm']}  ({row['paper']})", f"    exchanges   {row['exchanges']}"]
        for key, name in (("traffic", "a step"), ("memory", "memory")):
            lines.append(f"    {name:<12}{row[key]}{_bytes(row.get(f'{key}_bytes'))}")
        lines.append(f"    waits       {row['waits']}")
        lines.append(f"    step        {row['effective_step']}, in eta/n")
        chosen = f"; here {row['codec']}" if sizes is not None else ""
        lines.append(f"    codecs      {', '.join(row['codecs'])}{chosen}")
    return [*lines, SYMBOLS]


def _bytes(values: Mapping[str, float] | None) -> str:
    """Return the bytes of each case as text, such as `` = 1.2 GB; tree: 3.4 MB``."""
    if values is None:
        return ""
    cases = []
    for case, value in values.items():
        power = 0
        while value >= 1000 and power < 4:
            value, power = value / 1000, power + 1
        unit = ("B", "kB", "MB", "GB", "TB")[power]
        cases.append(f"{case}: {value:.3g} {unit}" if case else f"{value:.3g} {unit}")
    return f" = {'; '.join(cases)}"
