"""Loops as PyTorch's users write them, each in plain torch and attached: the same must come.

``differential.py bits ALGORITHM CASE...``: every rank trains on the same data, and must end with
the bits of plain torch: parameters, buffers, state of the optimizer, learning rates. Adam and AdamW
have those of ``fused=True`` where their steps are made in our passes.
``differential.py halves CASE...``: the ranks share each batch, with `allreduce`, in float64.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler
from torch.utils.checkpoint import checkpoint

import mpi_dasgd

STEPS, BATCH = 10, 16

Attach = Callable[[nn.Module, torch.optim.Optimizer], Any]
Batches = Callable[[int], tuple[Tensor, Tensor]]
Case = Callable[[Attach, Batches], tuple[nn.Module, torch.optim.Optimizer]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    attach: Attach,
    batches: Batches,
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    before: Callable[[int], object] = lambda step: None,
    after: Callable[[int], object] = lambda step: None,
    step: Callable[[], object] | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A training loop; `before` and `after` are called around each ``optimizer.step()``."""
    attach(model, optimizer)
    for number in range(STEPS):
        x, y = batches(number)
        optimizer.zero_grad()
        cross_entropy((call or model)(x), y).backward()
        before(number)
        (step or optimizer.step)()
        after(number)
    return model, optimizer


# Rates and schedulers


def momentum_step_lr(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = SGD(model.parameters(), 0.3, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = lr_scheduler.StepLR(optimizer, 3)
    return train(model, optimizer, attach, batches, after=lambda _: schedule.step())


def adamw_groups_one_cycle(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = AdamW([{"params": weights}, {"params": others, "weight_decay": 0.0}], 0.01)
    schedule = lr_scheduler.OneCycleLR(optimizer, [0.03, 0.01], STEPS)
    return train(model, optimizer, attach, batches, after=lambda _: schedule.step())


def plateau(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = Adam(model.parameters(), 0.1, amsgrad=True)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return train(model, optimizer, attach, batches, after=lambda n: schedule.step(n % 3))


def rate_set_by_hand(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = RMSprop(model.parameters(), 0.01)

    def halve(number: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.01 / 2**number

    return train(model, optimizer, attach, batches, before=halve)


def rate_as_tensor(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = Adam(model.parameters(), torch.tensor(0.01))
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.8)
    return train(model, optimizer, attach, batches, after=lambda _: schedule.step())


def loaded_state(attach: Attach, batches: Batches) -> Any:
    """A run that goes on from the state of another one, loaded after it was attached."""
    model = mlp()
    optimizer = Adam(model.parameters(), 0.02, fused=True)
    train(model, optimizer, lambda *_: None, batches)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = mlp()
    optimizer = Adam(model.parameters(), 1.0, fused=True)

    def load(number: int) -> None:
        if number == 0:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])

    return train(model, optimizer, attach, batches, after=load)


def clipping(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = SGD(model.parameters(), 0.5, momentum=0.9)

    def clip(number: int) -> None:
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        else:
            nn.utils.clip_grad_value_(model.parameters(), 0.01)

    return train(model, optimizer, attach, batches, before=clip)


def accumulation(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    for number in range(STEPS):
        x, y = batches(number)
        (cross_entropy(model(x), y) / 3).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
    return model, optimizer


def closures(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    for number in range(STEPS):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            x, y = batches(number)
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(closure).ndim == 0
    return model, optimizer


def lbfgs(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, line_search_fn="strong_wolfe")
    attach(model, optimizer)
    for number in range(3):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            x, y = batches(number)
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return model, optimizer


# Features of torch


def foreach(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    return train(model, AdamW(model.parameters(), 0.01, foreach=True), attach, batches)


def fused(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    return train(model, AdamW(model.parameters(), 0.01, fused=True), attach, batches)


def autocast(attach: Attach, batches: Batches) -> Any:
    model = mlp()

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    return train(model, SGD(model.parameters(), 0.1), attach, batches, call=call)


def scaler(attach: Attach, batches: Batches) -> Any:
    """The step whose gradient is inf is skipped."""
    model = mlp()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    scale = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for number in range(STEPS):
        x, y = batches(number)
        optimizer.zero_grad()
        scale.scale(cross_entropy(model(x), y)).backward()
        if number == 4:
            next(iter(model.parameters())).grad.fill_(torch.inf)
        scale.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale.step(optimizer)
        scale.update()
    return model, optimizer


def bf16(attach: Attach, batches: Batches) -> Any:
    model = mlp().bfloat16()
    optimizer = AdamW(model.parameters(), 0.01)
    return train(model, optimizer, attach, batches, call=lambda x: model(x.bfloat16()).float())


def mixed_types(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    model[1].half()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)

    def call(x: Tensor) -> Tensor:
        return model[3](model[2](model[1](x.flatten(1).half()).float()))

    return train(model, optimizer, attach, batches, call=call)


def frozen_then_unfrozen(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    optimizer = Adam(model.parameters(), 0.01)
    model[1].requires_grad_(False)

    def unfreeze(number: int) -> None:
        if number == 4:
            model[1].requires_grad_()

    return train(model, optimizer, attach, batches, after=unfreeze)


def channels_last(attach: Attach, batches: Batches) -> Any:
    """Convolutions with batch-norm and dropout."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Dropout(0.2)
    )
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(96, 3))
    model = model.to(memory_format=torch.channels_last)
    model, optimizer = train(
        model,
        AdamW(model.parameters(), 0.01),
        attach,
        batches,
        call=lambda x: model(x.contiguous(memory_format=torch.channels_last)),
    )
    weight = model[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return model, optimizer


def checkpointing(attach: Attach, batches: Batches) -> Any:
    model = mlp()

    def call(x: Tensor) -> Tensor:
        return model[3](checkpoint(model[:3], x, use_reentrant=False))

    return train(model, SGD(model.parameters(), 0.1), attach, batches, call=call)


def averaged_model(attach: Attach, batches: Batches) -> Any:
    """An exponential moving average, swapped in for evaluation and out again."""
    model = mlp()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )

    def update(number: int) -> None:
        average.update_parameters(model)
        if number == 5:
            own = copy.deepcopy(model.state_dict())
            model.load_state_dict(average.module.state_dict())
            model.load_state_dict(own)

    train(model, optimizer, attach, batches, after=update)
    return average, optimizer


def parametrized(attach: Attach, batches: Batches) -> Any:
    """Weight norm, and a layer that the loss does not reach."""
    model = mlp()
    torch.nn.utils.parametrizations.weight_norm(model[1])
    model.add_module("unused", nn.Linear(2, 2))
    optimizer = AdamW(model.parameters(), 0.01)
    return train(model, optimizer, attach, batches, call=lambda x: model[:4](x))


def compiled(attach: Attach, batches: Batches) -> Any:
    model = mlp()
    call = torch.compile(model, backend="aot_eager")
    return train(model, SGD(model.parameters(), 0.1, momentum=0.9), attach, batches, call=call)


def compiled_before(attach: Attach, batches: Batches) -> Any:
    """The compiled module is attached."""
    model = torch.compile(mlp(), backend="aot_eager")
    return train(model, SGD(model.parameters(), 0.1, momentum=0.9), attach, batches)


def compiled_step(attach: Attach, batches: Batches) -> Any:
    """Dynamo leaves out what it cannot compile: our part of the step."""
    model = mlp()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    return train(model, optimizer, attach, batches, step=step)


# Comparison


def equal_batches(number: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    x = torch.randn(BATCH, 1, 8, 8, generator=random)
    return x, torch.randint(3, (BATCH,), generator=random)


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """All that a loop leaves, by name."""
    yield from model.state_dict().items()
    state = optimizer.state_dict()
    for key, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                yield f"{key}.{name}", value
    for group in state["param_groups"]:
        yield "lr", torch.as_tensor(group["lr"])
        yield "momentum", torch.as_tensor(group.get("momentum", 0.0))


def run(case: Case, attach: Attach, batches: Batches) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: value.clone() for name, value in values(*case(attach, batches))}


def compute_as_passes(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have torch round as passes do, where they make the steps of Adam and AdamW."""
    if isinstance(optimizer, Adam) and all(p.dtype == torch.float32 for p in model.parameters()):
        for group in optimizer.param_groups:
            group["fused"] = True


def compare(case: Case, algorithm: str, tolerance: float, share: bool) -> None:
    """Run `case` plainly and attached; compare what they leave."""
    expected = run(case, compute_as_passes, equal_batches)
    with contextlib.ExitStack() as stack:
        size, rank = 1, 0

        def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            nonlocal size, rank
            training = mpi_dasgd.attach(model, optimizer, algorithm)
            stack.callback(training.close)
            if share:
                size, rank = training.size, training.rank

        def batches(number: int) -> tuple[Tensor, Tensor]:
            x, y = equal_batches(number)
            each = BATCH // size
            return x[rank * each : (rank + 1) * each], y[rank * each : (rank + 1) * each]

        got = run(case, attach, batches)
    assert list(got) == list(expected), (case, set(got) ^ set(expected))
    for name, value in expected.items():
        difference = (got[name] - value).abs().max().item() if value.numel() else 0.0
        exact = torch.equal(got[name], value) and got[name].dtype == value.dtype
        assert exact if tolerance == 0 else difference <= tolerance, (case, name, difference)


def main() -> None:
    torch.set_num_threads(1)
    kind, *cases = sys.argv[1:]
    if kind == "bits":
        algorithm, *cases = cases
        for name in cases:
            compare(globals()[name], algorithm, 0.0, share=False)
    else:
        torch.set_default_dtype(torch.float64)
        try:
            for name in cases:
                compare(globals()[name], "allreduce", 1e-10, share=True)
        finally:  # other programs run in this process
            torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main()
