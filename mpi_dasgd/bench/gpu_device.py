"""GPUs that a benchmark runs on."""

from __future__ import annotations

import torch

from mpi_dasgd.errors import UserError

__all__ = ["DEVICES", "TAKE_TURNS", "gpu_count", "require_gpu"]

DEVICES = ("cpu", "cuda")
"""Values of the option ``--device``."""

TAKE_TURNS = "functional only: ranks take turns"
"""What is said of speeds that ranks have reached which share a GPU."""


def gpu_count() -> int:
    """Return the number of GPUs that torch sees in this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_gpu(option: str) -> str:
    """Return the name of the first GPU, as its maker calls it.

    Args:
        option: benchmark and option that ask for it, the beginning of the error message.

    Raises:
        UserError: torch sees none.
    """
    if not gpu_count():
        built = torch.version.cuda
        why = f"built for CUDA {built}" if built else "built without CUDA"
        raise UserError(
            f"{option}: torch sees no GPU here (torch {torch.__version__}, {why}); run it on a "
            "machine with one, whose driver `nvidia-smi` finds, or leave the option out"
        )
    return torch.cuda.get_device_name(0)
