"""Codecs make an optimizer's step in their pass: the bits are those of the step, then the pass."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_dasgd.codecs import Codec, ExchangeBuffers, Message, make
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.kernels import native, optimizer, pair_average
from tests.support.optimizer_cases import OptimizerCase, kinds

N = 20_000
CODECS = ["none", "bf16", "fp16", "qsgd8", "lattice4", "lattice8", "lattice16"]


def _codec(name: str, threads: int, elements: int = N) -> Codec:
    return make(
        CodecConfig(name=name, threads=threads), elements, np.dtype(np.float32), seed=1, rank=0
    )


def _message(codec: Codec) -> Message:
    return Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)


def _run(name: str, case: OptimizerCase, exchanges: bool, fused: bool, threads: int) -> list[bytes]:
    """Return everything that two exchanges leave, with the step in their pass or before it."""
    elements = case.elements
    codec, partner = _codec(name, threads, elements), _codec(name, 1, elements)
    x, step = case.make()
    other = x + np.random.default_rng(2).normal(size=elements).astype(np.float32) * np.float32(1e-3)
    results: list[bytes] = []
    for _ in range(2):
        published, reply, publication, delta = (_message(codec) for _ in range(4))
        partner.encode(other, published)
        published.stamp(rank=1, step=1, time_ns=1)
        partner.average_pair(
            other.copy(), ExchangeBuffers(partner_model=published, reply_delta=delta)
        )
        delta.stamp(rank=1, step=1, time_ns=1)
        buffers = ExchangeBuffers(publication=publication, update=step)
        if exchanges:
            buffers.deltas, buffers.partner_model = [delta], published
            buffers.reply_delta = reply
        if not fused:
            optimizer.run(step, x)
            buffers.update = None
        outcome = codec.average_pair(x, buffers).value()
        assert step.nonfinite[0] == 0
        state = (step.first, step.second, step.third)
        results += [array.tobytes() for array in (x, *state, reply.body, publication.body)]
        results.append(repr(outcome).encode())
    return results


@pytest.mark.parametrize("exchanges", [False, True], ids=["alone", "exchange"])
@pytest.mark.parametrize("name", CODECS)
def test_a_step_in_the_pass_is_the_step_before_it(name: str, exchanges: bool) -> None:
    for kind, groups in list(kinds())[::5]:
        case = OptimizerCase(kind, N, groups, seed=3)
        expected = _run(name, case, exchanges, fused=False, threads=1)
        assert _run(name, case, exchanges, fused=True, threads=2) == expected, str(case)


@pytest.mark.parametrize("name", ["none", "lattice4", "lattice8"])
def test_a_large_model_is_shared_by_threads(name: str) -> None:
    for kind, groups in list(kinds())[1::11]:
        case = OptimizerCase(kind, 3 * 64 * 1024 + 77, groups, seed=4)
        expected = _run(name, case, True, fused=False, threads=1)
        assert _run(name, case, True, fused=True, threads=3) == expected, str(case)


@pytest.mark.parametrize("name", CODECS)
def test_without_the_library_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, groups = list(kinds())[30]
    case = OptimizerCase(kind, N, groups, seed=3)
    expected = _run(name, case, True, fused=True, threads=1)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(pair_average, "_native", lambda char: None)
    monkeypatch.setattr(optimizer, "_native_range", lambda: None)
    assert _run(name, case, True, fused=True, threads=1) == expected


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", [0, 12_345, N - 1])
@pytest.mark.parametrize("name", CODECS)
def test_a_model_that_is_not_finite_behind_the_step_is_seen(
    name: str, where: int, value: float
) -> None:
    codec = _codec(name, 1)
    x, step = OptimizerCase("SGD", N, [optimizer.sgd_group(0.1)], seed=3).make()
    step.segments["gradient"] = 0  # also where there is no gradient
    x[where] = value
    publication = _message(codec)
    with np.errstate(invalid="ignore"):
        codec.average_pair(x, ExchangeBuffers(publication=publication, update=step))
    assert step.nonfinite[0] == 1
