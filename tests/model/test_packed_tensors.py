"""Named tensors in one vector of bytes."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.model.packed_tensors import PackedTensor, pack, unpack


def test_tensors_come_back_in_order_and_aligned() -> None:
    tensors = {
        "a.ü": PackedTensor("torch.int8", (3,), np.arange(3, dtype=np.uint8)),
        "empty": PackedTensor("torch.float32", (0, 2), np.empty(0, np.uint8)),
        "number": PackedTensor("torch.float64", (), np.arange(8, dtype=np.uint8)),
    }
    packed = pack(tensors)
    found = unpack(packed)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].kind == tensor.kind
        np.testing.assert_array_equal(found[name].data, tensor.data)
        assert found[name].data.ctypes.data % 16 == packed.ctypes.data % 16


def test_no_tensors_are_no_bytes() -> None:
    assert pack({}).size == 0 and unpack(pack({})) == {}
