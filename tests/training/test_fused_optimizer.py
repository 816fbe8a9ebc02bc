"""Steps of users' optimizers in our passes: the bits of torch, also in turn with torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from mpi_dasgd.algorithms.neighbour_exchange import PAIR_CODECS
from mpi_dasgd.errors import Diverged
from tests.support.late_device import LateDevice
from tests.support.mpi_ranks import ROOT
from tests.support.optimizer_pair import OptimizerPair
from tests.support.rank_pool import run_pooled

STEPS = 5
SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.3}),
    (SGD, {"lr": 0.3, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "foreach": True}),
    (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
    (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    (Adam, {"lr": 0.01}),
    (Adam, {"lr": torch.tensor(0.01), "weight_decay": 0.1, "betas": (0.4, 0.99)}),
    (Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    (Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "eps": 1e-3}),
]
MOMENTUM = {"lr": 0.1, "momentum": 0.9}


@pytest.fixture(params=SETTINGS, ids=lambda case: f"{case[0].__name__}-{'-'.join(case[1])}")
def pair(request: pytest.FixtureRequest) -> OptimizerPair:
    """Models and optimizers of each kind, with two groups."""
    return OptimizerPair(*request.param)


def test_steps_have_the_bits_of_torch(pair: OptimizerPair) -> None:
    for _ in range(STEPS):
        pair.step()
        pair.require_equal()


def test_a_fused_sgd_has_the_bits_of_torchs_fused_sgd() -> None:
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "fused": True}
    pair = OptimizerPair(SGD, options)
    for step in range(3 * STEPS):
        pair.step(torchs=step % 4 == 3)
        pair.require_equal()


def test_gradients_may_be_missing_at_any_time(pair: OptimizerPair) -> None:
    for step in range(STEPS):
        pair.set_gradients(lambda i: (i * 7 + step * 3) % 5 > 1)  # noqa: B023
        pair.apply()
        pair.require_equal()
    pair.set_gradients(lambda i: False)
    pair.apply()
    pair.require_equal()


def test_torch_and_passes_go_on_from_each_other(pair: OptimizerPair) -> None:
    if not isinstance(pair.optimizer, SGD):
        for group in pair.optimizer.param_groups:
            group["fused"] = True  # torch's steps in between have the bits of the reference
    for step in range(2 * STEPS):
        pair.set_gradients(lambda i: (i + step) % 4 > 0 or step > 5)  # noqa: B023
        pair.apply(torchs=step % 3 == 0 or step == 4)
        pair.require_equal()


@pytest.mark.parametrize(("kind", "options"), [(SGD, MOMENTUM), (AdamW, {"lr": 0.01})])
def test_gradients_of_any_layout_are_read(kind: Any, options: dict[str, Any]) -> None:
    pair = OptimizerPair(kind, options, channels_last=True)
    weight = pair.model[3].weight
    twin = pair.plain[3].weight
    bias, twin_bias = pair.model[4].bias, pair.plain[4].bias
    for step in range(4):
        pair.set_gradients()
        if step == 1:
            weight.grad = torch.ones(1, 1).expand(5, 12)
            twin.grad = torch.ones(5, 12)
        elif step == 2:
            weight.grad = twin.grad.t().contiguous().t()  # type: ignore[union-attr]
        elif step == 3:
            negated = torch.tensor([0.5 + 2j]).conj().imag  # of one element: contiguous
            assert negated.is_neg()
            bias.grad, twin_bias.grad = negated, negated.clone()
        pair.apply()
        pair.require_equal()


def test_settings_may_change_at_any_time() -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01})
    pair.step()
    for optimizer in (pair.optimizer, pair.reference):
        optimizer.param_groups[0].update(lr=0.2, betas=(0.5, 0.9), maximize=True)
    pair.step()
    pair.require_equal()
    rates = [torch.tensor(0.3), torch.tensor(0.3)]
    for optimizer, rate in zip((pair.optimizer, pair.reference), rates, strict=True):
        optimizer.param_groups[1].update(lr=rate, weight_decay=0)
    pair.step()
    for rate in rates:
        rate.fill_(0.7)
    pair.step()
    pair.require_equal()
    for optimizer in (pair.optimizer, pair.reference):  # the parameters of a group go to the other
        first, second = optimizer.param_groups
        second["params"].insert(0, first["params"].pop())
    pair.step()
    pair.require_equal()


def test_momentum_may_begin_and_end() -> None:
    pair = OptimizerPair(SGD, {"lr": 0.1})
    for momentum in (0.0, 0.9, 0.9, 0.0, 0.5):
        for optimizer in (pair.optimizer, pair.reference):
            optimizer.param_groups[0]["momentum"] = momentum
        pair.step()
        for optimizer in (pair.optimizer, pair.reference):  # torch makes entries without a buffer
            for p in [p for p, state in optimizer.state.items() if not state]:
                del optimizer.state[p]
        pair.require_equal()


def test_factors_on_rates_are_those_of_torch() -> None:
    pair = OptimizerPair(SGD, MOMENTUM)
    for scale in (1.0, 0.3, 0.3):
        for group in pair.reference.param_groups:
            group["lr"] = 0.1 * scale * 0.7
        pair.set_gradients()
        pair.reference.step()
        pair.local.lr_scale = scale
        pair.local.begin_step(None)
        pair.local.apply(0.7)
        pair.require_equal()
        assert pair.local.lr == 0.1 * scale * 0.7
        assert pair.optimizer.param_groups[0]["lr"] == 0.1
    assert pair.torchs_steps == 0


@pytest.mark.filterwarnings("error")
def test_schedulers_see_the_steps() -> None:
    pair = OptimizerPair(SGD, MOMENTUM)
    schedulers = [lr_scheduler.StepLR(o, 2) for o in (pair.optimizer, pair.reference)]
    for _ in range(STEPS):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.require_equal()


def test_backward_refuses_what_a_pass_has_changed() -> None:
    pair = OptimizerPair(SGD, MOMENTUM)
    layer = pair.model[4]
    loss = layer(layer.weight.new_ones(1, 5, requires_grad=True)).sum()
    pair.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("kind", "options"), [(SGD, MOMENTUM), (AdamW, {"lr": 0.01})])
def test_steps_are_made_on_a_device_with_aligned_parameters(
    kind: Any, options: dict[str, Any]
) -> None:
    pair = OptimizerPair(kind, options, device=LateDevice((0, 0)))
    assert pair.parameters.segments[1].start % 4 == 0
    for _ in range(STEPS):
        pair.step()
        pair.require_equal()
    pair.local.require_finite_updates()
    pair.set_gradients()
    pair.model[4].bias.grad.fill_(torch.nan)
    pair.local.begin_step(None)
    pair.local.apply()
    with pytest.raises(Diverged, match=r"step 6: parameter 4\.bias became nan"):
        pair.local.fused_update()


def test_a_fused_adam_counts_its_steps_on_the_device() -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01}, device=LateDevice((0, 0)))
    pair.optimizer.param_groups[1]["fused"] = True
    pair.step(torchs=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_is_refused_behind_the_pass(value: float) -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01})
    pair.step()
    pair.set_gradients()
    pair.model[4].bias.grad.fill_(value)
    pair.local.begin_step(None)
    update = pair.local.fused_update()
    assert update is not None and update.refuses_nonfinite
    assert torch.equal(pair.model[4].bias, pair.plain[4].bias)  # nothing is made yet
    with pytest.raises(Diverged, match=r"step 2: parameter 4\.bias became nan"):
        pair.local.apply()
    pair.local._check_finite = False
    update = pair.local.fused_update()
    assert update is not None and not update.refuses_nonfinite
    pair.local.apply()


def test_a_step_that_no_pass_makes_is_none() -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01})
    pair.set_gradients()
    pair.local.begin_step(None)
    pair.local.fused_update()
    pair.local.fused_update()
    assert all(state["step"] == 0 for state in pair.optimizer.state.values())
    pair.apply()
    pair.require_equal()


def test_copies_of_the_optimizer_are_apart() -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01})
    pair.step()
    twin, state = copy.deepcopy(pair.optimizer), copy.deepcopy(pair.optimizer.state_dict())
    pair.step()
    pair.require_equal()
    pair.optimizer.load_state_dict(state)
    for ours, theirs in zip(pair.optimizer.state.values(), twin.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.mpi
def test_runs_end_with_the_bits_of_torchs_steps() -> None:
    run_pooled(2, ROOT / "tests" / "programs" / "fused_steps.py", *PAIR_CODECS, timeout=120)
