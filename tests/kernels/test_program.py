"""Launches of CUDA kernels: the description of their arguments, and what a device needs."""

from __future__ import annotations

import threading
import timeit
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import cuda
from mpi_dasgd.kernels.cuda.pair_average import pair_average
from mpi_dasgd.kernels.cuda.scale import BucketScales
from mpi_dasgd.kernels.encoded import EncodedVector, FusedStep
from mpi_dasgd.kernels.optimizer import OptimizerStep
from tests.support.fake_cupy import FakeCupy
from tests.support.lattice_cases import cases, map_arrays, steps

pytestmark = pytest.mark.slow


def test_arguments_have_the_bytes_of_a_fill_field_by_field(fake: FakeCupy) -> None:
    """What is packed in one go, against the struct filled by the names of its fields."""
    count, stages = 0, set()
    for _, step in steps(next(case for case in cases(8, False) if case.x.size == 5000)):
        step = map_arrays(step, fake.asarray)
        fake.arguments.clear()
        fake.launched.clear()
        cuda.run(step)
        launches = list(cuda._launches(step))
        found = [
            (name, argument)
            for name, argument in zip(fake.launched, fake.arguments, strict=True)
            if name.endswith("_8")
        ]
        assert len(found) == len(launches)
        for launch, (name, argument) in zip(launches, found, strict=True):
            stage = step.optimizer if name in ("mpd_fused_sgd_8", "mpd_fused_adam_8") else None
            stages.add(name if stage is not None else None)
            assert argument == _filled(step, launch, stage), name
        count += len(launches)
    assert count > 30 and stages == {None, "mpd_fused_sgd_8", "mpd_fused_adam_8"}


def test_a_launch_costs_less_than_half_of_a_fill_field_by_field(
    fake: FakeCupy, record_property: Callable[[str, object], None]
) -> None:
    """In Python, without CuPy's part; measured 8 us, and 46 us before."""
    fake.RawModule = lambda **_: SimpleNamespace(get_function=lambda _: _noop)  # type: ignore[method-assign]
    case = next(case for case in cases(8, False) if case.x.size == 5000)
    step = map_arrays(dict(steps(case))["fused, 1 deltas"], fake.asarray)
    (launch,) = cuda._launches(step)
    before = np.zeros(1, cuda.KERNEL_ARGUMENTS)

    def fill() -> None:
        _filled(step, launch)
        _noop((), (), (before,))

    packed, filled = (
        min(timeit.repeat(function, number=50, repeat=60)) / 50
        for function in (lambda: cuda.run(step), fill)
    )
    record_property("microseconds", round(packed * 1e6, 1))
    assert packed < filled / 2


def _noop(_grid: object, _block: object, arguments: tuple[np.ndarray, ...]) -> None:
    """Look for the address of the argument, as CuPy does."""
    _ = arguments[0].__array_interface__["data"][0]


def _filled(step: FusedStep, launch: cuda._Launch, optimizer: OptimizerStep | None = None) -> bytes:
    arguments = np.zeros(1, cuda.KERNEL_ARGUMENTS)
    fields = arguments[0]
    fields["x"], fields["elements"] = step.x.data.ptr, step.x.size
    for i, (delta, stats) in enumerate(launch.deltas):
        fields["deltas"][i] = _vector(delta)
        fields["delta_stats"][i] = 0 if stats is None else stats.data.ptr
    fields["delta_count"] = len(launch.deltas)
    if launch.partner_model is not None:
        fields["partner_model"] = _vector(launch.partner_model)
        fields["stats"] = 0 if step.stats is None else step.stats.data.ptr
        fields["weight"], fields["subtract_dither"] = step.weight, step.merge == 2
        if step.reply_delta is not None and step.merge == 0:
            fields["reply_delta"] = _vector(step.reply_delta)
    if optimizer is not None:
        stage, table = fields["optimizer"], optimizer.native._table.address
        stage["groups"], stage["segments"] = table, table + optimizer.groups.nbytes
        stage["segment_count"] = len(optimizer.segments)
        for name in ("first", "second", "third"):
            state = getattr(optimizer, name)
            stage[name] = 0 if state is None else state.data.ptr
    if launch.publication is not None:
        fields["publication"] = _vector(launch.publication)
    return arguments.tobytes()


def _vector(encoded: EncodedVector) -> tuple[int, ...]:
    arrays = encoded.codes, encoded.scales, encoded.checksums
    return (*(array.data.ptr for array in arrays), encoded.seed, encoded.nearest)


def test_threads_describe_their_launches_in_memory_of_their_own(fake: FakeCupy) -> None:
    memories = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: memories.append(cuda.LATTICE._memory.arguments[0]))
        thread.start()
        thread.join()
    memories.append(cuda.LATTICE._memory.arguments[0])
    assert len({memory.__array_interface__["data"][0] for memory in memories}) == 3


def test_a_device_that_is_too_old_is_refused(fake: FakeCupy) -> None:
    fake.properties |= {"name": b"Tesla T4", "major": 7, "minor": 5}
    step = FusedStep(fake.zeros(1024, np.float32))
    step.publication = EncodedVector.empty(1024, 8, xp=fake)
    x = fake.zeros(1024, np.float32)
    for launch in (
        lambda: cuda.run(step),
        lambda: pair_average(x, [x]),
        lambda: BucketScales(1, 0.02, 0.9, True).measure(x),
    ):
        with pytest.raises(UserError) as refused:
            launch()
        assert str(refused.value) == (
            "GPU 0 (Tesla T4): expected compute capability 8.0 or higher for the CUDA kernels, "
            "got 7.5; set transport.memory=host, which exchanges in host memory"
        )
    assert not fake.launched
