"""Loops over every kind of parameters, in plain torch and decentralized: the same bits.

AdamW has those of ``fused=True`` where its steps are made in our passes.

All ranks have the same data, so that means of models and of gradients change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize, vector_to_parameters

import mpi_dasgd

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
STEPS = 12


class Complex(nn.Module):
    """A layer of complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.w).abs()


class As(nn.Module):
    """Converts to a type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


class Words(nn.Module):
    """An embedding and an output layer, tied by `.data` or with sparse gradients."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(4, 4, sparse=sparse), nn.Linear(4, 4, bias=False)
        if not sparse:
            self.o.weight.data = self.e.weight.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o(self.e(x.long().abs() % 4))
        return out.flatten(1)


def net(first: torch.dtype = F32, second: torch.dtype = F32) -> nn.Sequential:
    """Return two layers of these types."""
    layers = nn.Linear(4, 3, dtype=first), nn.Linear(3, 2, dtype=second)
    return nn.Sequential(As(first), layers[0], As(second), layers[1])


def images() -> nn.Module:
    """Return a convolutional network in the format channels_last."""
    layers = nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(27, 2))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def with_unused() -> nn.Module:
    """Return a network with a layer that takes no part, which AdamW must not decay."""
    model = net()
    model[0].unused = nn.Linear(3, 3)
    return model


def with_frozen() -> nn.Module:
    """Return a network whose first layer is frozen."""
    model = net()
    model[1].requires_grad_(False)
    return model


def unfreeze(model: nn.Module, step: int) -> None:
    """Train the first layer from step 5 on, and freeze another parameter."""
    if step == 5:
        model.requires_grad_(True)
        model[3].bias.requires_grad_(False)  # type: ignore[index, union-attr]


def clamp(model: nn.Module, step: int) -> None:
    """Give all parameters other memory in every step."""
    for p in model.parameters():
        p.data = p.data.clamp(-0.4, 0.4)


def set_from_vector(model: nn.Module, step: int) -> None:
    """Make all parameters views of one tensor in every step."""
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    vector_to_parameters(vector * 0.9, model.parameters())


def convert(model: nn.Module, step: int) -> None:
    """Train in lower precision from step 4 to 8."""
    if step == 4:
        model[1].bfloat16(), model[3].half()  # type: ignore[index, operator]
        model[0].dtype, model[2].dtype = BF16, F16  # type: ignore[index, union-attr]
    if step == 8:
        model.float()
        model[0].dtype = model[2].dtype = F32  # type: ignore[index, union-attr]


def share(model: nn.Module, step: int) -> None:
    """Move the parameters to shared memory."""
    if step == 3:
        model.share_memory()


def constrain(model: nn.Module, step: int) -> None:
    """Parametrize a bias."""
    if step == 3:
        parametrize.register_parametrization(
            model[3],  # type: ignore[index]
            "bias",
            nn.Hardtanh(-0.2, 0.2),
        )


def wander(model: nn.Module, step: int) -> None:
    """Go there and back by pointers, as sharpness-aware minimization does."""
    for p in model.parameters():
        old = p.data.clone()
        p.data.add_(0.1)
        p.data = old


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, with a weight decay that would be seen."""
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def adamw_fused(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW that rounds the same way, whoever makes its steps."""
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, fused=True)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD, which takes sparse gradients."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


Case = tuple[
    Callable[[], nn.Module],
    Callable[[nn.Module], torch.optim.Optimizer],
    Callable[[nn.Module, int], None] | None,
]
CASES: dict[str, Case] = {
    "float32": (net, adamw, None),
    "float64": (lambda: net(F64, F64), adamw, None),
    "bfloat16": (lambda: net(BF16, BF16), adamw, None),
    "float16": (lambda: net(F16, F16), momentum, None),
    "mixed": (lambda: net(BF16, F32), adamw, None),
    "mixed with float64": (lambda: net(F32, F64), adamw, None),
    "complex": (lambda: nn.Sequential(nn.Linear(4, 3), Complex()), adamw, None),
    "channels_last": (images, adamw, None),
    "unused": (with_unused, adamw, None),
    "unfrozen": (with_frozen, adamw, unfreeze),
    "clamped": (net, adamw, clamp),
    "from a vector": (net, adamw, set_from_vector),
    "converted": (net, momentum, convert),
    "shared": (net, adamw_fused, share),
    "parametrized": (net, adamw, constrain),
    "there and back": (net, adamw, wander),
    "tied by data": (lambda: Words(sparse=False), momentum, None),
    "sparse": (lambda: Words(sparse=True), sgd, None),
}
NO_GRADIENT_VECTOR = ("tied by data", "sparse")


def train(case: Case, algorithm: str = "") -> nn.Module:
    """Return the model that a loop makes, in plain torch or with an algorithm."""
    build, make_optimizer, change = case
    torch.manual_seed(3)
    model = build()
    optimizer = make_optimizer(model)
    if not algorithm and make_optimizer is adamw:
        for group in optimizer.param_groups:
            group["fused"] = all(p.dtype == F32 for p in model.parameters())
    training = None
    if algorithm:
        config = {"algorithm.name": algorithm}
        if algorithm == "local_sgd":
            config["algorithm.local_steps"] = "2"
        training = mpi_dasgd.Decentralized(model, optimizer, config=config)
    step_of = training.step if training else optimizer.step
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x, y = torch.randn(8, 4, generator=g), torch.randn(8, 1, generator=g)
        optimizer.zero_grad()
        (model(x).float() - y).square().mean().backward()
        if change:
            change(model, step)
        step_of()
    if training:
        training.close()
    return model


def differences(model: nn.Module, plain: nn.Module) -> Sequence[str]:
    """Return the names of the parameters that differ in value, type or strides."""
    return [
        name
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True)
        if p.dtype != q.dtype or p.stride() != q.stride() or not torch.equal(p, q)
    ]


def main() -> None:
    """Run all cases."""
    wrong = []
    for name, case in CASES.items():
        plain = train(case)
        for algorithm in ("alone", "local_sgd", "allreduce"):
            if algorithm == "allreduce" and name in NO_GRADIENT_VECTOR:
                continue
            model = train(case, algorithm)
            if found := differences(model, plain):
                wrong.append((name, algorithm, found))
            if isinstance(model, Words) and name == "tied by data":
                assert torch.equal(model.e.weight, model.o.weight)
    assert not wrong, wrong


main()
