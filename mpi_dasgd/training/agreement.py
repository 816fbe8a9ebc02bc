"""Whether all ranks were given the same run: one comparison before anything is exchanged."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import xxhash

import mpi_dasgd
from mpi_dasgd.algorithms.build import RunParts
from mpi_dasgd.config.schema import OWN_ALGORITHMS, Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.topology import Topology
from mpi_dasgd.training.surviving_ranks import SurvivingRanks

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "facts_of_config",
    "facts_of_model",
    "facts_of_optimizer",
    "facts_of_run",
    "require_agreement",
]

OWN_KEYS = frozenset({"codec.threads", "task.directory", "transport.progress_interval"})
"""Keys of the configuration that may differ between ranks: what they say is of one machine."""

_SECTIONS = ("algorithm", "budget", "codec", "schedule", "topology", "transport")
_KEYS = ("run.seed", "run.check_finite")  # of other sections, which only `train` reads

_HINTS = {
    "budget.samples": " (it counts the samples of all ranks together)",
    "run.seed": " (the seeds of torch and of your data may differ)",
}

_MEANS = frozenset(  # entries of a group of an optimizer that say how it computes, not what
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
)

_GROUPS = 4  # sets of facts that are compared in words; the ranks of further ones are counted
_DIFFERENCES = 4  # differences that a message lists

Rows = Sequence[tuple[str, Mapping[str, Any]]]
Groups = Sequence[tuple[Sequence[int], Any]]


def facts_of_config(config: Config) -> dict[str, Any]:
    """Return the settings that have to be equal on all ranks of ``train``."""
    settings = {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in values.items()
    }
    return {key: value for key, value in settings.items() if key not in OWN_KEYS}


def facts_of_run(run: RunParts) -> dict[str, Any]:
    """Return what has to be equal on all ranks that exchange models, beside these."""
    config = run.config.model_copy(update={"codec": run.codec_config})
    settings = facts_of_config(config).items()
    own = config.algorithm.name in OWN_ALGORITHMS  # two programs may mean two things by it
    return {
        "version of mpi_dasgd": mpi_dasgd.__version__,
        "byte order": sys.byteorder,
        **{k: v for k, v in settings if k in _KEYS or k.partition(".")[0] in _SECTIONS},
        **({"class of the algorithm": run.algorithm_cls.__qualname__} if own else {}),
        "edge": [] if run.topology.cayley else _edges(run.topology),
    }


def _edges(topology: Topology) -> Rows:
    return [
        (f"{rank}-{other}", {"weight": weight})
        for rank in range(topology.size)
        for other, weight in zip(topology.neighbours(rank), topology.weights(rank), strict=True)
        if rank < other
    ]


def facts_of_model(parameters: FlatParameters, buffers: ModelBuffers) -> dict[str, Any]:
    """Return what has to be equal of the models."""
    labels = ("shape", "dtype", "strides", "offset")
    rows = parameters.description()
    return {
        "dtype of the vector": str(parameters.dtype),
        "parameter": [(name, dict(zip(labels, row, strict=True))) for name, *row in rows],
        "buffer": buffers.description(),
    }


def facts_of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what has to be equal where each rank applies the gradients of all by itself."""
    groups = [
        {key: _plain(value) for key, value in group.items() if key not in _MEANS}
        for group in optimizer.param_groups
    ]
    return {
        "class of the optimizer": type(optimizer).__name__,
        "optimizer": [(f"group {index}", group) for index, group in enumerate(groups)],
    }


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def require_agreement(
    comm: MPI.Intracomm | SurvivingRanks,
    facts: Mapping[str, Any],
    remedy: str = "give all ranks the same settings",
) -> None:
    """Compare `facts` of all ranks: a hash of 16 bytes, and words only if it differs. Collective.

    Args:
        comm: communicator of the ranks.
        facts: values by name; a list of rows (name, details by label), for example the parameters
            of a model, is compared row by row.
        remedy: what to do about a difference.

    Raises:
        UserError: on all ranks, if one differs: which ranks, in what, and both values.
    """
    text = json.dumps(facts, default=lambda value: type(value).__qualname__)
    groups: dict[bytes, list[int]] = {}
    for rank, digest in enumerate(comm.allgather(xxhash.xxh3_128_digest(text.encode()))):
        if digest is not None:  # as that of a rank that is lost
            groups.setdefault(digest, []).append(rank)
    if len(groups) == 1:
        return
    shown = list(groups.values())[:_GROUPS]
    texts = comm.allgather(text if comm.rank in {ranks[0] for ranks in shown} else None)
    others = sum(map(len, groups.values())) - sum(map(len, shown))
    found = describe([(ranks, json.loads(texts[ranks[0]])) for ranks in shown], others)
    raise UserError(f"the ranks do not agree: {found}; {remedy}", on_all_ranks=True)


def describe(groups: Groups, others: int = 0) -> str:
    """Return in words in what groups of ranks differ.

    Args:
        groups: ranks, and the facts that they share; those of rank 0 first.
        others: number of ranks that differ from all of these.
    """
    names = dict.fromkeys(name for _, facts in groups for name in facts)
    found: list[str] = []
    for name in names:
        values = [(ranks, facts.get(name)) for ranks, facts in groups]
        if all(value == values[0][1] for _, value in values):
            continue
        if any(_is_rows(value) for _, value in values):
            found += _describe_rows(name, [(ranks, value or []) for ranks, value in values])
        else:
            found.append(f"{name} is {_alternatives(values)}{_HINTS.get(name, '')}")
    more = f"; and {len(found) - _DIFFERENCES} more" if len(found) > _DIFFERENCES else ""
    also = f" ({others} other ranks differ from all of these)" if others else ""
    return f"{'; '.join(found[:_DIFFERENCES])}{more}{also}"


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, list | tuple) for row in value)


def _describe_rows(what: str, groups: Groups) -> Iterator[str]:
    """Yield the first difference of each group of ranks from the first one."""
    (first, rows), *rest = groups
    for ranks, other_rows in rest:
        if other_rows != rows:
            yield _first_difference(what, first, rows, ranks, other_rows)


def _first_difference(
    what: str, ranks: Sequence[int], rows: Rows, other_ranks: Sequence[int], other_rows: Rows
) -> str:
    here, there = _ranks(ranks), _ranks(other_ranks)
    names, other_names = ([name for name, _ in each] for each in (rows, other_rows))
    only = [_only(what, names, other_names, here), _only(what, other_names, names, there)]
    if any(only):
        return " and ".join(filter(None, only))
    pairs = list(zip(rows, other_rows, strict=True))
    for number, ((name, _), (other, _)) in enumerate(pairs, start=1):
        if name != other:
            return (
                f"{what} {number} is {name} on {here}, {other} on {there} (layers in another order,"
                " or weights that share memory)"
            )
    name, details, others = next((n, d, o) for (n, d), (_, o) in pairs if d != o)
    differing = [label for label in details if details[label] != others.get(label)]
    texts = (
        ", ".join(f"{label} {_value(each.get(label))}" for label in differing)
        for each in (details, others)
    )
    return f"{what} {name} has " + ", ".join(
        f"{text} on {where}" for text, where in zip(texts, (here, there), strict=True)
    )


def _only(what: str, names: Sequence[str], others: Sequence[str], where: str) -> str:
    """Return in words which of `names` is not among `others`; '' if all are."""
    only = [name for name in names if name not in set(others)]
    more = f" and {len(only) - 1} more" if len(only) > 1 else ""
    return f"{what} {only[0]}{more} exists on {where} only" if only else ""


def _alternatives(values: Groups) -> str:
    """Return distinct values in words, with the ranks that have them."""
    distinct: dict[str, list[int]] = {}
    for ranks, value in values:
        distinct.setdefault(_value(value), []).extend(ranks)
    return ", ".join(f"{value} on {_ranks(sorted(ranks))}" for value, ranks in distinct.items())


def _value(value: object) -> str:
    return "unset" if value is None else json.dumps(value)


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {listed}{more}"
