"""Flat memory: its parts have storages of their own, wherever it is."""

from __future__ import annotations

import pytest
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_memory import FlatMemory, holders, move_elsewhere
from tests.support.device_memory import DeviceMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [FlatMemory, DeviceMemory])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_part_has_a_storage_of_its_own_over_the_same_memory(
    kind: type[FlatMemory], dtype: torch.dtype
) -> None:
    memory = kind(10, dtype, CPU)
    part, rest, empty = memory.part(3, 5), memory.part(5, 10), memory.part(4, 4)
    part[:] = 1
    assert memory.tensor.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert part.untyped_storage().nbytes() == 2 * dtype.itemsize
    assert part.data_ptr() == memory.tensor.data_ptr() + 3 * dtype.itemsize
    assert [holders(part), holders(rest), empty.numel(), part.dtype] == [1, 1, 0, dtype]
    del memory
    assert rest.tolist() == [0] * 5  # a part keeps the memory


def test_what_is_not_on_the_cpu_cannot_be_moved() -> None:
    with pytest.raises(
        UserError, match=r"parameter weight .* moved elsewhere on meta; keep a copy"
    ):
        move_elsewhere(torch.empty(2, device="meta"), "weight")


def test_a_device_without_dlpack_is_refused() -> None:
    with pytest.raises(UserError, match="parameters are on meta, expected the CPU or an NVIDIA"):
        FlatMemory(4, torch.float32, torch.device("meta")).part(0, 2)


@pytest.mark.gpu
def test_parts_of_memory_of_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    memory = FlatMemory(10, torch.bfloat16, torch.device("cuda"))
    part, rest = memory.part(3, 5), memory.part(5, 10)
    part.fill_(1)
    assert memory.tensor.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert (part.device, part.data_ptr()) == (memory.tensor.device, memory.tensor.data_ptr() + 6)
    assert part.untyped_storage().nbytes() == 4
    assert [holders(part), holders(rest)] == [1, 1]
    rest.record_stream(torch.cuda.Stream())
    del memory, part
    assert rest.tolist() == [0] * 5
    with pytest.raises(UserError, match="weight was given other memory"):
        move_elsewhere(rest, "weight")
