"""SwarmSGD as its authors' code does it (ICLR-PopSGD/PopSGD, amsabour/lattice-quantization): pull.

The published algorithm moves both sides of an interaction; the authors' one-sided code moves the
reader only:

1. local:   x_i <- x_i - eta g_i
2. publish: x_i, after every step
3. average: after every H steps x_i <- (x_i + x̂_j)/2, x̂_j the newest publication of a random other
            rank j, which is not modified and does not know of it

The reader gives up half of its lead over x̂_j, and no other rank takes it over: a gradient moves
the mean by less than eta/n. With memoryless compute times the effective step is 2/3 at H = 1, 0.78
at 2, 0.865 at 4, 0.96 at 16; with constant ones 0.80, 0.88, 0.94, 0.98. (It would be 0.51 at H = 1
if the average were published, too; step 2 comes before it.) A rate tuned with that code is
therefore too large for the paper's algorithm. The mean of the models is not conserved. Differences:
j is drawn among the neighbours of `topology.graph` (there among all ranks: choose `complete`), a
torn read is noticed and repeated, and codes carry a checksum.
"""

from __future__ import annotations

from mpi_dasgd.algorithms.asynchronous import AsynchronousAlgorithm
from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.local_phase import Phases
from mpi_dasgd.algorithms.neighbour_exchange import PAIR_CODECS
from mpi_dasgd.algorithms.pull_averaging import PullExchange

__all__ = ["PullSwarm"]


class PullSwarm(AsynchronousAlgorithm):
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
    capabilities = Capabilities(preserves_mean=False, uses_inbox=False, minimum_ranks=2)
    config_keys = ("local_steps", "local_steps_distribution", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Publish the initial model."""
        self._pulls = PullExchange(self)
        self._phases = Phases(self.settings, self.rng)
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a model that is not the result of a step."""
        self._pulls.publish(self.x, step)

    def reset(self, step: int) -> None:
        """Publish the model, and use no older one."""
        self._pulls.discard()
        self.restart(step)

    def advance(self, local: LocalOptimizer) -> None:
        """Make one local step, and average at the end of a phase."""
        local.apply()  # 1
        self._pulls.publish(self.x, local.local_step)  # 2
        if self._phases.ends(local.local_step):
            self._pulls.average(self.x, local.local_step, publish_result=False)  # 3
