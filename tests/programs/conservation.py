"""Conservation of the sum of all models by `ADPSGD` on real windows, under stragglers.

What changes the sum on purpose is written down exactly: instead of a gradient, every step adds a
known change that keeps the models apart. (Else they would agree after some dozens of exchanges, and
a lost delta would be too small to be missed.) After the end, which is that of `Decentralized`, no
delta is in flight: the models must add up to what they were plus all changes.

Exact: models are multiples of 2^-8 and the codec rounds deltas to such, so that no addition rounds
and the balance must be zero. Float: the codec `none`; the balance is rounding, as with the codecs
that quantize. With --late each rank has a `LateDevice`: what its exchanges write is there, and what
they read is given back, some milliseconds later. Rank 0 prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[2]))

from mpi_dasgd import codecs, topology
from mpi_dasgd.algorithms.adpsgd import ADPSGD
from mpi_dasgd.algorithms.records import ABSORBED, INITIATED, ExchangeRecord
from mpi_dasgd.codecs import Codec, ExchangeBuffers, ExchangeOutcome, NoCodec
from mpi_dasgd.config.schema import AlgorithmConfig, CodecConfig, TransportConfig
from mpi_dasgd.device.host import HOST
from mpi_dasgd.transport.membership import FINISHED, RUNNING
from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
from tests.support.late_codec import LateCodec, LateWork
from tests.support.late_device import LateDevice
from tests.support.late_faults import AT_ONCE, make_hasty

GRID = np.float32(2.0**-8)


class GridCodec(NoCodec):
    """Like `none`, but deltas are rounded to multiples of `GRID`: then no addition rounds."""

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> ExchangeOutcome:
        partner_model, reply_delta = buffers.partner_model, buffers.reply_delta
        for message in buffers.deltas:
            x += message.payload
        if partner_model is not None and reply_delta is not None:
            delta = np.trunc(np.float32(buffers.weight) / GRID * (partner_model.payload - x)) * GRID
            x += delta
            reply_delta.payload[:] = -delta
        if buffers.publication is not None:
            buffers.publication.payload[:] = x
        return ExchangeOutcome()


class Drops(NoCodec):
    """A mistake: now and then a delta is not sent."""

    _calls = 0

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> ExchangeOutcome:
        outcome = super().average_pair(x, buffers)
        reply_delta = buffers.reply_delta
        self._calls += reply_delta is not None
        if reply_delta is not None and self._calls % 100 == 99:
            reply_delta.payload[:] = 0
        return outcome


MODES = {"exact": GridCodec, "float": NoCodec, "drops": Drops}


class Local:
    """A rank's training without gradients: every step pulls the model back and adds noise.

    Attributes:
        change: float64 sum of all that the steps have changed.
        largest: largest absolute value of an element so far.
    """

    def __init__(
        self, x: np.ndarray, rng: np.random.Generator, dice: random.Random, exact: bool
    ) -> None:
        self.local_step = 0
        self.gradient = np.zeros(0)
        self.change = np.zeros(x.size)
        self.largest = 0.0
        self._x = x
        self._exact = exact
        self._noise = [_values(rng, x.size, exact) for _ in range(8)]
        self._dice = dice

    def fused_update(self, lr_scale: float = 1.0) -> None:
        """Return None: steps are made by `apply`."""

    def apply(self, lr_scale: float = 1.0) -> None:
        """One step."""
        before = self._x.copy()
        pull = np.float32(0.125) * before
        if self._exact:
            pull = np.trunc(pull / GRID) * GRID
        self._x -= pull
        self._x += self._dice.choice(self._noise)
        # The difference of two float32 of like size is exact in float64.
        self.change += self._x.astype(np.float64) - before
        both = max(np.abs(before).max(), np.abs(self._x).max())
        self.largest = max(self.largest, float(both))


def _values(rng: np.random.Generator, elements: int, exact: bool) -> np.ndarray:
    """Random float32, or random multiples of `GRID` of up to 1."""
    if exact:
        return rng.integers(-256, 257, elements).astype(np.float32) * GRID
    return rng.normal(size=elements).astype(np.float32)


def run(comm: MPI.Intracomm, options: argparse.Namespace, mode: str) -> dict:
    """Exchange, drain, and compare the sums. Collective."""
    rng = np.random.default_rng([options.seed, comm.rank])
    dice = random.Random(1000 * options.seed + comm.rank)
    x = _values(rng, options.elements, mode == "exact")
    codec: Codec = (
        MODES[mode](x.size, x.dtype)
        if mode in MODES
        else codecs.make(CodecConfig(name=mode), x.size, x.dtype, seed=1, rank=comm.rank)  # type: ignore[arg-type]
    )
    late = None
    if options.late is not None:
        late = LateDevice(tuple(options.late), seed=comm.rank)
        codec = LateCodec(codec, late)
    endpoint = RmaEndpoint(
        comm,
        codec.layout,
        topology.build("complete", comm.size),
        TransportConfig(mode=options.path, heartbeat_timeout=60.0, inbox_slots=options.inbox_slots),
        device=HOST if late is None else late,
    )
    if options.at_once in AT_ONCE:
        make_hasty(endpoint, options.at_once)
    kinds: list[int] = []

    def record(exchange: ExchangeRecord) -> None:
        kinds.append(exchange.kind)

    algorithm = ADPSGD(
        endpoint, codec, x, AlgorithmConfig(max_attempts=options.max_attempts), dice, record
    )
    local = Local(x, rng, dice, mode == "exact")
    before = x.astype(np.float64)
    algorithm.start()
    comm.Barrier()

    membership = endpoint.membership
    started = time.monotonic()
    waits = 0
    initiated = 0
    while (
        membership.total_samples < options.exchanges and time.monotonic() - started < options.limit
    ):
        local.local_step += 1
        endpoint.run_ahead.begin_step()
        waits += sum(1 for _ in algorithm.step(local))
        initiated = kinds.count(INITIATED) if local.local_step % 16 == 0 else initiated
        endpoint.flush()
        membership.report_samples(initiated)
        endpoint.refresh_membership()
        # Stragglers of both kinds: higher ranks are slower, and all pause now and then.
        time.sleep(0.02 if dice.random() < 0.001 else dice.expovariate(1e4 / (1 + comm.rank)))
    enough = membership.total_samples >= options.exchanges

    for pending in algorithm.finalize():
        while not pending.test():
            time.sleep(0.0002)
    endpoint.flush()
    while not endpoint.is_flushed() and options.at_once != "end":
        time.sleep(0.0002)
    membership.publish_status(FINISHED)
    while RUNNING in membership.status:
        endpoint.refresh_membership()
        algorithm.absorb(local.local_step)
        endpoint.flush()
        time.sleep(0.001)
    algorithm.absorb(local.local_step)
    endpoint.flush()
    path = endpoint.transfer_mode
    algorithm.settle()
    endpoint.close()
    if late is not None:
        late.close()
    work = codec.work if isinstance(codec, LateCodec) else LateWork()

    error = x.astype(np.float64) - before - local.change
    total = np.zeros_like(error)
    comm.Allreduce(error, total)
    exchanges = comm.allreduce(kinds.count(INITIATED))
    largest = comm.allreduce(local.largest, MPI.MAX)
    return {
        "exchanges": exchanges,
        "absorbed": comm.allreduce(kinds.count(ABSORBED)),
        "enough": comm.allreduce(enough, MPI.LAND),
        "waits": comm.allreduce(waits),
        "largest": largest,
        "error": float(np.abs(total).max()),
        # Each exchange rounds two additions, each by half an eps of a result below `largest`.
        "tolerance": float(exchanges * np.finfo(np.float32).eps * largest),
        "rejected": comm.allreduce(codec.counters.get("buckets_rejected", 0)),
        "corrupt": comm.allreduce(codec.counters.get("buckets_corrupt", 0)),
        "nbytes": comm.allreduce(endpoint.total_counters().bytes_sent),
        "message": codec.layout.nbytes,
        "size": comm.allreduce(float(np.abs(x).mean())) / comm.size,
        "seconds": time.monotonic() - started,
        "path": path,
        "native": algorithm._pairs._native is not None,
        "launches": comm.allreduce(work.launches),
        "wrong": comm.allreduce(work.wrong),
    }


def main() -> None:
    """Check conservation in each mode that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--exchanges", type=int, default=10_000, help="of all ranks together")
    parser.add_argument("--elements", type=int, default=10_224, help="of a model, float32")
    parser.add_argument("--path", default="auto", help="auto, shared_memory or rma")
    parser.add_argument(
        "--max-attempts", type=int, default=4, help="neighbours tried for one exchange"
    )
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each mode")
    parser.add_argument("--inbox-slots", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--late", type=float, nargs=2, help="shortest and longest delay of a device, seconds"
    )
    parser.add_argument(
        "--at-once", choices=(*AT_ONCE, "end"), help="a mistake: swaps that do not wait for it"
    )
    parser.add_argument("modes", nargs="+", choices=[*MODES, *codecs.CODECS])
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    reports = {mode: run(comm, options, mode) for mode in options.modes}
    if comm.rank == 0:
        print(json.dumps(reports), flush=True)


if __name__ == "__main__":
    main()
