"""The state of an optimizer as views of flat vectors, whatever users do with it in between."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from tests.support.optimizer_pair import OptimizerPair

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (AdamW, {"lr": 0.01, "amsgrad": True}),
]
Change = Callable[[torch.optim.Optimizer], None]


@pytest.fixture(params=KINDS, ids=["SGD", "AdamW"])
def pair(request: pytest.FixtureRequest) -> OptimizerPair:
    """Models and optimizers that have made some steps, on some with gradients missing."""
    made = OptimizerPair(*request.param)
    for step in range(3):
        made.set_gradients(lambda i: i != 2 or step > 0)  # noqa: B023
        made.apply()
    return made


def load_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_own_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def load_file(optimizer: torch.optim.Optimizer) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))


def clear(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def clear_one(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][1]].clear()


def remove_one(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


def replace(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for name in state:
            state[name] = state[name].clone() * 0.5 if name != "step" else state[name] + 3


def replace_dictionary(optimizer: torch.optim.Optimizer) -> None:
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p] = {name: value * 1 for name, value in optimizer.state[p].items()}


def write(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            value.mul_(0.5) if name != "step" else value.fill_(7)


def repoint(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone() * 2


def _alike(optimizer: torch.optim.Optimizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two parameters of the same shape."""
    pairs = [(p, q) for p in optimizer.state for q in optimizer.state if p is not q]
    return next((p, q) for p, q in pairs if p.shape == q.shape and p.numel() > 1)


def swap(optimizer: torch.optim.Optimizer) -> None:
    a, b = _alike(optimizer)
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]


def swap_tensors(optimizer: torch.optim.Optimizer) -> None:
    a, b = _alike(optimizer)
    for name in [*optimizer.state[a]]:
        x, y = optimizer.state[a][name], optimizer.state[b][name]
        optimizer.state[a][name], optimizer.state[b][name] = y, x


def old_checkpoint(optimizer: torch.optim.Optimizer) -> None:
    """Load what torch 1.11 saved: numbers of steps as numbers."""
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        if "step" in entries:
            entries["step"] = int(entries["step"])
    optimizer.load_state_dict(state)


CHANGES: list[Change] = [
    load_state, load_own_state, load_file, clear, clear_one, remove_one, replace,
    replace_dictionary, write, repoint, swap, swap_tensors, old_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_users_do_with_the_state_counts_from_the_next_step(
    pair: OptimizerPair, change: Change
) -> None:
    for optimizer in (pair.optimizer, pair.reference):
        change(optimizer)
    for _ in range(2):
        pair.step()
        pair.require_equal()


def test_who_holds_a_tensor_of_the_state_sees_it_change() -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01})
    pair.set_gradients()
    pair.apply(torchs=True)  # the state is torch's
    p = pair.optimizer.param_groups[0]["params"][0]
    held = dict(pair.optimizer.state[p])
    pair.step()
    pair.step()
    assert held["step"] == 3
    assert all(pair.optimizer.state[p][name] is tensor for name, tensor in held.items())


def test_each_tensor_has_a_storage_of_its_own(pair: OptimizerPair) -> None:
    for p, state in pair.optimizer.state.items():
        for name, tensor in state.items():
            elements = 1 if name == "step" else p.numel()
            assert tensor.untyped_storage().nbytes() == elements * 4
            assert tensor._base is None


def test_state_outlives_the_vectors(pair: OptimizerPair) -> None:
    state = pair.optimizer.state_dict()
    expected = copy.deepcopy(state)
    pair.set_up(pair.model, SGD(pair.model.parameters(), lr=0.1))
    torch.zeros(10_000)
    for ours, theirs in zip(state["state"].values(), expected["state"].values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def share(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.share_memory_()


def make_views(optimizer: torch.optim.Optimizer) -> None:
    """Give the state memory in which the user has more."""
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if name != "step":
                memory = torch.cat([tensor.flatten(), tensor.flatten()])
                KEPT.append(memory)
                state[name] = memory[: tensor.numel()].view_as(tensor)


KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize("change", [share, make_views])
def test_state_that_others_see_stays_where_it_is(pair: OptimizerPair, change: Change) -> None:
    for group in pair.optimizer.param_groups:
        group["fused"] = isinstance(pair.optimizer, AdamW)
    for optimizer in (pair.optimizer, pair.reference):
        change(optimizer)
    tensors = [t for state in pair.optimizer.state.values() for t in state.values()]
    places = [t.data_ptr() for t in tensors]
    pair.step(torchs=True)
    pair.require_equal()
    assert [t.data_ptr() for t in tensors] == places
    load_state(pair.optimizer)  # which gives it other memory
    pair.step()
    pair.require_equal()
    assert KEPT or all(t.is_shared() for t in tensors)
    KEPT.clear()


def test_steps_are_counted_in_the_type_that_torch_counts_in() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = torch.nn.Linear(3, 2, dtype=torch.float32)
        pair = OptimizerPair.__new__(OptimizerPair)
        pair.set_up(model, Adam(model.parameters(), lr=0.1))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        pair.local.begin_step(None)
        pair.local.apply()
    finally:
        torch.set_default_dtype(torch.float32)
    assert pair.torchs_steps == 0
    assert [state["step"].dtype for state in pair.optimizer.state.values()] == [torch.float64] * 2
