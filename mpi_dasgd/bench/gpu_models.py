"""Models of `bench gpu overhead`, with random weights, synthetic batches and their optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mpi_dasgd.errors import UserError

__all__ = ["MODELS", "GpuModel", "build_gpu_model"]


@dataclass(frozen=True)
class GpuModel:
    """A model, and one step of its training without any exchange.

    Attributes:
        model: the model, on its device.
        optimizer: its optimizer.
        batch: samples of a step, in words.
        compute_loss: forward pass over the batch; returns the loss, ().
        device: torch's name of the device.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: str
    compute_loss: Callable[[], torch.Tensor]
    device: str

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def compute_gradient(self) -> None:
        """Forward and backward, as a training script writes them: bf16 by autocast."""
        self.optimizer.zero_grad()
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            loss = self.compute_loss()
        loss.backward()


def build_gpu_model(name: str, device: str) -> GpuModel:
    """Build a model and its synthetic batch.

    Args:
        name: key of `MODELS`.
        device: torch's name of the device.

    Raises:
        UserError: a package is missing.
    """
    torch.manual_seed(1)
    try:
        return MODELS[name](device)
    except ModuleNotFoundError as error:
        raise UserError(
            f"bench gpu overhead: --model {name} needs the package {error.name!r}: "
            f"pip install {error.name}, or choose --model tiny"
        ) from error


def _resnet50(device: str) -> GpuModel:
    """ResNet-50, batch of 64 images in channels_last, SGD with momentum."""
    import torchvision

    model = torchvision.models.resnet50().to(device).to(memory_format=torch.channels_last)
    x = torch.randn(64, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(1000, (64,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    return GpuModel(model, optimizer, "64 x 3x224x224", lambda: cross_entropy(model(x), y), device)


def _gpt2(device: str) -> GpuModel:
    """GPT-2 small, batch of 8 x 1024 tokens, AdamW."""
    import transformers

    config = transformers.GPT2Config(use_cache=False)
    model = transformers.GPT2LMHeadModel(config).to(device)
    tokens = torch.randint(config.vocab_size, (8, 1024), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def compute_loss() -> torch.Tensor:
        loss: torch.Tensor = model(tokens, labels=tokens).loss
        return loss

    return GpuModel(model, optimizer, "8 x 1024 tokens", compute_loss, device)


def _tiny(device: str) -> GpuModel:
    """A network of two layers, which trains anywhere, in the memory format of `_resnet50`."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(32, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (32,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    return GpuModel(model, optimizer, "32 x 3x8x8", lambda: cross_entropy(model(x), y), device)


MODELS: dict[str, Any] = {"resnet50": _resnet50, "gpt2": _gpt2, "tiny": _tiny}
"""Functions that build the models, by name."""
