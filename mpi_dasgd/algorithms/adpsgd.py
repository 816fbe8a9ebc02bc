"""AD-PSGD: asynchronous decentralized parallel SGD.

Lian, Zhang, Zhang, Liu; ICML 2018; arXiv 1710.06952. Each rank, whenever it has a gradient,
averages its model with that of one neighbour drawn at random. One event k of the paper's
Algorithm 1, seen from all ranks:

1. gradient: g_k at x̂_i, an older x_i: the one at which the gradient was started
2. average:  [x_1 .. x_n] <- [x_1 .. x_n] W_k,  W_k doubly stochastic: i and j to their mean
3. apply:    x_i <- x_i - eta g_k, to the averaged model

This is the variant `pair` (default). The average is the claimed exchange of `pair_averaging`: it
changes both sides by the same amount, so that W_k conserves the mean of all models, and no rank
waits. The paper's ranks wait for each other's answer, which deadlocks unless the graph is bipartite
(`adpsgd_bipartite`); here any graph will do. Most frameworks only read the neighbour's model
(`adpsgd_pull`).

`algorithm.order`:

- `adapt_with_combine`: 2, then 3 and publish: Algorithm 1, in two passes over memory.
- `adapt_then_combine` (default): 3, 2, publish, in one pass: what the communication thread of the
  paper's implementation does. The effective step is the same, 1.00 to 1.01 on the noise-free
  quadratic, and the consensus distance under noise is a third to a half: when a rank offers its
  model, its newest gradient has already been shared.

Momentum and weight decay are the local optimizer's: they act in step 3 and are never averaged.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.asynchronous import AsynchronousAlgorithm
from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.communication import update_of
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.neighbour_exchange import PAIR_CODECS
from mpi_dasgd.algorithms.pair_averaging import PairExchange
from mpi_dasgd.transport.endpoint import Request

__all__ = ["ADPSGD"]


class ADPSGD(AsynchronousAlgorithm):
    """Lock-free pair averaging that conserves the mean."""

    name = "adpsgd"
    variant = "pair"
    description = Description(
        paper="Lian et al. 2018, arXiv 1710.06952",
        exchanges="models, in pairs that conserve the mean",
        traffic="2 M / H",
        memory="8 M",
        waits="never",
    )
    capabilities = Capabilities(minimum_ranks=2, runs_on_device=True)
    config_keys = ("order", "local_steps", "max_attempts", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Publish the initial model."""
        self._pairs = PairExchange(self)
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a model that is not the result of a step."""
        self._pairs.publish(self.x, step)

    def advance(self, local: LocalOptimizer) -> None:
        """Apply one gradient, and exchange after every `local_steps` gradients."""
        if local.local_step % self.settings.local_steps:
            local.apply()  # 3
        elif self.settings.order == "adapt_with_combine":
            self._pairs.exchange(self.x, local.local_step, publish_result=False)  # 2
            self._pairs.publish(self.x, local.local_step, update_of(local))  # 3
        else:
            update = update_of(local)  # 3, unless it is made in the pass of the exchange
            step = local.local_step
            self._pairs.exchange(self.x, step, publish_result=True, update=update)  # 2

    def absorb(self, step: int) -> None:
        """Apply the received deltas outside of a step."""
        self._pairs.absorb(self.x, step)

    def finalize(self) -> Iterator[Request]:
        """Release what an unfinished exchange holds of a partner."""
        return self._pairs.finalize()
