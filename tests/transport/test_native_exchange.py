"""The native pair exchange against the lines of Python, bit for bit, in the same interleavings."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.algorithms.records import ABSORBED
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.errors import Diverged, MpiDasgdError, UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.transport.rma.native_exchange import NativeExchange
from tests.support.native_mutants import EXCHANGE_MUTANTS, mutant
from tests.support.node_exchanges import NodeRank, codec_of
from tests.support.traced_memory import TracedMemory

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.status())

CODECS = ("lattice8", "none", "lattice4", "lattice16")
MOVES = (
    *("exchange", "exchange", "exchange", "update", "update", "quiet", "absorb", "absorb_publish"),
    *("publish", "publish_update"),
)
SPOILED = (np.nan, 1e30, -np.inf)


class World:
    """The ranks of a job, all in native code or none."""

    def __init__(self, dice: random.Random, codec: str, *, native: bool, library: Any) -> None:
        seed, size = dice.randrange(1000), dice.choice([2, 2, 3, 5])
        elements = dice.choice([1, 700, 1024, 2500, 5000])
        slots = dice.choice([(4, 4), (3, 1), (4, 2), (5, 3)])
        settings = AlgorithmConfig(
            name="adpsgd",
            max_attempts=dice.choice([1, 2, 4]),
            mixing_weight=dice.choice([0.5, 0.3]),
        )
        layout = codec_of(codec, elements, seed, 0).layout
        self.memory = TracedMemory(layout, size, *slots, library=library)
        base = np.random.default_rng(seed)
        start = base.standard_normal(elements) * 0.02
        kind = dice.choice(["sgd", "adam"])
        self.ranks = []
        for rank in range(size):
            x = (start + 1e-3 * base.standard_normal(elements)).astype(np.float32)
            self.ranks.append(
                NodeRank(
                    self.memory, rank, x, codec, seed, settings,
                    native=native, max_claims=max(1, slots[0] - 2), optimizer=kind,
                )
            )  # fmt: skip
        self.busy: set[int] = set()
        self.log: list[Any] = []

    def act(self, rank: int, move: str, step: int, seed: int) -> None:
        """A move of a rank, unless it is in the middle of one."""
        if rank in self.busy:
            return
        self.busy.add(rank)
        try:
            self.log.append((rank, move, self._move(self.ranks[rank], move, step, seed)))
        except Diverged:
            self.log.append((rank, move, "diverged"))
            self.ranks[rank].x[:] = 0
        self.busy.discard(rank)

    def give_up(self, rank: int, other: int) -> None:
        """A rank takes another one for dead."""
        self.busy.add(rank)
        endpoint = self.ranks[rank].endpoint
        endpoint.publication.reclaim_from(other)
        endpoint.inbox.reclaim_from(other)
        self.busy.discard(rank)

    def _move(self, rank: NodeRank, move: str, step: int, seed: int) -> Any:
        dice, pairs, x = random.Random(seed), rank.pairs, rank.x
        x += (dice.random() * 10.0 ** dice.randrange(-6, -1)) * np.sin(
            np.arange(x.size) + seed % 97
        )
        if dice.random() < 0.06:
            x[seed % x.size] = dice.choice(SPOILED)
        elif not np.isfinite(x).all() or abs(x).max() > 100:
            x[:] = 0.01
        if move == "absorb":
            return pairs.absorb(x, step)
        if move == "absorb_publish":
            return pairs.absorb(x, step, publish_result=True)
        if move == "publish":
            return pairs.publish(x, step)
        if move == "publish_update":
            return pairs.publish(x, step, rank.next_update(dice))
        update = rank.next_update(dice) if move == "update" else None
        rank.update.refuses_nonfinite = dice.random() < 0.8
        return pairs.exchange(x, step, publish_result=move != "quiet", update=update)

    def state(self) -> dict[str, Any]:
        """All that must be the same in both worlds, by name."""
        payload = self.memory.payload.copy().reshape(-1, self.memory.layout.nbytes)
        payload[:, 24:32] = 0  # the time of day
        found: dict[str, Any] = {
            "log": self.log,
            "trace": self.memory.trace,
            "words": self.memory.words.tolist(),
            "slots": payload.tobytes(),
        }
        for rank in self.ranks:
            for name, value in rank.state().items():
                found[f"{name} of rank {rank.endpoint.rank}"] = value
        return found


def play(
    seed: int, codec: str, moves: int, library: Any = None, done: Counter[str] | None = None
) -> str | None:
    """Play a schedule in both; return where they differ, and count what has happened."""
    dice = random.Random(seed)
    worlds = [World(random.Random(seed), codec, native=n, library=library) for n in (False, True)]
    size = len(worlds[0].ranks)
    for step in range(1, moves + 1):
        rank, move, own = dice.randrange(size), dice.choice(MOVES), dice.randrange(1 << 30)
        others = {
            dice.randrange(1, 25): (
                dice.randrange(size),
                dice.choice(MOVES),
                dice.randrange(1 << 30),
            )
            for _ in range(dice.choice([0, 0, 1, 2, 4]))
        }
        flips = dice.randrange(1 << 30) if dice.random() < 0.2 else None
        dies = dice.sample(range(size), 2) if dice.random() < 0.05 else None
        for world in worlds:
            world.memory.begin(
                {
                    at: partial(world.act, who, what, step, chance)
                    for at, (who, what, chance) in others.items()
                }
            )
            if flips is not None and codec != "none":
                world.memory.flip(flips)
            world.act(rank, move, step, own)
            if dies is not None:
                world.give_up(*dies)
        first, second = (world.state() for world in worlds)
        for name, expected in first.items():
            if expected != second[name]:
                return f"{codec}, seed {seed}, step {step} ({move} of {rank}): {name} differ"
        for world in worlds:
            if done is not None and world is worlds[1]:
                done.update(str(result) for *_, result in world.log if isinstance(result, str))
            world.log.clear()
    if done is not None:
        for actor in worlds[1].ranks:
            done.update(actor.endpoint.counters.as_dict())
            done.update(dict(actor.codec.counters))
    return None


@pytest.mark.parametrize("codec", CODECS)
def test_native_exchanges_are_those_of_python(codec: str) -> None:
    done: Counter[str] = Counter()
    for seed in range(30):
        assert play(seed, codec, 40, done=done) is None
    happened = ["messages", "absorbed", "publications_skipped", "claims_lost", "inbox_full"]
    happened += ["skipped", "diverged"]
    if codec.startswith("lattice"):
        happened += ["buckets_decoded", "buckets_rejected", "buckets_corrupt"]
    assert all(done[name] > 5 for name in happened), done


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *EXCHANGE_MUTANTS])
def test_the_differential_test_finds_faults(name: str | None, tmp_path: Path) -> None:
    library = mutant(name, tmp_path)
    codecs = ("lattice8", "none", "lattice4")
    found = (play(seed, codecs[seed % 3], 40, library) for seed in range(45))
    assert any(found) is (name is not None)


def two_ranks(
    codec: str = "lattice8", sinks: tuple[Any, Any] = (None, None), *, native: bool = True
) -> list[NodeRank]:
    """Two ranks that have published."""
    memory = TracedMemory(codec_of(codec, 3000, 1, 0).layout, 2)
    ranks = []
    for rank in range(2):
        x = np.linspace(-1, 1, 3000, dtype=np.float32) + np.float32(rank * 1e-3)
        ranks.append(
            NodeRank(
                memory, rank, x, codec, 1, AlgorithmConfig(name="adpsgd"),
                native=native, traced=False, sink=sinks[rank],
            )
        )  # fmt: skip
    for actor in ranks:
        assert actor.pairs.publish(actor.x, 0)
    return ranks


@pytest.mark.parametrize("codec", CODECS)
def test_the_sum_of_the_models_is_kept(codec: str) -> None:
    ranks = two_ranks(codec)
    before = sum(float(rank.x.astype(np.float64).sum()) for rank in ranks)
    for step in range(1, 30):
        for rank in ranks:
            rank.pairs.exchange(rank.x, step, publish_result=True)
    for rank in ranks:
        rank.pairs.absorb(rank.x, 30)
    after = sum(float(rank.x.astype(np.float64).sum()) for rank in ranks)
    assert abs(after - before) < 1e-3
    assert all(rank.endpoint.counters.messages > 20 for rank in ranks)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("codec", ["lattice8", "none"])
def test_a_model_that_diverges_has_absorbed_what_it_received(codec: str, native: bool) -> None:
    """Else its messages would fill the inbox for ever, and no pause would end."""
    one, two = two_ranks(codec, native=native)
    two.pairs.exchange(two.x, 1, publish_result=True)
    assert one.endpoint.inbox.has_messages
    update = one.next_update(random.Random(1))
    one._gradient[7] = np.nan
    with pytest.raises(Diverged):
        one.pairs.exchange(one.x, 1, publish_result=True, update=update)
    assert not one.endpoint.inbox.has_messages
    assert [(r.kind, r.partner) for r in one.records] == [(ABSORBED, 1)]
    assert two.endpoint.publication.claims == 0
    assert not two.endpoint.inbox.has_messages


def test_a_full_ring_of_records_loses_no_row() -> None:
    rings = tuple(RecordRing("exchange", 8) for _ in range(2))
    ranks = two_ranks(sinks=rings)
    for step in range(1, 100):
        for rank in ranks:
            rank.pairs.exchange(rank.x, step, publish_result=True)
    rows = rings[0].take()
    assert [row["step"] for row in rows if row["kind"] != 1] == list(range(1, 100))
    assert len(rows) == 99 + ranks[0].endpoint.counters.absorbed


def test_a_ring_that_is_smaller_than_an_inbox_is_not_used() -> None:
    ranks = two_ranks(sinks=tuple(RecordRing("exchange", 4) for _ in range(2)))
    assert ranks[0].pairs._native is None


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_that_is_derived_from_ours_is_asked(codec: str) -> None:
    """It may average otherwise."""
    mine = codec_of(codec, 3000, 1, 0)
    assert mine.native_state() is not None
    mine.__class__ = type("Derived", (type(mine),), {})
    assert mine.native_state() is None
    assert codec_of("bf16", 3000, 1, 0).native_state() is None


def test_a_message_of_another_kind_is_refused() -> None:
    one, two = two_ranks()
    memory: Any = one.endpoint._slots
    for index in range(8):
        memory.view(1, index).buffer[6] ^= 1  # the codec's number
    with pytest.raises(MpiDasgdError, match=r"message header: expected .magic, version, codec"):
        one.pairs.exchange(one.x, 1, publish_result=True)
    assert two.endpoint.counters.absorbed == 0


def test_a_model_of_another_kind_is_refused() -> None:
    one, _ = two_ranks()
    for wrong in (one.x[::2], one.x[:-1], one.x.astype(np.float64)):
        with pytest.raises(UserError, match="^y: expected a 1-D, contiguous array of float32"):
            one.pairs.exchange(wrong, 1, publish_result=True)


def test_a_closed_transport_is_not_used() -> None:
    one, _ = two_ranks()
    assert isinstance(one.pairs._native, NativeExchange)
    assert one.endpoint._native is not None
    one.endpoint._native.close()
    with pytest.raises(RuntimeError, match="transport is closed"):
        one.pairs.exchange(one.x, 1, publish_result=True)
