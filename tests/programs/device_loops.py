"""Training with models that are exchanged on a device has the bits of training on the host.

``device_loops.py CASE...`` on 2 ranks, which step in turn, so that a run always makes the same
exchanges. The device is `LateDevice` without a delay: what is exchanged there is torch's memory,
and host memory is another one, so that whoever reads or writes that and forgets to copy is found.

``device_loops.py mirror-CASE...`` is the same with models that are elsewhere, but exchanged as a
copy in host memory.

``device_loops.py late-CASE...`` is the first with a rank whose device is late: no other may go on
from a collective call before it has given memory away. ``device_loops.py count-CASE...`` counts
what a step copies to host memory, and ``device_loops.py train JOB KEY=VALUE...`` is the command,
with models on such a device.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpi_dasgd
from mpi_dasgd.cli import main
from mpi_dasgd.model import flat_parameters, working_copy
from mpi_dasgd.model.host_mirror import HostMirror
from mpi_dasgd.training import rank_parts
from mpi_dasgd.training.device_choice import DeviceChoice
from mpi_dasgd.training.state_dict import _load_state, state_dict
from mpi_dasgd.transport.release import await_release
from tests.support.device_memory import DeviceMemory
from tests.support.late_codec import LateCodec
from tests.support.late_device import LateDevice
from tests.support.pace import in_pace

F32, BF16 = torch.float32, torch.bfloat16


class Net(nn.Module):
    """A convolution in the format channels_last, batch-norm, and a layer of another type."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, width, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.convolution(x)).amax((2, 3))
        return self.head(hidden.to(self.head.weight.dtype)).float()


# Parameters of odd lengths lie elsewhere on a device: the bits of `none` do not depend on it.
NONE = {"codec.name": "none"}
CASES = {
    "adpsgd": (16, F32, {"algorithm.name": "adpsgd"}),
    "combine": (16, F32, {"algorithm.name": "adpsgd", "algorithm.order": "adapt_with_combine"}),
    "bf16": (16, BF16, {"algorithm.name": "adpsgd", **NONE}),
    "swarm": (5, F32, {"algorithm.name": "swarm", "algorithm.local_steps": 3, **NONE}),
    "swarm-bf16": (16, BF16, {"algorithm.name": "swarm", "algorithm.local_steps": 2}),
    "allreduce": (5, BF16, {"algorithm.name": "allreduce"}),
    "dpsgd": (5, F32, {"algorithm.name": "dpsgd", "topology.graph": "ring"}),
}  # fmt: skip
LOCKSTEP = ("allreduce", "dpsgd")


class Counting(LateDevice):
    """Counts what crosses between the device and host memory.

    Args:
        delay: time from the request to the work, seconds.
    """

    def __init__(self, delay: float = 0) -> None:
        super().__init__((delay, delay))
        self.copies = 0

    def to_host(self, array: np.ndarray) -> np.ndarray:
        self.copies += 1
        return super().to_host(array)

    def assign(self, target: np.ndarray, source: np.ndarray) -> None:
        self.copies += 1
        super().assign(target, source)


class Waits(TorchDispatchMode):
    """Counts the operations of torch for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("local_scalar", "nonzero", "unique", "masked_select")):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Run:
    """One training of this rank, and what was seen of it."""

    def __init__(self, case: str, device: Counting | None) -> None:
        width, dtype, settings = CASES[case]
        self.in_lockstep = case in LOCKSTEP
        self.rows: list[tuple[str, np.ndarray]] = []
        self.device = device
        world = rank_parts.start_world()
        self.comm = world.comm
        torch.manual_seed(world.rank)
        self.model = Net(width, dtype)
        self.batches = torch.Generator().manual_seed(100 + world.rank)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        with contextlib.ExitStack() as stack:
            if device is not None:
                stack.enter_context(_exchanged_on(device))
            self.training = mpi_dasgd.Decentralized(
                self.model, self.optimizer, config=settings, environment=world
            )
        self.note("start")

    def note(self, name: str) -> None:
        """Keep the parameters and buffers as they are."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.rows.append(
            (name, torch.cat([t.detach().double().flatten() for t in tensors]).numpy())
        )

    def in_turn(self, body: Callable[[], object]) -> None:
        """Run `body` on one rank after the other."""
        for rank in range(self.comm.size):
            if rank == self.comm.rank:
                body()
            self.comm.Barrier()

    def gradient(self) -> None:
        """Compute one."""
        self.optimizer.zero_grad()
        x = torch.randn(8, 8, 3, 3, generator=self.batches)
        self.model(x).square().mean().backward()

    def steps(self, count: int) -> None:
        """Make steps, in turn where ranks do not wait for each other."""

        def step() -> None:
            self.gradient()
            self.training.step(8)
            await_release(self.training.endpoint.release)
            self.note("step")

        for _ in range(count):
            step() if self.in_lockstep else self.in_turn(step)

    def close(self) -> None:
        """End the training."""
        self.training.finish()
        self.note("finish")
        self.training.average()
        self.note("mean")
        self.training.close()


@contextlib.contextmanager
def _exchanged_on(device: LateDevice) -> Iterator[None]:
    """Have trainings that are made in the body exchange their models on `device`."""
    make_codec = rank_parts._make_codec
    with (
        mock.patch.object(rank_parts, "choose_device", lambda *_: DeviceChoice(device)),
        mock.patch.object(flat_parameters, "FlatMemory", DeviceMemory),
        mock.patch.object(working_copy, "FlatMemory", DeviceMemory),
        mock.patch.object(
            rank_parts, "_make_codec", lambda *args: LateCodec(make_codec(*args), device)
        ),
    ):
        yield


@contextlib.contextmanager
def mirrored() -> Iterator[None]:
    """Have models that are wrapped in the body be elsewhere, as on a GPU with memory=host."""
    to_cpu = torch.Tensor.cpu
    with (
        mock.patch.object(flat_parameters, "_is_elsewhere", lambda _: True),
        mock.patch.object(flat_parameters, "FlatMemory", DeviceMemory),
        mock.patch.object(working_copy, "FlatMemory", DeviceMemory),
        mock.patch.object(torch.Tensor, "cpu", lambda tensor: to_cpu(tensor).clone()),
    ):
        yield


def play(run: Run) -> dict[str, np.ndarray]:
    """Do all that a program may do; return what a checkpoint in the midst of it holds."""
    training, model = run.training, run.model
    run.steps(5)
    with training.mean_model():
        run.note("mean_model")
    run.note("after mean_model")
    run.steps(3)
    training.average()
    run.note("average")
    run.steps(2)
    with training.paused():
        rank = 0 if training.algorithm.capabilities.replicated else training.rank
        with torch.no_grad():
            model.convolution.weight.mul_(1 + rank / 8)
    run.note("paused")
    run.steps(2)
    state = {name: value + 1 / 64 for name, value in model.state_dict().items()}
    model.load_state_dict(state)  # in mid-run
    run.steps(2)
    model.norm.weight.data = model.norm.weight.data * 1.5  # points elsewhere now
    run.steps(1)
    arrays, meta = ({}, {})

    def save() -> None:
        nonlocal arrays, meta
        arrays, meta = state_dict(training)
        arrays = {name: array.copy() for name, array in arrays.items()}

    run.in_turn(save)
    run.note("saved")
    run.steps(3)
    if not run.in_lockstep:
        run.in_turn(lambda: _load_state(training, arrays, json.loads(json.dumps(meta))))
        run.note("loaded")
        run.steps(3)
    run.close()
    return arrays


def compare(case: str, *, is_late: bool = False) -> None:
    """Train on the host and on a device, and compare."""
    host = Run(case, None)
    expected = play(host)
    run = Run(case, Counting(0.02 if is_late and host.comm.rank == 1 else 0))
    _require_same(case, host, expected, run, play(run))
    codec: Any = run.training.codec
    assert codec.work.outside == 0, f"{case}: {codec.work.outside} exchanges on no stream"
    assert codec.work.launches or run.in_lockstep


def compare_mirrored(case: str) -> None:
    """Train on the host and with a copy in host memory, and compare."""
    host = Run(case, None)
    expected = play(host)
    with mirrored():
        run = Run(case, None)
        assert run.training.parameters.is_mirrored
        _require_same(case, host, expected, run, play(run))


Arrays = dict[str, np.ndarray]


def _require_same(case: str, host: Run, expected: Arrays, run: Run, arrays: Arrays) -> None:
    """Compare all that was seen of two runs, and their checkpoints."""
    assert [name for name, _ in run.rows] == [name for name, _ in host.rows]
    for index, ((name, row), (_, other)) in enumerate(zip(run.rows, host.rows, strict=True)):
        differs = np.flatnonzero(row != other)
        assert not differs.size, f"{case}: {name} ({index}): {differs.size} of {row.size} differ"
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], f"{case}: {name}")


def count(case: str) -> None:
    """Make 20 steps on a device, and count what crosses to host memory or would wait."""
    device = Counting()
    run = Run(case, device)
    run.steps(3)
    device.copies = 0
    copy: working_copy.WorkingCopy
    for copy in run.training.parameters._attachment._working_copies:
        copy._on_host = False  # as on a GPU
    waits = Waits()

    def step() -> None:
        run.gradient()
        with waits:
            run.training.step(8)

    with (
        mock.patch.object(HostMirror, "fetch") as fetch,
        mock.patch.object(HostMirror, "store") as store,
        mock.patch.object(HostMirror, "view", property(lambda _: 1 / 0)),
    ):
        for _ in range(20):
            run.in_turn(step)
    assert device.copies == fetch.call_count == store.call_count == 0, device.copies
    assert not waits.seen, waits.seen
    run.close()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        with _exchanged_on(LateDevice((0, 0))), in_pace():
            sys.exit(main(sys.argv[1:]))
    for name in sys.argv[1:]:
        if name.startswith("count-"):
            count(name.removeprefix("count-"))
        elif name.startswith("mirror-"):
            compare_mirrored(name.removeprefix("mirror-"))
        else:
            compare(name.removeprefix("late-"), is_late=name.startswith("late-"))
