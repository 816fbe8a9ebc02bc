"""Algorithms, one file per paper, to be read beside it; finding and registering them."""

from __future__ import annotations

from mpi_dasgd.algorithms.adpsgd import ADPSGD
from mpi_dasgd.algorithms.adpsgd_bipartite import BipartiteADPSGD
from mpi_dasgd.algorithms.adpsgd_pull import PullADPSGD
from mpi_dasgd.algorithms.allreduce import AllReduce
from mpi_dasgd.algorithms.asgd import ASGD
from mpi_dasgd.algorithms.asynchronous import AsynchronousAlgorithm
from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer, peer_rng
from mpi_dasgd.algorithms.dasgd import DASGD
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.dpsgd import DPSGD
from mpi_dasgd.algorithms.easgd import EASGD
from mpi_dasgd.algorithms.local_sgd import LocalSGD
from mpi_dasgd.algorithms.minibatch import MiniBatch
from mpi_dasgd.algorithms.no_communication import Alone
from mpi_dasgd.algorithms.osgp import OSGP
from mpi_dasgd.algorithms.records import ExchangeRecord, RecordSink
from mpi_dasgd.algorithms.sgp import SGP
from mpi_dasgd.algorithms.swarm import Swarm
from mpi_dasgd.algorithms.swarm_blocking import BlockingSwarm
from mpi_dasgd.algorithms.swarm_pull import PullSwarm
from mpi_dasgd.config.schema import OWN_ALGORITHMS
from mpi_dasgd.errors import UserError, nearest

__all__ = [
    "ALGORITHMS",
    "VARIANTS",
    "Algorithm",
    "AsynchronousAlgorithm",
    "Capabilities",
    "Description",
    "ExchangeRecord",
    "LocalOptimizer",
    "RecordSink",
    "find",
    "peer_rng",
    "register",
]

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm_cls.name: algorithm_cls
    for algorithm_cls in (
        ADPSGD,
        Swarm,
        DASGD,
        ASGD,
        MiniBatch,
        EASGD,
        DPSGD,
        SGP,
        OSGP,
        LocalSGD,
        AllReduce,
        Alone,
    )
}


VARIANTS: dict[str, tuple[type[Algorithm], ...]] = {
    ADPSGD.name: (ADPSGD, BipartiteADPSGD, PullADPSGD),
    Swarm.name: (Swarm, BlockingSwarm, PullSwarm),
}
"""Classes of the values of `algorithm.variant`; the first one is the default."""


def find(name: str, variant: str | None = None) -> type[Algorithm]:
    """Return the class of the algorithm `name`, in its default variant or the one given.

    Raises:
        UserError: there is no such algorithm or variant.
    """
    if name not in ALGORITHMS:
        valid = ", ".join(ALGORITHMS)
        raise UserError(
            f"algorithm.name: {name!r} is not known{nearest(name, ALGORITHMS)} (valid: {valid})"
        )
    if variant is None:
        return ALGORITHMS[name]
    variants = {algorithm_cls.variant: algorithm_cls for algorithm_cls in VARIANTS.get(name, ())}
    if variant not in variants:
        valid = f"it has {', '.join(variants)}" if variants else "it has none"
        raise UserError(f"algorithm.variant: {name!r} has no variant {variant!r}: {valid}")
    return variants[variant]


def register(algorithm: type[Algorithm]) -> type[Algorithm]:
    """Register an algorithm under its `name`, as a decorator of its class; return the class.

    From then on `algorithm.name`, `Decentralized(algorithm=...)` and the simulator accept the name.
    On ranks, each of them must register it before it reads a configuration that names it.

    Raises:
        ValueError: another algorithm has this name.
    """
    if ALGORITHMS.get(algorithm.name, algorithm) is not algorithm:
        raise ValueError(f"there is an algorithm {algorithm.name!r} already; choose another name")
    ALGORITHMS[algorithm.name] = algorithm
    OWN_ALGORITHMS.add(algorithm.name)
    return algorithm
