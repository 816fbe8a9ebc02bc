"""D-PSGD: decentralized parallel SGD.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu; NeurIPS 2017; arXiv 1705.09056.

    x_i(k+1) = sum_j W_ij x_j(k) - eta g_i(x_i(k))

The gradient is taken at the model *before* the average, so that the two can overlap:

1. publish:  x_i(k), as version k, at the end of step k - 1
2. compute:  g_i(x_i(k)), while the neighbours read x_i(k)
3. local:    x_i <- x_i(k) - eta g_i
4. average:  x_i <- x_i + sum_j W_ij (x_j(k) - x_i(k)), waiting for version k of each neighbour

W is doubly stochastic: Metropolis weights, or those of the edge file. Step 4 takes x_i(k) from the
own publication, so that the optimizer (weight decay too) acts on x_i(k), as in the formula.

With H local steps between two averages, step 3 is done H times and step 4 averages the models that
were published H steps ago. The paper has H = 1.

**No barrier, and only two versions.** A version is read in place, without a claim. Its slot is the
first that its owner reuses, for version k + 2. The owner j encodes k + 2 once it has read version k
+ 1 of all its neighbours; each of them published k + 1 after it had read version k of j. So no rank
still reads version k at that time. Edges are undirected, so that readers and neighbours are the
same ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.communication import publish_vector, wait
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.records import INITIATED
from mpi_dasgd.codecs import Message
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request

__all__ = ["DPSGD"]


class DPSGD(Algorithm):
    """Synchronous averages with all neighbours, overlapped with the gradient."""

    name = "dpsgd"
    description = Description(
        paper="Lian et al. 2017, arXiv 1705.09056",
        exchanges="models, read by all neighbours",
        traffic="r M / H",
        memory="4 M + P",
        waits="every H steps, for the neighbours",
    )
    capabilities = Capabilities(synchronous=True, uses_inbox=False)
    config_keys = ("local_steps",)

    @classmethod
    def max_steps_ahead(cls, settings: AlgorithmConfig, graph: Topology) -> int:
        """Return one exchange per edge on the way from rank 0 to the farthest rank, in steps."""
        return settings.local_steps * graph.eccentricity(0)

    def start(self) -> None:
        """Publish the initial model as version 1."""
        self._neighbours = self.endpoint.topology.neighbours(self.endpoint.rank)
        self._weights = self.endpoint.topology.weights(self.endpoint.rank)
        self._scratch = np.empty_like(self.x)
        self._version = 0
        self._publish(0, self.x)

    def state(self) -> dict[str, np.ndarray]:
        """Return the published model, which the next average reads."""
        return {"published": self._published.payload}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned; `restart` publishes it."""
        self._loaded = arrays["published"]

    def restart(self, step: int) -> None:
        """Publish what was published at the checkpoint, as the next version on all ranks."""
        self._publish(step, self._loaded)

    def reset(self, step: int) -> None:
        """Publish the model as the next version: all ranks are at the same step, and have read."""
        self._publish(step, self.x)

    def resume(self, step: int) -> None:
        """Go on: what was published stays, and what the user has written is this rank's alone."""

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Apply one gradient; average with all neighbours after every `local_steps` gradients."""
        local.apply()  # 3
        if local.local_step % self.settings.local_steps:
            return
        # 4: x_i - eta g_i - (1 - W_ii) x_i(k): the own share W_ii of the old model stays
        self._add(-sum(self._weights), self._published)
        for rank, weight in zip(self._neighbours, self._weights, strict=True):
            request = self.endpoint.read(rank, self._version)
            yield from wait(request)
            # None: the neighbour is gone, and the driver ends the run.
            if request.message is not None:
                self._add(weight, request.message)
                header = request.message.header
                self.records.message(INITIATED, local.local_step, header, nbytes=header.nbytes)
        self._publish(local.local_step, self.x)  # 1

    def _add(self, weight: float, message: Message) -> None:
        """x_i <- x_i + weight x_j."""
        np.multiply(message.payload, weight, out=self._scratch)
        self.x += self._scratch

    def _publish(self, step: int, model: np.ndarray) -> None:
        slot = publish_vector(self.endpoint, self.codec, model, step)
        assert slot is not None, "no rank claims a slot"
        self._published = slot
        self._version += 1
