"""The parameters of a model as one flat vector, in which exchanges see them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xxhash

from mpi_dasgd.device.base import Array, Device
from mpi_dasgd.device.host import HOST
from mpi_dasgd.kernels.encoded import BUCKET
from mpi_dasgd.model.flat_memory import FlatMemory
from mpi_dasgd.model.gradient_vector import GradientVector, require_exchangeable_gradients
from mpi_dasgd.model.host_mirror import HostMirror
from mpi_dasgd.model.model_structure import ModelStructure
from mpi_dasgd.model.parameter_attachment import ParameterAttachment
from mpi_dasgd.model.parameter_layout import Segment, describe, lay_out, name_at
from mpi_dasgd.model.parameter_selection import select_parameters

__all__ = ["FlatParameters"]


_LOOKS = 64  # calls of `gather` by which the structure is looked at closely
_ALIGNMENT = 16  # bytes of a load of four float32, on a device


class FlatParameters:
    """Parameters of a module and its optimizer in one contiguous vector.

    The parameters become views of the vector, so that the module computes with what an exchange
    changes. Which ones it has, `select_parameters` says. Strides are kept, and so is memory that
    parameters share; complex numbers are pairs of real ones. Padding behind them is zero.

    The vector is float64 if a parameter is float64 or complex128, else float32. Parameters of lower
    precision than the vector, and those whose memory others see, are no views: `gather` and
    `scatter` copy between them and the vector, which then holds their master values.

    Exchanges see the vector as `vector`. That is in host memory, as a copy if the parameters are on
    a GPU, unless they are exchanged on their device: then each parameter begins at a multiple of 16
    bytes, and host memory has a copy, without gaps, only when `copy_to_host` makes one.

    Args:
        module: module whose parameters are on one device.
        optimizer: its optimizer; None: only the parameters of `module` that require a gradient.
        device: where the vector is exchanged: the host, or the device of the parameters.

    Raises:
        UserError: parameters that cannot be exchanged, by name.

    Attributes:
        size: number of elements, without padding; a complex one counts twice.
        dtype: type of the vector.
        parameters: the parameters that are in the vector, in its order.
        names: their names.
        device: where the vector is exchanged.
        vector: the vector that is exchanged, (padded,), `dtype`, an array of `device`.
        is_mirrored: whether the parameters are on a GPU, but exchanged as a copy in host memory.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        device: Device = HOST,
    ) -> None:
        named = select_parameters(module, optimizer)
        alignment = _ALIGNMENT if device.is_asynchronous else 1
        dtype, self._segments = lay_out(named, alignment)
        self._placements = [placement for s in self._segments for placement in s.placements]
        self.parameters = [placement.parameter for placement in self._placements]
        self.names = [placement.name for placement in self._placements]
        self.size = self._segments[-1].host_part.stop
        padded = -(-self._segments[-1].part.stop // BUCKET) * BUCKET
        of_parameters = self.parameters[0].device
        self._memory = FlatMemory(padded, dtype, of_parameters)
        self.device = device
        self.is_mirrored = _is_elsewhere(of_parameters) and not device.is_asynchronous
        self._mirror = HostMirror(
            self._memory.tensor,
            self._segments,
            is_separate=self.is_mirrored or device.is_asynchronous,
        )
        self.vector: Array = (
            device.vector(self._memory.tensor) if device.is_asynchronous else self._mirror.view
        )
        self.dtype = np.dtype(str(dtype).removeprefix("torch."))
        self._module = module
        self._structure = ModelStructure(module, optimizer, self.parameters)
        self._attachment = ParameterAttachment(self._segments, self._memory, self._others)
        self._gradient: GradientVector | None = None
        self._pulls = 0
        self.gather()

    @property
    def host_view(self) -> np.ndarray:
        """The vector in host memory, (padded,), `dtype`, without gaps.

        If the vector is exchanged on a device: what `copy_to_host` has copied.
        """
        return self._mirror.view

    @property
    def flat(self) -> torch.Tensor:
        """The vector where the parameters are, (padded,); to be read, not written."""
        return self._memory.tensor

    @property
    def segments(self) -> Sequence[Segment]:
        """Where the parameters are in the vector."""
        return self._segments

    @property
    def lives_in_vector(self) -> bool:
        """Whether all parameters are views of `vector`, so that what changes it changes them."""
        return not (self.is_mirrored or self._attachment.has_copies)

    @property
    def guests(self) -> list[str]:
        """Names of the parameters that stay in memory of their own, since others see it."""
        return self._attachment.guests

    def _others(self) -> list[torch.Tensor]:
        """Return the buffers and parameters of the module that are not in the vector."""
        in_vector = {id(p) for p in self.parameters}
        parameters = (p for p in self._module.parameters() if id(p) not in in_vector)
        return [*self._module.buffers(), *parameters]

    def gather(self, update: bool = False) -> None:
        """Have `vector` hold what the parameters hold.

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
        if self.is_mirrored:
            self._mirror.fetch()

    def scatter(self) -> None:
        """Have the parameters hold what `vector` holds, rounded to their types."""
        if self.is_mirrored:
            self._mirror.store()
        if self._attachment.has_copies:
            self._attachment.push()

    def copy_to_host(self) -> None:
        """Have `host_view` hold what the parameters hold: `gather`, and wait for a device."""
        self.gather()
        if self.device.is_asynchronous:
            self._mirror.fetch()

    def copy_to_device(self) -> None:
        """Have `vector` and the parameters hold what `host_view` holds, wherever they are."""
        if self.device.is_asynchronous:
            self._mirror.store()
        self.scatter()

    def to_host(self, vector: Array) -> np.ndarray:
        """Return an array like `vector` as `host_view` has it; waits for a device.

        On the host it is the array itself, on a device a copy without gaps.
        """
        array = self.device.to_host(vector)
        if not self.device.is_asynchronous:
            return array
        dense: np.ndarray = self._mirror.without_gaps(torch.from_numpy(array)).numpy()
        return dense

    def to_device(self, vector: np.ndarray) -> Array:
        """Return what `to_host` has made, (padded,), as a new array of `device`."""
        source = self._mirror.with_gaps(torch.from_numpy(vector)).numpy()
        array = self.device.xp.empty(source.shape, source.dtype)
        self.device.assign(array, source)
        return array

    def check(self) -> None:
        """Look at everything that `gather` looks at in some steps only, as it is slow.

        Raises:
            UserError: see `gather`.
        """
        self._structure.require_unchanged()
        self._attachment.attach_reshaped()

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
        """Return the name of the parameter that element `index` of `host_view` belongs to."""
        return name_at(self._segments, index)

    def description(self) -> list[tuple[str, tuple[int, ...], str, tuple[int, ...], int]]:
        """Return name, shape, dtype, strides and first element in the vector of each parameter.

        Ranks whose descriptions are equal have the same vector.
        """
        return describe(self._segments)

    def set(self, vector: np.ndarray) -> None:
        """Set all parameters from `vector`, (padded,), any float dtype, as `host_view` has it."""
        self.host_view[:] = vector
        self.copy_to_device()

    def digest(self) -> str:
        """Return a hash, 32 hexadecimal digits, of `host_view` as the parameters are."""
        self.copy_to_host()
        return xxhash.xxh3_128_hexdigest(self.host_view.data)


def _is_elsewhere(device: torch.device) -> bool:
    """Return whether tensors of `device` are not in host memory."""
    return device.type != "cpu"
