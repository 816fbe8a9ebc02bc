"""SwarmSGD as its authors' code does it (ICLR-PopSGD/PopSGD, amsabour/lattice-quantization): pull only.

The published algorithm moves both sides of an interaction; the authors' one-sided code moves the reader:

1. local:   x_i <- x_i - eta g_i
2. publish: x_i, after every step
3. average: after every H steps x_i <- (x_i + x̂_j)/2, x̂_j the newest publication of a random other rank j,
            which is not modified and does not know

The reader gives up half of what it is ahead of x̂_j, and nobody else takes it: a gradient moves the mean by
less than eta/n. With memoryless compute times the effective step is 2/3 at H = 1, 0.78 at 2, 0.865 at 4, 0.96
at 16; with constant ones 0.80, 0.88, 0.94, 0.98. (It would be 0.51 at H = 1 if the average were published,
too; step 2 comes before it.) So a rate tuned with that code is too large for the paper's algorithm. The
mean of the models is not conserved. Differences: j is drawn among the neighbours of `topology.graph`
(there: among all ranks: take `complete`), a torn read is noticed and repeated, and codes carry a check.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.local_phase import Phases
from mpi_dasgd.algorithms.pair_averaging import PAIR_CODECS
from mpi_dasgd.algorithms.pull_averaging import PullExchange
from mpi_dasgd.transport.endpoint import Request

__all__ = ["PullSwarm"]


class PullSwarm(Algorithm):
    """Local phases; averages in which only the reader moves."""

    name = "swarm"
    variant = "pull"
    description = Description(
        paper="code of Nadiradze et al., not their paper",
        exchanges="models, read by one side: the mean is not conserved",
        traffic="M / H",
        memory="5 M",
        waits="never",
        effective_step="0.67 to 0.8 at H = 1, 0.86 to 0.94 at H = 4",
    )
    capabilities = Capabilities(
        preserves_mean=False,
        uses_inbox=False,
        minimum_ranks=2,
    )
    config_keys = ("local_steps", "local_steps_distribution", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Publish the initial model."""
        self._pulls = PullExchange(self.endpoint, self.codec, self.settings, self.rng, self.record)
        self._phases = Phases(self.settings, self.rng)
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a model that did not come out of a step."""
        self._pulls.publish(self.x, step)

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """One local step, and at the end of a phase one average."""
        local.apply()  # 1
        self._pulls.publish(self.x, local.local_step)  # 2
        if self._phases.ends(local.local_step):
            self._pulls.average(self.x, local.local_step, publish=False)  # 3
        return
        yield  # an asynchronous algorithm never does
