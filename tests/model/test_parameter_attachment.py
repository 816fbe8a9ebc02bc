"""Parameters that were re-pointed, converted or shared after wrapping: taken back, or refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from mpi_dasgd.errors import UserError
from mpi_dasgd.model import flat_parameters, working_copy
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from tests.support.device_memory import DeviceMemory


@pytest.fixture(params=["host", "device"], autouse=True)
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with memory of the host, and with memory made as on a GPU."""
    if request.param == "device":
        for module in (flat_parameters, working_copy):
            monkeypatch.setattr(module, "FlatMemory", DeviceMemory)
    return str(request.param)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))


def _require_attached(module: nn.Module, flat: FlatParameters) -> None:
    """Check that the vector takes what the parameters hold, and the parameters what it holds."""
    before = [p.detach().clone() for p in module.parameters()]
    flat.copy_to_host()
    flat.copy_to_device()
    for p, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, old)
    flat.host_view[: flat.size] += 1
    flat.copy_to_device()
    for p, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old + 1, rtol=0.01, atol=0.01)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.5)
    flat.copy_to_host()
    assert (flat.host_view[: flat.size] == 0.5).all()


def _clone_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data.clone()


def _set_from_vector(module: nn.Module) -> None:
    vector = torch.cat([p.detach().reshape(-1).float() for p in module.parameters()])
    vector_to_parameters(vector, module.parameters())


def _exchange_data(module: nn.Module) -> None:
    a, b = module[2].weight, module[3].weight  # type: ignore[index]
    a.data, b.data = b.data, a.data


def _put_in_queue(module: nn.Module) -> None:
    queue = torch.multiprocessing.SimpleQueue()
    queue.put([p.data for p in module.parameters()])


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda module: None,
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "half, then float": lambda module: module.half().float(),
    "one layer half": lambda module: module[2].half(),  # type: ignore[index, operator]
    "p.data = p.data.clone()": _clone_data,
    "vector_to_parameters": _set_from_vector,
    "two parameters exchange their data": _exchange_data,
    "share_memory": lambda module: module.share_memory(),
    "queue between processes": _put_in_queue,
    "channels_last": lambda module: module.to(memory_format=torch.channels_last),
    "transposed in place": lambda module: module[3].weight.data.t_(),  # type: ignore[index]
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_what_was_converted_is_taken_back_with_its_values(
    convert: Callable[[nn.Module], object],
) -> None:
    module = _net()
    flat = FlatParameters(module)
    flat.copy_to_host()
    convert(module)
    types = [(p.dtype, p.stride()) for p in module.parameters()]
    flat.check()
    _require_attached(module, flat)
    assert [(p.dtype, p.stride()) for p in module.parameters()] == types


def test_conversions_one_after_the_other() -> None:
    module = _net()
    flat = FlatParameters(module)
    for convert in [*CONVERSIONS.values(), *reversed(CONVERSIONS.values())]:
        convert(module)
        flat.check()
        _require_attached(module, flat)


def test_what_cannot_be_taken_back_is_refused_by_name() -> None:
    module = _net()
    flat = FlatParameters(module)
    module.double()
    with pytest.raises(UserError, match=r"0\.weight is torch\.float64 now"):
        flat.copy_to_host()
    module.float()
    _require_attached(module, flat)
    module[2].weight.data = torch.zeros(3, 3, dtype=torch.complex64)
    with pytest.raises(UserError, match=r"2\.weight is torch\.complex64 now"):
        flat.copy_to_host()
    module[2].weight.data = torch.zeros(3, 3)
    _require_attached(module, flat)
    module[2].bias.data = torch.zeros(4)
    with pytest.raises(UserError, match=r"2\.bias has the shape \(4,\) now, and had \(3,\)"):
        flat.copy_to_host()


def test_memory_that_a_user_keeps_is_not_written_to() -> None:
    module = _net()
    flat = FlatParameters(module)
    weight = module[2].weight
    backup, old = weight.data, weight.detach().clone()
    weight.data = torch.ones_like(weight)  # as averages of weights are swapped in to evaluate
    _require_attached(module, flat)
    assert torch.equal(backup, old)
    weight.data = backup
    assert torch.equal(weight, old)
    _require_attached(module, flat)


def test_what_a_user_keeps_is_refused_where_it_cannot_be_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpi_dasgd.model.flat_memory._free_shared_memory", lambda: 0)
    module = _net()
    flat = FlatParameters(module)
    backup = module[2].weight.data
    module.half()
    for _ in range(2):  # the first attempt leaves all as it was
        with pytest.raises(UserError, match=r"2\.weight was given other .* no room for 36 bytes"):
            flat.copy_to_host()
    del backup
    _require_attached(module, flat)
    assert {p.dtype for p in module.parameters()} == {torch.float16}


def test_an_update_by_way_of_another_memory_is_added_to_the_master() -> None:
    module = nn.Linear(2, 1).bfloat16()
    flat = FlatParameters(module)
    with torch.no_grad():
        module.weight.fill_(1)
    flat.copy_to_host()
    flat.host_view[:2] += 0.001  # an exchange that bf16 does not see
    flat.copy_to_device()
    module.weight.data = module.weight.data + 1  # as sharpness-aware minimization ends a step
    flat.gather(update=True)
    np.testing.assert_allclose(flat.host_view[:2], 2.001)
    module.weight.data = module.weight.data.clone()
    module.weight.data[0, 0] = 3
    flat.copy_to_host()
    np.testing.assert_allclose(flat.host_view[:2], [3, 2.001])


def test_memory_that_nobody_keeps_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("shared memory is for what users keep")

    monkeypatch.setattr("mpi_dasgd.model.parameter_attachment.move_elsewhere", refuse)
    module = _net()
    flat = FlatParameters(module)
    pointers = [p.data_ptr() for p in module.parameters()]
    for convert in (_clone_data, _exchange_data, _set_from_vector, lambda m: m.half().float()):
        convert(module)
        _require_attached(module, flat)
        assert [p.data_ptr() for p in module.parameters()] == pointers
        assert flat.guests == []


def test_a_parameter_whose_memory_others_see_stays_there() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2))
            self.register_buffer("transposed", self.a.data.t())
            self.other = self.b.data

    module = Model()
    flat = FlatParameters(module)
    _require_attached(module, flat)
    assert torch.equal(module.a.t(), module.transposed)  # type: ignore[arg-type]
    assert torch.equal(module.b, module.other)
    del module.other
    flat.check()  # nobody else sees it any more
    before = module.b.data_ptr()
    assert flat.host_view.ctypes.data <= before < flat.host_view.ctypes.data + 4 * flat.size


@pytest.mark.parametrize(
    "view",
    [lambda w: w, lambda w: w[1], lambda w: w.t(), lambda w: w[:, 1:], lambda w: w.view(-1)[2:5]],
)
def test_a_buffer_that_is_a_view_of_a_parameter_stays_one(
    view: Callable[..., torch.Tensor],
) -> None:
    module = nn.Linear(3, 2)
    module.register_buffer("alias", view(module.weight.detach()))
    module.register_buffer("own", torch.zeros(2))
    flat = FlatParameters(module)
    flat.host_view[: flat.size] = range(flat.size)
    flat.copy_to_device()
    assert torch.equal(module.get_buffer("alias"), view(module.weight.detach()))
    buffers = ModelBuffers(module, set(map(id, flat.parameters)))
    assert [name for name, _ in buffers.description()] == ["own"]


def test_a_buffer_that_is_more_than_a_view_of_a_parameter_stays_so() -> None:
    memory = torch.zeros(10)
    module = nn.Module()
    module.weight = nn.Parameter(memory[2:6])
    module.register_buffer("alias", memory)
    flat = FlatParameters(module)
    flat.set(np.ones(flat.host_view.size))
    assert module.alias.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0]  # type: ignore[operator]


def test_parameters_beside_others_in_one_storage_are_no_guests() -> None:
    module = _net()
    memory = torch.randn(200)
    start = 0
    for p in module.parameters():
        p.data = memory[start : start + p.numel()].view(p.shape)
        start += p.numel()
    module.register_buffer("rest", memory[start:])
    del memory, p
    flat = FlatParameters(module)
    assert flat.guests == []
    module.rest += 1  # type: ignore[operator]
    _require_attached(module, flat)


@pytest.mark.parametrize("by", ["data", "transpose", "part"])
def test_parameters_that_share_memory_go_on_to_share_it(by: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.empty(0))
            a = self.a.data
            self.b.data = {"data": a, "transpose": a.t(), "part": a[1:, ::2]}[by]

    module = Model()
    flat = FlatParameters(module)
    flat.host_view[:] = range(flat.host_view.size)
    flat.copy_to_device()
    expected = {"data": module.a, "transpose": module.a.t(), "part": module.a[1:, ::2]}[by]
    assert torch.equal(module.b, expected) and flat.size == 12
    module.share_memory()
    _require_attached(module, flat)
    assert torch.equal(module.b[:1, :2], expected[:1, :2])
    module.a.data = module.a.data.clone()
    with pytest.raises(UserError, match="b and a shared memory|a and b shared memory"):
        flat.copy_to_host()


def test_parameters_that_begin_to_share_memory_are_refused_by_name() -> None:
    module = _net()
    flat = FlatParameters(module)
    module[3].weight.data = module[2].weight.data
    with pytest.raises(UserError, match=r"2\.weight and 3\.weight share memory now"):
        flat.copy_to_host()


def test_copies_and_files_of_a_parameter_hold_it_alone() -> None:
    module = _net()
    FlatParameters(module)
    assert copy.deepcopy(module)[2].weight.data_ptr() != module[2].weight.data_ptr()
    file = io.BytesIO()
    torch.save(module[3].bias.data, file)
    for p in module.parameters():  # else accelerate and safetensors take all for one
        assert p.untyped_storage().data_ptr() == p.data_ptr()
        assert p.untyped_storage().nbytes() == p.nbytes
    torch.save(module, io.BytesIO())


def test_real_and_complex_parameters_can_be_saved_together() -> None:
    module = nn.ParameterList([torch.randn(3), torch.randn(2, dtype=torch.complex64)])
    FlatParameters(module)
    torch.save(module.state_dict(), io.BytesIO())


def test_a_model_that_is_wrapped_again_belongs_to_the_newer_vector() -> None:
    module = _net()
    first = FlatParameters(module)
    second = FlatParameters(module)
    _require_attached(module, second)
    assert (first.host_view[:3] != 0).all()
