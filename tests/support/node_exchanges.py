"""Ranks of one node that exchange in pairs, in one process: by the lines of Python, or natively."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpi_dasgd import codecs, topology
from mpi_dasgd.algorithms import peer_rng
from mpi_dasgd.algorithms.pair_averaging import PairExchange
from mpi_dasgd.algorithms.records import ExchangeRecord, ExchangeRecorder
from mpi_dasgd.codecs import Codec
from mpi_dasgd.config.schema import AlgorithmConfig, CodecConfig
from mpi_dasgd.errors import Diverged
from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, OptimizerStep, adam_group, sgd_group
from mpi_dasgd.transport.release import Immediate
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
from mpi_dasgd.transport.rma.native_inbox import NativeInbox
from mpi_dasgd.transport.rma.native_publication import NativePublication
from mpi_dasgd.transport.rma.node_peers import NodePeers
from mpi_dasgd.transport.rma.peer_views import PeerViews
from tests.support.traced_memory import TracedMemory

__all__ = ["FLOAT32", "NodeRank", "codec_of", "node_endpoint"]

FLOAT32 = np.dtype(np.float32)


def codec_of(name: str, elements: int, seed: int, rank: int) -> Codec:
    """Return the codec of a rank."""
    return codecs.make(CodecConfig(name=name), elements, FLOAT32, seed=seed, rank=rank)  # type: ignore[arg-type]


def node_endpoint(
    memory: TracedMemory, rank: int, max_claims: int = 2, *, native: bool, traced: bool = True
) -> RmaEndpoint:
    """Return the endpoint of a rank on `memory`, without what is collective: threads and windows.

    Args:
        memory: words and slots of all ranks.
        rank: the rank.
        max_claims: see `Publication`.
        native: whether publication, inbox and exchange are in native code.
        traced: whether native operations are traced, too.
    """
    endpoint: Any = object.__new__(RmaEndpoint)
    state = memory.native_rank(rank, max_claims, traced=traced) if native else None
    if state is None:
        views = memory.python_views(rank, max_claims)
    else:
        of_node = state, memory, memory, memory.word_map, rank
        views = PeerViews(NativePublication(*of_node), NativeInbox(*of_node), state.counters)
    endpoint._native = state
    endpoint.publication, endpoint.inbox, endpoint.counters = views
    endpoint.rank, endpoint.size = rank, len(memory.words)
    endpoint.topology = topology.build("complete", endpoint.size)
    endpoint._neighbours = endpoint.topology.neighbours(rank)
    endpoint._slots, endpoint._node = memory, NodePeers(views, memory)
    endpoint._inbox_slots = len(memory.word_map.inbox)
    endpoint._remote_ranks, endpoint._closed = frozenset(), False
    endpoint.release = Immediate(memory)
    endpoint.run_ahead = SimpleNamespace(catch_up=lambda: None)
    result: RmaEndpoint = endpoint
    return result


class NodeRank:
    """A rank with its model, codec and pair exchanges.

    Args:
        memory: words and slots of all ranks.
        rank: the rank.
        x: model, float32.
        codec: name of the codec.
        seed: of the run.
        settings: section ``algorithm``.
        native, traced, max_claims: as for `node_endpoint`.
        optimizer: ``sgd`` or ``adam``.
    """

    def __init__(
        self,
        memory: TracedMemory,
        rank: int,
        x: np.ndarray,
        codec: str,
        seed: int,
        settings: AlgorithmConfig,
        *,
        native: bool,
        traced: bool = True,
        max_claims: int = 2,
        optimizer: str = "sgd",
        sink: Any = None,
    ) -> None:
        self.x = x
        self.endpoint = node_endpoint(memory, rank, max_claims, native=native, traced=traced)
        self.codec = codec_of(codec, x.size, seed, rank)
        self.records: list[ExchangeRecord] = []
        recorder = ExchangeRecorder(self.endpoint, self.records.append if sink is None else sink)
        self.pairs = PairExchange(
            SimpleNamespace(  # type: ignore[arg-type]
                endpoint=self.endpoint,
                codec=self.codec,
                settings=settings,
                rng=peer_rng(seed, rank),
                records=recorder,
            )
        )
        self.steps = 0
        self._kind = optimizer
        self._gradient = np.zeros_like(x)
        groups = np.zeros(1, GROUP)
        ends = sorted({0, x.size // 3, x.size})  # two parameters
        segments = np.array(
            [(a, b - a, self._gradient[a:].ctypes.data, 0) for a, b in pairwise(ends)],
            SEGMENT,
        )
        state = [np.zeros_like(x) for _ in range(2)]
        self.update = OptimizerStep(segments, groups, *state)
        self.update.on_made = self._made

    def next_update(self, rng: random.Random, size: float = 1e-2) -> OptimizerStep:
        """Return the step of the optimizer with a new random gradient."""
        self.steps += 1
        noise = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(self.x.size)
        self._gradient[:] = noise * size
        self.update.groups[0] = (
            sgd_group(0.1, 0.9, first=self.steps == 1)
            if self._kind == "sgd"
            else adam_group(0.01, (0.9, 0.999), 1e-8, 0.01, self.steps, decoupled=True)
        )
        self.update.nonfinite[0] = 0
        return self.update

    def _made(self) -> None:
        if self.update.nonfinite[0] and self.update.refuses_nonfinite:
            raise Diverged("the model is not finite")

    def state(self) -> dict[str, Any]:
        """Return all that must not depend on who makes the exchanges, by name."""
        scale: Any = getattr(self.codec, "scale", None)
        found: dict[str, Any] = {
            "records": [(*r[:4], *r[5:10]) for r in map(_comparable, self.records)],  # no times
            "models": self.x.tobytes(),
            "counters": self.endpoint.counters.as_dict(),
            "codec counters": dict(self.codec.counters),
            "optimizer": [a.tobytes() for a in (self.update.first, self.update.second)],
            "generator": self.pairs._rng.getstate(),
        }
        if scale is not None:
            arrays = scale.estimate, scale._floor, scale._last_scales
            found["scales"] = [array.tobytes() for array in arrays]
            found["scale"] = scale.struct.encodings, scale.struct.max_estimate
            found["seeds"] = self.codec._seeds.drawn  # type: ignore[attr-defined]
        return found


def _comparable(record: ExchangeRecord) -> ExchangeRecord:
    """Return a record with its distance as bits, so that NaN is equal to itself."""
    return record._replace(distance=np.float64(record.distance).tobytes())  # type: ignore[arg-type]
