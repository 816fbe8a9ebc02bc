"""`optimizer.step` as a step of an algorithm: order, closures, skipped steps, exceptions."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.closure import Closure
from mpi_dasgd.training.step_hooks import StepHooks


class _Algorithm:
    """Makes `updates` updates in a step, and notes what happens in which order."""

    def __init__(self, updates: int = 1, gradient_first: bool = False) -> None:
        self.updates = updates
        self.gradient_first = gradient_first
        self.events: list[str] = []
        self.hooks: StepHooks

    def step(self, closure: Closure | None) -> None:
        self.events.append("begin")
        if self.gradient_first and closure is not None:
            closure.evaluate_early()
        for index in range(self.updates):
            self.hooks.run(closure if index == 0 else None)
            self.events.append("updated")
        self.events.append("end")


def _attached(
    algorithm: _Algorithm, kind: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([weight], lr=0.5)
    algorithm.hooks = StepHooks(optimizer, lambda f: Closure(f, "algorithm"), algorithm.step)
    optimizer.register_step_pre_hook(lambda *_: algorithm.events.append("torch"))
    return optimizer, weight


def _square(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("gradient_first", [False, True])
@pytest.mark.parametrize("call", ["plain", "closure", "keyword"])
def test_the_update_of_the_step_is_torchs_own(call: str, gradient_first: bool) -> None:
    algorithm = _Algorithm(gradient_first=gradient_first)
    optimizer, weight = _attached(algorithm)
    closure = _square(optimizer, weight)
    if call == "plain":
        closure()
        assert optimizer.step() is None
    else:
        loss: Any = (
            optimizer.step(closure) if call == "closure" else optimizer.step(closure=closure)
        )
        assert loss.item() == 2.0
    assert algorithm.events == ["begin", "torch", "updated", "end"]
    assert weight.tolist() == [0.0, 0.0]  # 1 - 0.5 * 2


def test_a_schedule_made_before_or_after_reaches_the_hooks() -> None:
    algorithm = _Algorithm()
    optimizer, weight = _attached(algorithm)
    bound = optimizer.step  # as a wrapper keeps it
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    _square(optimizer, weight)()
    optimizer.step()
    bound()
    schedule.step()
    assert algorithm.events.count("end") == 2


def test_several_updates_of_one_step() -> None:
    algorithm = _Algorithm(updates=3)
    optimizer, weight = _attached(algorithm)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert algorithm.events.count("updated") == 3
    assert weight.tolist() == [-0.5, -0.5]  # 1 - 3 * 0.5 * 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_a_step_without_update_leaves_the_model(kind: Any) -> None:
    algorithm = _Algorithm(updates=0, gradient_first=True)
    optimizer, weight = _attached(algorithm, kind)
    groups = optimizer.param_groups
    loss: Any = optimizer.step(_square(optimizer, weight))
    assert loss.item() == 2.0
    assert weight.tolist() == [1.0, 1.0]
    assert not optimizer.state and optimizer.param_groups is groups
    algorithm.updates = 1
    optimizer.step()
    assert weight.tolist() != [1.0, 1.0]


def test_a_closure_that_is_needed_before_and_again_is_refused() -> None:
    algorithm = _Algorithm(gradient_first=True)
    optimizer, weight = _attached(algorithm, torch.optim.LBFGS)
    with pytest.raises(UserError, match="evaluates its closure more than once"):
        optimizer.step(_square(optimizer, weight))


def test_lbfgs_evaluates_its_closure_as_often_as_it_likes() -> None:
    algorithm = _Algorithm()
    optimizer, weight = _attached(algorithm, torch.optim.LBFGS)
    plain = torch.nn.Parameter(torch.ones(2))
    reference = torch.optim.LBFGS([plain], lr=0.5)
    for _ in range(3):
        optimizer.step(_square(optimizer, weight))
        reference.step(_square(reference, plain))
    assert torch.equal(weight, plain)
    assert algorithm.events.count("end") == 3


def test_an_exception_of_the_closure_ends_the_step_and_the_next_one_works() -> None:
    algorithm = _Algorithm()
    optimizer, weight = _attached(algorithm)

    def fail() -> None:
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        optimizer.step(fail)
    assert algorithm.events == ["begin", "torch"]
    optimizer.step(_square(optimizer, weight))
    assert algorithm.events == ["begin", "torch", "begin", "torch", "updated", "end"]


@pytest.mark.parametrize("behind", [False, True])
def test_an_exception_of_the_algorithm_reaches_the_caller(behind: bool) -> None:
    class Failing(_Algorithm):
        def step(self, closure: Closure | None) -> None:
            if behind:
                super().step(closure)
            raise UserError("refused")

    algorithm = Failing()
    optimizer, weight = _attached(algorithm)
    weight.grad = torch.ones(2)
    with pytest.raises(UserError, match="refused"):
        optimizer.step()
    assert weight.tolist() == ([0.5, 0.5] if behind else [1.0, 1.0])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_is_none(fused: bool) -> None:
    algorithm = _Algorithm()
    optimizer, weight = _attached(
        algorithm, lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=fused)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.isfinite(weight).all()
    assert algorithm.events.count("end") == 1


class _Subclass(torch.optim.AdamW):
    """Calls its base's step, which torch has given hooks of its own."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise ValueError("between")
        return super().step(closure)


def test_a_subclass_that_calls_its_base_makes_one_step() -> None:
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # torch hooks the class when it is used
    algorithm = _Algorithm()
    optimizer, weight = _attached(algorithm, _Subclass)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert algorithm.events == ["begin", "torch", "torch", "updated", "end"]
    algorithm.events.clear()
    optimizer.fails = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="between"):
        optimizer.step()
    optimizer.fails = False  # type: ignore[attr-defined]
    optimizer.step(_square(optimizer, weight))
    assert algorithm.events == ["begin", "torch", "begin", "torch", "torch", "updated", "end"]


def test_after_remove_the_optimizer_is_as_before() -> None:
    algorithm = _Algorithm()
    optimizer, weight = _attached(algorithm)
    algorithm.hooks.remove()
    weight.grad = torch.ones(2)
    optimizer.step()
    assert algorithm.events == ["torch"]


def test_hooks_that_are_removed_keep_nothing_alive() -> None:
    algorithm = _Algorithm()
    optimizer, _ = _attached(algorithm)
    optimizer.step()
    kept = weakref.ref(algorithm)
    algorithm.hooks.remove()
    optimizer._optimizer_step_pre_hooks.clear()
    del algorithm
    gc.collect()
    assert kept() is None
