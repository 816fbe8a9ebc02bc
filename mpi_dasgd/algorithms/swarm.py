"""SwarmSGD, non-blocking (Nadiradze, Sabour, Davies, Li, Alistarh; NeurIPS 2021; arXiv 1910.12308).

Each rank makes H local steps, or a geometric number of mean H
(`algorithm.local_steps_distribution`), and then averages with one neighbour drawn uniformly, which
goes on with its own local steps. A rank has a live vector Y_i, which others read and move, and a
base vector B_i, from which its local phase has started:

1. local:   x_i = B_i;  H_i times x_i <- x_i - eta g(x_i), whatever others do to Y_i meanwhile
2. update:  a_i = B_i - x_i = eta h_i, the local update of the phase
3. average: Y_i, Y_j <- A = (Y_i + Y_j)/2, j uniform among the neighbours; B_j and j's phase stay
4. restart: Y_i <- A - a_i;  B_i = x_i <- Y_i

Y_i + Y_j is conserved by 3, and every gradient enters the mean exactly once, in 4, however stale it
is. A rank's effect on others takes place at its own next interaction; it never depends on theirs.

How it is done here, and why:

- Step 3 is the claimed exchange of `pair_averaging`, with Y_i as the vector: no rank locks the
  partner's live vector, the partner's delta is sent to its inbox. So Y_j lacks what is in flight: j
  absorbs it at its next local step, and publishes Y_j again, so that others can read it in the same
  phase. If no partner is found (all are claimed), step 4 has A = Y_i.
- Quantized: only the live vector crosses the wire, encoded once, and decoded against the reader's
  own live vector; the answer is the integers by which both move. (A third-party code sends base and
  live vector.) B_i and a_i stay in the type of the model.
- The paper's graphs are r-regular, with Poisson clocks of equal rate, so that all edges interact
  equally often. Any graph and any speeds are allowed here; the mean is conserved on all of them.
- With H = 1 all this is `adpsgd` with `algorithm.order` = adapt_with_combine, number by number; but
  not with weight decay, which acts on B_i here and on the average there.

The other variants are `swarm_blocking`, and `swarm_pull`, which is what the authors' code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.asynchronous import AsynchronousAlgorithm
from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.local_phase import Phases
from mpi_dasgd.algorithms.neighbour_exchange import PAIR_CODECS
from mpi_dasgd.algorithms.pair_averaging import PairExchange
from mpi_dasgd.transport.endpoint import Request

__all__ = ["Swarm"]


class Swarm(AsynchronousAlgorithm):
    """Local phases from a base vector; pair averages of live vectors."""

    name = "swarm"
    variant = "nonblocking"
    description = Description(
        paper="Nadiradze et al. 2021, arXiv 1910.12308",
        exchanges="models, in pairs that conserve the mean",
        traffic="2 M / H",
        memory="8 M + 2 P",
        waits="never",
    )
    capabilities = Capabilities(minimum_ranks=2, runs_on_device=True)
    config_keys = ("local_steps", "local_steps_distribution", "max_attempts", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Publish the initial model: B_i = Y_i = x_i."""
        self._pairs = PairExchange(self)
        self._phases = Phases(self.settings, self.rng)
        self._live = self.x.copy()
        self._base = self.x.copy()
        self._phase_steps = 0
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a live vector that is not the result of an interaction."""
        self._pairs.publish(self._live, step)

    def reset(self, step: int) -> None:
        """Begin a phase at the model, which is the live vector, too."""
        self._live[:] = self.x
        self._begin_phase()
        self.restart(step)

    def advance(self, local: LocalOptimizer) -> None:
        """Make one local step, and interact at the end of a phase."""
        local.apply()  # 1
        self._phase_steps += 1
        if not self._phases.ends(local.local_step):
            self._pairs.absorb(self._live, local.local_step, publish_result=True)
            return
        self._pairs.exchange(self._live, local.local_step, publish_result=False)  # 3
        self._end_phase()
        self._pairs.publish(self._live, local.local_step)

    def _end_phase(self) -> None:
        """Apply the local update to the live vector (steps 2 and 4)."""
        self._base -= self.x  # a_i
        self._live -= self._base
        self._begin_phase()

    def _begin_phase(self) -> None:
        self._base[:] = self._live
        self.x[:] = self._live
        self._phase_steps = 0

    def absorb(self, step: int) -> None:
        """Apply the received deltas outside of a step."""
        if self._pairs.absorb(self._live, step) and not self._phase_steps:
            self._begin_phase()  # no local update has started: the model may follow at once

    def finalize(self) -> Iterator[Request]:
        """Release what is held of a partner, and end the phase: the model is the live vector."""
        yield from self._pairs.finalize()
        self._end_phase()

    def mass(self) -> np.ndarray:
        """Return Y_i - a_i, with the local update a_i of the phase so far, which only x_i has."""
        return self._live + (self.x - self._base)

    def state(self) -> dict[str, np.ndarray]:
        """Return the live and the base vector; the local update follows from the model."""
        return {"live": self._live, "base": self._base, "steps": np.array([self._phase_steps])}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned."""
        self._live[:] = arrays["live"]
        self._base[:] = arrays["base"]
        self._phase_steps = int(arrays["steps"][0])
