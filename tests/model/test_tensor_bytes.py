"""Every tensor as bytes, and back: the same bits in the same places."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mpi_dasgd.model.tensor_bytes import read_bytes, write_bytes

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex128, torch.complex64, torch.complex32, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool,
]  # fmt: skip


def _random(dtype: torch.dtype, count: int, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, NaN with payloads among them."""
    rng = np.random.default_rng(seed)
    high = 2 if dtype == torch.bool else 256
    data = rng.integers(0, high, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_bits_of_every_dtype_come_back(dtype: torch.dtype) -> None:
    source, target = _random(dtype, 6).view(2, 3), _random(dtype, 6, seed=1).view(2, 3)
    data = read_bytes(source).copy()
    write_bytes(target, data)
    np.testing.assert_array_equal(read_bytes(target), data)
    assert target.dtype == dtype and data.size == 6 * dtype.itemsize


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "number": lambda: torch.tensor(3.0),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "strided": lambda: torch.arange(12.0)[1::2],
    "channels_last": lambda: torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=CHANNELS_LAST),
    "expanded": lambda: torch.arange(3.0).view(3, 1).expand(3, 4),
    "expanded number": lambda: torch.tensor(1.0).expand(2, 2),
    "windows": lambda: torch.arange(10.0).unfold(0, 3, 1),
    "one stride": lambda: torch.arange(4.0).as_strided((2, 2), (1, 1)),
    "one element": lambda: torch.arange(4.0).as_strided((1, 1), (3, 2), 1),
    "conjugated": lambda: torch.arange(4.0).to(torch.complex64).conj(),
    "negative": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "non-leaf": lambda: torch.ones(3, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
}
CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_stays(make: Callable[[], torch.Tensor]) -> None:
    tensor, wanted = make(), make().detach().clone() + 1
    stride, address = tensor.stride(), tensor.data_ptr()
    write_bytes(tensor, read_bytes(wanted))
    assert torch.equal(tensor.detach(), wanted)
    assert (tensor.stride(), tensor.data_ptr()) == (stride, address)


def test_tensors_of_the_inference_mode_can_be_set() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(3)
    write_bytes(tensor, read_bytes(torch.ones(3)))
    assert tensor.tolist() == [1, 1, 1]


def test_what_is_equal_is_not_written() -> None:
    tensor = torch.ones(3)
    version = tensor._version
    write_bytes(tensor, read_bytes(torch.ones(3)))
    assert tensor._version == version
