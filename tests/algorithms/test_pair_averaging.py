"""Pair averages whose claims come late: what is held of a partner when the own model diverges."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.algorithms import peer_rng
from mpi_dasgd.algorithms.pair_averaging import PairExchange
from mpi_dasgd.algorithms.records import ExchangeRecorder
from mpi_dasgd.codecs import ExchangeOutcome
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.errors import Diverged
from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, OptimizerStep
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import ExchangeRequest


class SlowEndpoint:
    """A rank whose partner answers when the test says so."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.begun: list[ExchangeRequest] = []
        self.aborted: list[ExchangeRequest] = []
        self.counters = Counters()
        self.inbox = SimpleNamespace(receive=list)
        self.publication = SimpleNamespace(reserve=lambda: None)

    def begin_exchange(self, candidates: list[int]) -> ExchangeRequest:
        self.begun.append(ExchangeRequest())
        return self.begun[-1]

    def abort_exchange(self, request: ExchangeRequest) -> None:
        self.aborted.append(request)

    def native_exchange(self, *_: Any) -> None: ...
    def catch_up(self) -> None: ...
    def neighbours(self) -> list[int]:
        return [1]

    def is_local(self, rank: int) -> bool:
        return False

    def time_ns(self) -> int:
        return 0


def test_a_claim_that_was_aborted_is_not_used_again_and_one_that_is_due_is_kept() -> None:
    endpoint: Any = SlowEndpoint()
    algorithm: Any = SimpleNamespace(
        endpoint=endpoint,
        codec=SimpleNamespace(average_pair=lambda *_: ExchangeOutcome()),
        settings=AlgorithmConfig(name="adpsgd"),
        rng=peer_rng(0, 0),
        records=ExchangeRecorder(endpoint, None),
    )
    pairs, x = PairExchange(algorithm), np.zeros(3, np.float32)
    diverged = OptimizerStep(np.zeros(1, SEGMENT), np.zeros(1, GROUP))

    def refuse() -> None:
        raise Diverged("the model is not finite")

    diverged.on_made = refuse
    for is_settled in (False, True):  # it is answered between the two
        for request in endpoint.begun:
            request.is_settled = is_settled
        with pytest.raises(Diverged):
            pairs.exchange(x, 1, publish_result=True, update=diverged)
    assert endpoint.aborted == endpoint.begun
    assert len(endpoint.begun) == 1
    pairs.exchange(x, 2, publish_result=True)
    assert len(endpoint.begun) == 2
