"""The codecs as algorithms use them: what they cost, what they conserve, how the scale follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpi_dasgd import codecs, config
from mpi_dasgd.codecs import CODECS, Codec, ExchangeBuffers, Message
from mpi_dasgd.codecs.bucket_scale import AdaptiveScale
from mpi_dasgd.codecs.lattice import LatticeCodec
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.simulation.simulator import Simulator, simulate
from tests.support.mpi_ranks import ROOT

LOSSY = [name for name in CODECS if name != "none"]
F32 = np.dtype(np.float32)
JOB = ROOT / "jobs" / "sim_quadratic.toml"


def _make(name: str, elements: int, rank: int = 0, **settings: Any) -> Codec:
    return codecs.make(CodecConfig(name=name, **settings), elements, F32, seed=1, rank=rank)  # type: ignore[arg-type]


def _message(codec: Codec) -> Message:
    message = Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)
    message.stamp(rank=0, step=0, time_ns=0)
    return message


def _pair(name: str, elements: int, **settings: Any) -> tuple[Codec, Codec]:
    return _make(name, elements, 0, **settings), _make(name, elements, 1, **settings)


def _exchange(own: Codec, x: np.ndarray, other: Codec, y: np.ndarray) -> codecs.ExchangeOutcome:
    """One whole exchange: `y` is published, `x` moves, and then `y` by the delta."""
    publication, reply = _message(other), _message(own)
    other.encode(y, publication)
    outcome = own.average_pair(x, ExchangeBuffers(partner_model=publication, reply_delta=reply))
    other.average_pair(y, ExchangeBuffers(deltas=[reply]))
    return outcome.value()


def _figures(*overrides: str) -> dict[str, Any]:
    return simulate(config.load(JOB, ["simulation.dtype=float32", *overrides]))


# --- bytes and shapes ---


@pytest.mark.parametrize(
    ("name", "share"),
    [("bf16", 1 / 2), ("fp16", 1 / 2), ("lattice16", 1 / 2), ("lattice8", 1 / 4),
     ("lattice4", 1 / 8),
     ("qsgd8", 1 / 4)],
)  # fmt: skip
def test_a_message_of_a_large_model_has_the_size_that_was_promised(name: str, share: float) -> None:
    elements = 1 << 20
    assert _make(name, elements).layout.nbytes / (4 * elements) == pytest.approx(share, abs=0.003)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("elements", [0, 1, 5, 1023, 1024, 1025, 40_000])
def test_models_of_any_size_are_averaged(name: str, elements: int) -> None:
    rng = np.random.default_rng(elements)
    x = rng.normal(size=elements).astype(np.float32)
    y = x + rng.normal(size=elements).astype(np.float32) * np.float32(0.02)
    total, apart = x.astype(np.float64) + y, np.abs(x - y).max(initial=0)
    own, other = _pair(name, elements)
    for _ in range(30):  # so that the scale is found
        _exchange(own, x, other, y)
    np.testing.assert_allclose(x.astype(np.float64) + y, total, atol=3e-5)
    worst = {"lattice4": 0.7, "bf16": 0.5, "qsgd8": 2.5}.get(name, 0.2)
    assert np.abs(x - y).max(initial=0) <= worst * apart


@pytest.mark.parametrize("name", CODECS)
def test_a_delta_moves_the_partner_by_what_was_moved_here(name: str) -> None:
    rng = np.random.default_rng(3)
    # Integers, of which some are published as they are: neither side's addition rounds.
    x = rng.integers(-100, 100, 5000).astype(np.float32)
    y = x + rng.integers(-3, 4, 5000).astype(np.float32)
    own, other = _pair(name, 5000)
    publication, reply = _message(other), _message(own)
    other.encode(y, publication)
    before = x.copy()
    own.average_pair(x, ExchangeBuffers(partner_model=publication, reply_delta=reply))
    np.testing.assert_allclose(x - before, -own.delta(reply), atol=2e-5)
    assert np.abs(own.delta(reply)).max() > 0.5


def test_unknown_names_and_other_types_are_refused() -> None:
    settings = CodecConfig.model_construct(name="latice8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'lattice8'"):
        codecs.make(settings, 10, F32, seed=0, rank=0)
    for name in LOSSY:
        with pytest.raises(UserError, match=r"float32.*float64.*'none'"):
            codecs.make(CodecConfig(name=name), 10, np.dtype(np.float64), seed=0, rank=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"takes float32 models.*simulation\.dtype is float64"):
        Simulator(config.load(JOB, ["simulation.dtype=float64", "codec.name=lattice8"]))
    with pytest.raises(UserError, match=r"scale_margin.*at most 2\.1.*got 4"):
        _make("lattice4", 10, scale_margin=4.0)


@pytest.mark.parametrize("name", LOSSY)
def test_messages_of_another_codec_size_or_rounding_are_refused(name: str) -> None:
    own = _make(name, 3000)
    x = np.zeros(3000, np.float32)
    others = [_make(other, 3000) for other in LOSSY if other != name] + [_make(name, 3001)]
    if name.startswith("lattice"):
        others.append(_make(name, 3000, rounding="nearest"))
    for other in others:
        wire = _message(other)
        other.encode(np.zeros(other.layout.elements, np.float32), wire)
        buffer = np.zeros(own.layout.nbytes, np.uint8)
        size = min(buffer.size, wire.buffer.size)
        buffer[:size] = wire.buffer[:size]
        with pytest.raises(MpiDasgdError, match="message header"):
            received = Message(buffer, own.layout)
            own.average_pair(x, ExchangeBuffers(partner_model=received, reply_delta=_message(own)))


# --- the scale ---


def test_the_scale_follows_the_distance_up_and_down() -> None:
    rng = np.random.default_rng(0)
    own, other = _pair("lattice8", 20 * 1024)
    x = rng.normal(size=20 * 1024).astype(np.float32)
    for distance, rounds in ((1e-3, 120), (1e-1, 40), (1e-4, 300)):
        shares = []
        for _ in range(rounds):
            y = x + rng.normal(size=x.size).astype(np.float32) * np.float32(distance)
            shares.append(_exchange(own, x.copy(), other, y).rejected / 20)
        assert np.mean(shares[-20:]) < 0.02
        publication = _message(other)
        other.encode(y, publication)
        largest = np.abs(x - y).reshape(20, 1024).max(1)
        assert (publication.scales * 127 > largest).mean() > 0.9
        assert (publication.scales * 127 < 8 * largest).all()


def test_distance_is_measured() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=9000).astype(np.float32)
    y = x + rng.normal(size=9000).astype(np.float32) * np.float32(0.01)
    for name in CODECS:
        own, other = _pair(name, 9000)
        for _ in range(60):
            outcome = _exchange(own, x.copy(), other, y.copy())
        if name == "none":
            assert np.isnan(outcome.distance)
        else:
            assert outcome.rejected == 0
            assert outcome.distance == pytest.approx(
                np.linalg.norm(x - y), rel=0.5 if name == "qsgd8" else 0.1
            )


def test_a_model_that_is_nan_does_not_drive_the_others_apart() -> None:
    """Each exchange with it is rejected; the scale must not grow without bound for the others."""
    rng = np.random.default_rng(0)
    ranks = [_make("lattice8", 2048, rank) for rank in range(4)]
    models = [rng.normal(size=2048).astype(np.float32)] * 4
    models = [x + rng.normal(size=2048).astype(np.float32) * np.float32(1e-3) for x in models]
    models[3][5] = np.nan
    for _ in range(600):
        i, j = rng.choice(4, 2, replace=False)
        if i < 3:
            models[i] += rng.normal(size=2048).astype(np.float32) * np.float32(1e-4)
        _exchange(ranks[i], models[i], ranks[j], models[j])
    assert np.isfinite(models[:3]).all()
    assert np.ptp(models[:3], axis=0)[:1024].max() < 6  # in the bucket that is NaN elsewhere
    assert np.ptp(models[:3], axis=0)[1024:].max() < 0.01


def test_a_floor_keeps_the_codes_in_range_when_models_agree() -> None:
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32) * 100
    own, other = _pair("lattice8", 5000)
    for _ in range(400):
        assert _exchange(own, x.copy(), other, x.copy()).rejected == 0
    assert (other.scale.estimate < 1e-7).all()  # type: ignore[attr-defined]


def test_a_model_that_starts_at_zero_finds_its_scale() -> None:
    scale = AdaptiveScale(3000, 8, 1024, None, 0.9)
    out = np.zeros(3, np.float32)
    scale.scales(np.zeros(3000, np.float32), out)
    assert (out > 0).all() and np.isfinite(out).all()
    scale = AdaptiveScale(3000, 8, 1024, None, 0.9)
    scale.scales(np.full(3000, np.nan, np.float32), out)
    assert (out > 0).all() and np.isfinite(out).all()


def test_state_goes_through_a_checkpoint() -> None:
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    own, other = _pair("lattice8", 5000)
    for _ in range(5):
        _exchange(own, x, other, x + np.float32(0.1))
    again = _make("lattice8", 5000)
    again.load_state({name: array.copy() for name, array in own.state().items()})
    first, second = _message(own), _message(again)
    own.encode(x, first)
    again.encode(x, second)
    assert first.buffer.tobytes() == second.buffer.tobytes()
    assert first.seed != _exchange_seed(own, x)


def _exchange_seed(codec: Codec, x: np.ndarray) -> int:
    message = _message(codec)
    codec.encode(x, message)
    return message.seed


def test_ranks_draw_different_seeds() -> None:
    x = np.ones(2000, np.float32)
    seeds = {_exchange_seed(_make("lattice8", 2000, rank), x) for rank in range(50)}
    assert len(seeds) == 50


# --- the algorithm with codecs, on the virtual clock ---


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("latency", [0, 0.3])
def test_adpsgd_with_every_codec_conserves_the_sum_and_never_waits(
    name: str, latency: float
) -> None:
    figures = _figures(
        f"codec.name={name}", "simulation.gradients=false", f"simulation.latency={latency}",
        "simulation.dimension=1500", "simulation.ranks=6", "simulation.compute_time=exponential",
        "budget.samples=3000",
    )  # fmt: skip
    assert figures["waits"] == 0
    assert figures["exchanges"] > 1000
    assert figures["conservation_error"] < 1e-5
    apart = figures["final_disagreement"] / figures["max_disagreement"]
    assert apart < {"bf16": 1e-3, "fp16": 1e-4, "qsgd8": 0.05}.get(name, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_effective_step_with_every_codec(name: str) -> None:
    figures = _figures(f"codec.name={name}", "simulation.latency=0.02")
    assert figures["effective_step"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_four_bits_do_not_drive_the_models_apart(seed: int) -> None:
    """Doubling the own estimate does: with scale_margin 1.5 seed 1 ended 1e4 apart."""
    settings = ["simulation.latency=0.02", f"run.seed={seed}", "budget.samples=3000"]
    exact = _figures(*settings, "codec.name=none")["max_disagreement"]
    assert _figures(*settings, "codec.name=lattice4")["max_disagreement"] < 10 * exact


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lattice8", "lattice16"])
def test_a_straggler_and_a_jump_of_the_learning_rate_do_no_harm(name: str) -> None:
    """Distances grow 30-fold at half time: buckets fail, are counted, and nothing diverges."""
    settings = [
        f"codec.name={name}", "simulation.dimension=1500", "simulation.noise=1",
        "simulation.slow_ranks=[0]", "simulation.slow_factor=10", "simulation.ranks=8",
        "budget.samples=6000", "optimizer.lr=0.003", "schedule.name=step",
        "schedule.milestones=[0.5]", "schedule.gamma=30",
    ]  # fmt: skip
    simulation = Simulator(config.load(JOB, ["simulation.dtype=float32", *settings]))
    figures = simulation.run()
    exact = _figures(*settings, "codec.name=none")
    assert not figures["diverged"]
    assert 0 < figures["rejected"] < 0.05
    assert figures["conservation_error"] < 2 * exact["conservation_error"] < 1e-3
    assert figures["final_disagreement"] < 1.5 * exact["final_disagreement"]
    assert figures["final_distance"] == pytest.approx(exact["final_distance"], rel=0.1)


def test_a_simulation_with_a_codec_repeats_bit_for_bit() -> None:
    settings = ["codec.name=lattice8", "simulation.dimension=1100", "simulation.noise=1"]
    results = [_figures(*settings, "budget.samples=500") for _ in range(2)]
    for figures in results:
        del figures["seconds"], figures["events_per_second"]
    assert results[0] == results[1]


@pytest.mark.slow
def test_counts_of_the_codec_are_in_the_figures() -> None:
    simulation = Simulator(config.load(JOB, ["simulation.dtype=float32", "codec.name=lattice8"]))
    figures = simulation.run()
    decoded = sum(codec.counters["buckets_decoded"] for codec in simulation.codecs)
    rejected = sum(codec.counters["buckets_rejected"] for codec in simulation.codecs)
    assert decoded + rejected == figures["exchanges"]
    assert figures["rejected"] == rejected / (decoded + rejected)
    assert isinstance(simulation.codecs[0], LatticeCodec)
    assert figures["bytes_per_message"] == simulation.codecs[0].layout.nbytes
