"""``bench gpu overhead``: what an exchange costs a training step, in one process.

A rank exchanges with itself (`mpi_dasgd.bench.loopback`): all launches, events and host functions
of a real exchange are made, and the partner's slots are its own. Blocks of steps with an exchange
in every step, or in every fourth, alternate with blocks of a plain loop, which knows nothing of
this package; a share compares with the plain block of the same round.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpi_dasgd import algorithms, world
from mpi_dasgd.bench.gpu_device import DEVICES, require_gpu
from mpi_dasgd.bench.gpu_models import MODELS, GpuModel, build_gpu_model
from mpi_dasgd.bench.loopback import Loopback
from mpi_dasgd.bench.options import add_output_options
from mpi_dasgd.bench.sample_store import columns_of, quartiles, samples_path, write_samples
from mpi_dasgd.errors import UserError
from mpi_dasgd.messages import print_message
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.device_stream import DeviceStream, device_stream

__all__ = ["Block", "main", "measure", "summarize"]

PLAIN = 0
"""Interval of exchanges of a loop without any."""
INTERVALS = (PLAIN, 1, 4)
"""Steps from one exchange to the next, in each of the blocks of a round."""

STEPS = 20
_WARM_UP_STEPS = 10
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Block:
    """Some steps, one after the other.

    Attributes:
        round: number of the round.
        every: steps from one exchange to the next; `PLAIN`: none.
        steps: number of steps.
        exchanges: exchanges that were made.
        seconds: from the first step's beginning to the end of all work.
        host_seconds: time of the host in exchanges, without waiting for the device.
        catch_up_seconds: time for which the host waited for the device before it claimed a model.
    """

    round: int
    every: int
    steps: int
    exchanges: int
    seconds: float
    host_seconds: float
    catch_up_seconds: float


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its command-line arguments and return the exit code.

    Raises:
        UserError: an argument is wrong, a package is missing, or there is no such device.
    """
    options = _parser().parse_args(arguments)
    for name in ("steps", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"bench gpu overhead: --{name} must be at least 1, got {value}")
    card = "cpu" if options.device == "cpu" else require_gpu("bench gpu overhead")
    device = "cpu" if options.device == "cpu" else "cuda:0"
    memory = options.memory or ("host" if device == "cpu" else "ipc")
    path = samples_path("gpu-overhead", options.out)
    algorithms.register(Loopback)
    environment = world.start()
    model = build_gpu_model(options.model, device)
    config = {
        "algorithm.name": Loopback.name,
        "codec.name": options.codec,
        "transport.memory": memory,
    }
    training = Decentralized(model.model, model.optimizer, config=config, environment=environment)
    training.detach()  # from now on optimizer.step() is plain torch's
    blocks = measure(
        model,
        training,
        device_stream(device),
        steps=options.steps,
        rounds=options.rounds,
        seconds=options.seconds,
    )
    settings = {
        "model": options.model,
        "parameters": model.parameters,
        "batch": model.batch,
        "device": card,
        "codec": training.codec.name,
        "memory": training.device_choice.memory,
        "transport": training.endpoint.transfer_mode,
        "device_choice": training.device_choice.reason,
        "torch_version": str(torch.__version__),
        "cuda_version": torch.version.cuda or "",
    }
    training.close()
    write_samples(path, "gpu-overhead", columns_of(map(vars, blocks)), settings)
    summary = summarize(blocks)
    if options.json:
        print(json.dumps({**settings, **summary, "samples": str(path)}), flush=True)
    else:
        print(f"raw samples: {path}\n{_line(summary, settings)}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpi-dasgd bench gpu overhead",
        description="What an exchange of a rank with itself costs a training step.",
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="resnet50", help="network [resnet50]")
    add("--device", choices=DEVICES, default="cuda", help="where it trains [cuda]")
    add("--codec", default="lattice8", help="codec of the exchange [lattice8]")
    add("--memory", choices=("host", "ipc"), help="memory of the slots [ipc; host on the cpu]")
    add("--steps", type=int, default=STEPS, help=f"steps of a block [{STEPS}]")
    add("--rounds", type=int, help=f"blocks of each kind [at least {_MIN_ROUNDS}, by --seconds]")
    add("--seconds", type=float, default=25.0, help="time for all rounds [25]")
    add_output_options(parser)
    return parser


class _Loop:
    """Runs blocks of steps.

    Args:
        model: what is trained.
        training: its training by `Loopback`.
        stream: stream of the device; None on the host.
    """

    def __init__(
        self, model: GpuModel, training: Decentralized, stream: DeviceStream | None
    ) -> None:
        assert isinstance(training.algorithm, Loopback), training.algorithm.name
        self._model, self._training, self._stream = model, training, stream
        self._algorithm = training.algorithm

    def run(self, number: int, every: int, steps: int) -> Block:
        """Run a block of round `number`, from an idle device to an idle device."""
        model, training, algorithm = self._model, self._training, self._algorithm
        algorithm.every = every
        self._drain()
        exchanged, waited = training.exchange_seconds, algorithm.catch_up_seconds
        made = training.counters["messages"]
        started = time.perf_counter()
        for _ in range(steps):
            model.compute_gradient()
            if every == PLAIN:
                model.optimizer.step()
            else:
                training.step()
        self._drain()
        seconds = time.perf_counter() - started
        waited = algorithm.catch_up_seconds - waited
        return Block(
            round=number,
            every=every,
            steps=steps,
            exchanges=int(training.counters["messages"] - made),
            seconds=seconds,
            host_seconds=training.exchange_seconds - exchanged - waited,
            catch_up_seconds=waited,
        )

    def _drain(self) -> None:
        """Wait until the device is idle."""
        if self._stream is not None:
            self._stream.mark().wait()


def measure(
    model: GpuModel,
    training: Decentralized,
    stream: DeviceStream | None,
    *,
    steps: int = STEPS,
    rounds: int | None = None,
    seconds: float = 25.0,
) -> list[Block]:
    """Run rounds of blocks, the kinds of each in random order.

    Args:
        model: what is trained.
        training: its training by `Loopback`, detached from the optimizer.
        stream: stream of the device; None on the host.
        steps: steps of a block.
        rounds: number of rounds; None: as many as fit, and at least three.
        seconds: time for the rounds, without `rounds`.
    """
    loop = _Loop(model, training, stream)
    for every in INTERVALS:
        loop.run(0, every, max(_WARM_UP_STEPS, every))
    shuffle = random.Random(1).shuffle
    blocks: list[Block] = []
    end = time.monotonic() + seconds
    number = 0
    while number < (rounds or _MIN_ROUNDS) or (rounds is None and time.monotonic() < end):
        order = list(INTERVALS)
        shuffle(order)
        blocks += [loop.run(number, every, steps) for every in order]
        number += 1
    if any(block.every and not block.exchanges for block in blocks):
        print_message("warning: in some blocks no exchange was made; see the raw samples")
    return blocks


def summarize(blocks: Sequence[Block]) -> dict[str, Any]:
    """Return medians and quartiles over the rounds.

    Returns:
        ``plain_ms`` a step, and for each interval H ``H{H}_extra_ms`` a step, ``H{H}_share`` and
        its quartiles, in percent of the plain step, and ``H{H}_made``, the exchanges made of those
        that were due; ``host_us``, the host's time of an exchange at H = 1, with its quartiles.
    """
    kinds = {
        every: sorted((b for b in blocks if b.every == every), key=lambda block: block.round)
        for every in INTERVALS
    }
    per_step = {
        every: np.array([block.seconds / block.steps for block in kind])
        for every, kind in kinds.items()
    }
    plain = per_step[PLAIN]
    summary: dict[str, Any] = {"rounds": len(plain), "plain_ms": float(np.median(plain)) * 1e3}
    for every in INTERVALS[1:]:
        extra = per_step[every] - plain
        share = quartiles(100 * extra / plain)
        due = sum(block.steps // every for block in kinds[every])
        summary |= {
            f"H{every}_extra_ms": float(np.median(extra)) * 1e3,
            f"H{every}_share": share.median,
            f"H{every}_share_q1": share.q1,
            f"H{every}_share_q3": share.q3,
            f"H{every}_made": sum(block.exchanges for block in kinds[every]) / max(due, 1),
        }
    host = quartiles([1e6 * block.host_seconds / max(block.exchanges, 1) for block in kinds[1]])
    return {**summary, "host_us": host.median, "host_us_q1": host.q1, "host_us_q3": host.q3}


def _line(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return the line of the table."""
    parts = [
        f"OVERHEAD {settings['model']} ({settings['parameters']:,} parameters, "
        f"{settings['codec']}, {settings['memory']}) on {settings['device']}: "
        f"plain {summary['plain_ms']:.2f} ms"
    ]
    for every in INTERVALS[1:]:
        name = f"H{every}"
        parts.append(
            f"H={every} {summary[f'{name}_extra_ms']:+.3f} ms = {summary[f'{name}_share']:.2f} % "
            f"({summary[f'{name}_share_q1']:.2f} .. {summary[f'{name}_share_q3']:.2f})"
        )
    parts.append(
        f"host {summary['host_us']:.0f} us an exchange ({summary['host_us_q1']:.0f} .. "
        f"{summary['host_us_q3']:.0f})"
    )
    made = min(summary[f"H{every}_made"] for every in INTERVALS[1:])
    return "; ".join([*parts, f"{100 * made:.0f} % made, {summary['rounds']} rounds"])
