"""The parameters of a model as one flat vector, in which exchanges see them."""

from __future__ import annotations

import numpy as np
import torch
import xxhash

from mpi_dasgd.kernels.encoded import BUCKET
from mpi_dasgd.model.flat_memory import FlatMemory
from mpi_dasgd.model.gradient_vector import GradientVector, require_exchangeable_gradients
from mpi_dasgd.model.model_structure import ModelStructure
from mpi_dasgd.model.parameter_attachment import ParameterAttachment
from mpi_dasgd.model.parameter_layout import lay_out
from mpi_dasgd.model.parameter_selection import select_parameters

__all__ = ["FlatParameters"]


_LOOKS = 64  # calls of `copy_to_host` by which the structure is looked at closely


class FlatParameters:
    """Parameters of a module and its optimizer in one contiguous vector.

    The parameters become views of the vector, so that the module computes with what an exchange
    changes. Which ones it has, `select_parameters` says. Strides are kept, and so is memory that
    parameters share; complex numbers are pairs of real ones. Padding behind them is zero.

    The vector is float64 if a parameter is float64 or complex128, else float32. Parameters of lower
    precision than the vector, and those whose memory others see, are no views: `copy_to_host` and
    `copy_to_device` copy between them and the vector, which then holds their master values.

    Args:
        module: module whose parameters are on one device.
        optimizer: its optimizer; None: only the parameters of `module` that require a gradient.

    Raises:
        UserError: parameters that cannot be exchanged, by name.

    Attributes:
        size: number of elements, without padding; a complex one counts twice.
        dtype: type of the vector.
        parameters: the parameters that are in the vector, in its order.
        names: their names.
        host_view: the vector, (padded,), `dtype`, in host memory.
        on_host: whether the parameters are in host memory, too.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        named = select_parameters(module, optimizer)
        dtype, self._segments = lay_out(named)
        self._placements = [placement for s in self._segments for placement in s.placements]
        self.parameters = [placement.parameter for placement in self._placements]
        self.names = [placement.name for placement in self._placements]
        self.size = self._segments[-1].part.stop
        padded = -(-self.size // BUCKET) * BUCKET
        device = self.parameters[0].device
        self._memory = FlatMemory(padded, dtype, device)
        self.on_host = device.type == "cpu"
        self._mirror = self._memory.tensor
        if not self.on_host:
            self._mirror = torch.zeros(padded, dtype=dtype, pin_memory=device.type == "cuda")
        self.host_view: np.ndarray = self._mirror.numpy()
        self.dtype = self.host_view.dtype
        self._module = module
        self._structure = ModelStructure(module, optimizer, self.parameters)
        self._attachment = ParameterAttachment(self._segments, self._memory, self._others)
        self._gradient: GradientVector | None = None
        self._pulls = 0
        self.copy_to_host()

    @property
    def guests(self) -> list[str]:
        """Names of the parameters that stay in memory of their own, since others see it."""
        return self._attachment.guests

    def _others(self) -> list[torch.Tensor]:
        """Return the buffers and parameters of the module that are not in the vector."""
        in_vector = {id(p) for p in self.parameters}
        parameters = (p for p in self._module.parameters() if id(p) not in in_vector)
        return [*self._module.buffers(), *parameters]

    def copy_to_host(self, update: bool = False) -> None:
        """Have `host_view` hold what the parameters hold, wherever they are.

        Parameters that were re-pointed are taken back with their values. To be called before
        anything of a step reads the vector, and after the optimizer has changed the parameters.

        Args:
            update: whether they were changed by a step of the optimizer; otherwise by the user,
                whose values count exactly.

        Raises:
            UserError: the module or its optimizer has got other parameters, or one cannot be taken
                back, by name.
        """
        if not update:
            self._pulls += 1
            if self._pulls % _LOOKS in (1, 2):  # at construction, and in the first step
                self.check()
            elif not self._structure.is_unchanged:
                self._structure.require_unchanged()
        self._attachment.pull(update)
        if not self.on_host:
            self._mirror.copy_(self._memory.tensor)

    def check(self) -> None:
        """Look at everything that `copy_to_host` looks at in some steps only, as it is slow.

        Raises:
            UserError: see `copy_to_host`.
        """
        self._structure.require_unchanged()
        self._attachment.attach_reshaped()

    def copy_to_device(self) -> None:
        """Have the parameters hold what `host_view` holds, rounded to their types."""
        if not self.on_host:
            self._memory.tensor.copy_(self._mirror)
        if self._attachment.has_copies:
            self._attachment.push()

    def gather_gradient(self) -> torch.Tensor:
        """Return the gradient, (padded,), `dtype`, on the device; see `GradientVector.gather`."""
        if self._gradient is None:
            self._gradient = GradientVector(self._segments, self._memory.tensor)
        return self._gradient.gather()

    def scatter_gradient(self) -> None:
        """Give the parameters the gradient that `gather_gradient` returned, as it is now."""
        if self._gradient is not None:
            self._gradient.scatter()

    def require_exchangeable_gradients(self, algorithm: str) -> None:
        """Refuse what `algorithm`, which exchanges gradients, cannot train.

        Raises:
            UserError: see `mpi_dasgd.model.gradient_vector.require_exchangeable_gradients`.
        """
        require_exchangeable_gradients(self._module, self._segments, algorithm)

    def name_of(self, index: int) -> str:
        """Return the name of the parameter that element `index` of the vector belongs to."""
        for segment in self._segments:
            if segment.start <= index < segment.part.stop:
                return " = ".join(placement.name for placement in segment.placements)
        return "padding"

    def description(self) -> list[tuple[str, tuple[int, ...], str, tuple[int, ...], int]]:
        """Return name, shape, dtype, strides and first element in the vector of each parameter.

        Ranks whose descriptions are equal have the same vector.
        """
        return [
            (
                placement.name,
                tuple(placement.shape),
                str(placement.parameter.dtype).removeprefix("torch."),
                placement.stride,
                segment.start + placement.offset * (1 + placement.is_complex),
            )
            for segment in self._segments
            for placement in segment.placements
        ]

    def set(self, vector: np.ndarray) -> None:
        """Set all parameters from `vector`, (padded,), any float dtype."""
        self.host_view[:] = vector
        self.copy_to_device()

    def digest(self) -> str:
        """Return a hash, 32 hexadecimal digits, of the vector."""
        self.copy_to_host()
        return xxhash.xxh3_128_hexdigest(self.host_view.data)
