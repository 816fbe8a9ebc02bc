"""Buffers of a model: found by name, packed with their types, combined by their rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers


def _module(**buffers: Any) -> nn.Module:
    module = nn.Module()
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor, persistent=not name.startswith("cache"))
    return module


def test_what_is_packed_comes_back_to_the_bit() -> None:
    def make(shift: int) -> nn.Module:
        return _module(
            seed=torch.tensor([2**53 + 1 + shift, 2**63 - 1]),
            mask=torch.full((2, 2), float("-inf")).triu(1) - shift,
            f16=torch.tensor([65504.0 - 32 * shift, 1e-4]).half(),
            rotation=torch.tensor([1j + shift]),
            flags=torch.tensor([shift == 0, True]),
            expanded=torch.tensor([1.0 + shift]).expand(3),
            none=None,
            empty=torch.empty(0),
            cache=torch.tensor(7 + shift),
        )

    source, target = make(0), make(1)
    target.seed = target.get_buffer("seed").clone()  # another tensor, of the same name
    found = ModelBuffers(target)
    target.mask = target.get_buffer("mask").clone()
    found.unpack(ModelBuffers(source).pack())
    for name, buffer in source.named_buffers():
        assert torch.equal(target.get_buffer(name), buffer), name
        assert target.get_buffer(name).dtype == buffer.dtype
    assert found.digests() == ModelBuffers(source).digests()


def test_frozen_parameters_are_among_them_and_trained_ones_are_not() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    model[2].weight.data = model[2].weight.data.double()
    flat = FlatParameters(model)
    buffers = ModelBuffers(model, set(map(id, flat.parameters)))
    assert list(buffers.shared()) == [
        "1.num_batches_tracked", "1.running_mean", "1.running_var", "2.bias", "2.weight",
    ]  # fmt: skip
    packed = buffers.pack()
    before = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight.fill_(0)
    buffers.unpack(packed)
    assert torch.equal(model[2].weight, before)


def test_a_buffer_with_two_names_counts_once() -> None:
    shared = torch.zeros(2)
    module = _module(first=shared, second=shared)
    module.third = nn.Parameter(torch.zeros(1), requires_grad=False)
    module.fourth = module.third
    assert list(ModelBuffers(module).shared()) == ["first", "third"]


def test_views_of_trained_parameters_are_no_buffers_of_their_own() -> None:
    memory = torch.zeros(10)
    module = _module(inside=memory[3:5], outside=memory[6:])
    module.weight = nn.Parameter(memory[2:6])
    in_vector = {id(module.weight)}
    assert list(ModelBuffers(module, in_vector).shared()) == ["outside"]
    module.register_buffer("all", memory)
    with pytest.raises(UserError, match="buffer all shares a part of its memory with a trained"):
        ModelBuffers(module, in_vector)
    ModelBuffers(module, in_vector, {"all": "keep"})


def test_combined_snapshots_leave_out_what_is_kept() -> None:
    module = _module(mean=torch.zeros(2), count=torch.tensor(0), own=torch.tensor(0))
    buffers = ModelBuffers(module, rules={"own": "keep"})
    packed = []
    for rank in range(3):
        module.mean.fill_(rank)
        module.count.fill_(rank)
        module.own.fill_(rank)
        packed.append(buffers.pack())
    buffers.unpack(buffers.combine(packed))
    assert (module.mean.tolist(), module.count.item(), module.own.item()) == ([1, 1], 2, 2)
    buffers.unpack(packed[0])
    assert module.own.item() == 0  # a rank's own state, of a checkpoint, say


def test_float64_of_older_files_is_read() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    flat = FlatParameters(model)
    buffers = ModelBuffers(model, set(map(id, flat.parameters)))
    old = np.array([1.0, 2.0, 3.0, 4.0, 4.7, 0.5])  # means, variances, count, bias
    buffers.unpack(old)
    assert model[0].running_var.tolist() == [3, 4] and model[0].num_batches_tracked == 5
    assert model[1].bias.tolist() == [0.5]
    buffers.unpack(buffers.combine([old, old + 1]))
    assert model[0].running_mean.tolist() == [1.5, 2.5] and model[0].num_batches_tracked == 6
    with pytest.raises(UserError, match="the model has 6 elements .* but 7 were saved"):
        buffers.unpack(np.zeros(7))
    ModelBuffers(nn.Linear(1, 1), set(map(id, FlatParameters(nn.Linear(1, 1)).parameters)))


def test_what_was_saved_of_another_model_is_refused_before_anything_is_set() -> None:
    module = _module(a=torch.zeros(2), b=torch.zeros(2))
    buffers = ModelBuffers(module)
    for other, message in (
        (_module(a=torch.ones(2), b=torch.ones(3)), r"b of the model .* \(2,\), but .*\(3,\)"),
        (_module(a=torch.ones(2)), "b of the model is .* but saved was none of this name"),
        (_module(a=torch.ones(2), b=torch.ones(2), c=torch.ones(1)), "c was saved, but"),
    ):  # fmt: skip
        packed = ModelBuffers(other).pack()
        with pytest.raises(UserError, match=message):
            buffers.unpack(packed)
        assert not module.get_buffer("a").any()
    with pytest.raises(UserError, match=r"a of the model is .* saved was none of this name"):
        buffers.combine([buffers.pack(), np.empty(0, np.uint8)])


def test_a_cache_or_a_kept_buffer_may_have_grown() -> None:
    module = nn.Sequential(_module(cache=torch.zeros(2)))
    buffers = ModelBuffers(module)
    packed = buffers.pack()
    module[0].cache = torch.ones(3)  # in an evaluation of the mean model, say
    buffers.unpack(packed)
    assert module[0].cache.tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"0.cache .* \(3,\), but saved was .*\(2,\)"):
        buffers.combine([packed, packed])

    module = _module(own=torch.zeros(2))
    buffers = ModelBuffers(module)
    packed = buffers.pack()
    module.own = torch.ones(3)
    with pytest.raises(UserError, match=r"own .* \(3,\), but saved was .*\(2,\)"):
        buffers.unpack(packed)
    with pytest.raises(UserError, match="'kep' .* did you mean 'keep'"):
        buffers.rules = {"own": "kep"}
    buffers.rules = {"own": "keep"}
    buffers.unpack(packed)
    assert module.own.tolist() == [1, 1, 1]
    assert buffers.description() == [("own", {"rule": "keep"})]


UNREADABLE: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"is not dense \(torch.sparse_coo\)"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), r"is not dense \(torch.sparse_csr\)"),
    "meta": (lambda: torch.empty(3, device="meta"), r"has no values \(it is on the meta device"),
    "lazy": (nn.UninitializedBuffer, "has no shape before the first call"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is quantized",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize")
@pytest.mark.parametrize(("make", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_has_no_plain_memory_is_refused_unless_it_is_kept(
    make: Callable[[], torch.Tensor], message: str
) -> None:
    module = _module(b=make(), c=torch.zeros(1))
    with pytest.raises(UserError, match=f"model: buffer b {message}.*'b': 'keep'"):
        ModelBuffers(module)
    buffers = ModelBuffers(module, rules={"b": "keep"})
    buffers.unpack(buffers.pack())
    assert list(buffers.digests()) == ["c"]


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize")
@pytest.mark.parametrize("make", [make for make, _ in UNREADABLE.values()], ids=UNREADABLE)
def test_a_model_with_such_a_buffer_can_be_trained_twice(
    make: Callable[[], torch.Tensor],
) -> None:
    module = nn.Linear(3, 2)
    module.register_buffer("b", make())
    weight = module.weight.data  # others may use the memory of a parameter
    for _ in range(2):
        flat = FlatParameters(module)
        ModelBuffers(module, set(map(id, flat.parameters)), {"b": "keep"})
    assert torch.equal(module.weight, weight)
