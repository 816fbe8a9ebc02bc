"""SwarmSGD, non-blocking (Nadiradze, Sabour, Davies, Li, Alistarh; NeurIPS 2021; arXiv 1910.12308).

Each rank makes H local steps, or a geometric number of mean H (`algorithm.local_steps_distribution`), and then
averages with one neighbour drawn uniformly, which goes on with its own local steps. A rank has a live
vector Y_i, that others read and move, and a base vector B_i, from which its local phase has started:

1. local:    x_i = B_i;  H_i times x_i <- x_i - eta g(x_i), whatever others do to Y_i meanwhile
2. progress: a_i = B_i - x_i = eta h_i
3. average:  Y_i, Y_j <- A = (Y_i + Y_j)/2, j uniform among the neighbours; B_j and j's phase stay
4. restart:  Y_i <- A - a_i;  B_i = x_i <- Y_i

Y_i + Y_j is conserved by 3, and every gradient enters the mean exactly once, in 4, however stale. A
rank's effect on others waits for its own next interaction, never for theirs.

How it is done here, and why:

- Step 3 is the claimed exchange of `pairing`, with Y_i as the vector: nobody locks the partner's live
  vector, its delta comes to its inbox. So Y_j lacks what is on its way: j absorbs it at its next local
  step, and publishes Y_j anew, so that others can find it again in the same phase. If no partner is found
  (all are taken), step 4 has A = Y_i.
- Quantized: only the live vector crosses the wire, coded once, and decoded against the reader's own live
  vector; the answer is the integers by which both move. (A third-party code sends base and live vector.)
  B_i and a_i stay in the type of the model.
- The paper's graphs are r-regular, with Poisson clocks of equal rate, so that each edge interacts alike.
  Any graph and any speeds are allowed here; the mean is conserved on all of them.
- With H = 1 all this is `adpsgd` with `algorithm.order` = adapt_with_combine, number by number; not with weight decay,
  which acts on B_i here and on the average there.

Also: `swarm_blocking`, and `swarm_pull`, which is what the authors' code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.local_phase import Phases
from mpi_dasgd.algorithms.pair_averaging import PAIR_CODECS, PairExchange
from mpi_dasgd.transport.endpoint import Request

__all__ = ["Swarm"]


class Swarm(Algorithm):
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
    capabilities = Capabilities(
        minimum_ranks=2,
    )
    config_keys = ("local_steps", "local_steps_distribution", "max_attempts", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Publish the initial model: B_i = Y_i = x_i."""
        self._pairs = PairExchange(self.endpoint, self.codec, self.settings, self.rng, self.record)
        self._phases = Phases(self.settings, self.rng)
        self._shadow = self.x.copy()
        self._base = self.x.copy()
        self._steps = 0  # of this phase
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a live vector that did not come out of an interaction."""
        self._pairs.publish(self._shadow, step)

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """One local step, and at the end of a phase an interaction."""
        local.apply()  # 1
        self._steps += 1
        if not self._phases.ends(local.local_step):
            self._pairs.absorb(self._shadow, local.local_step, publish=True)
            return
        self._pairs.exchange(self._shadow, local.local_step, publish=False)  # 3
        self._end_phase()
        self._pairs.publish(self._shadow, local.local_step)
        return
        yield  # an asynchronous algorithm never does

    def _end_phase(self) -> None:
        """Steps 2 and 4."""
        self._base -= self.x  # a_i
        self._shadow -= self._base
        self._begin_phase()

    def _begin_phase(self) -> None:
        self._base[:] = self._shadow
        self.x[:] = self._shadow
        self._steps = 0

    def absorb(self, step: int) -> None:
        """Apply the deltas that have arrived, outside of a step."""
        if self._pairs.absorb(self._shadow, step) and not self._steps:
            self._begin_phase()  # there is no progress yet that they would have to wait for

    def finalize(self) -> Iterator[Request]:
        """Give back what is held of a partner, and end the phase, so that the model is the live vector."""
        yield from self._pairs.finalize()
        self._end_phase()

    def mass(self) -> np.ndarray:
        """Y_i less the progress of the phase, which is in x_i only."""
        return self._shadow + (self.x - self._base)

    def state(self) -> dict[str, np.ndarray]:
        """Return the two vectors; the progress is in the model."""
        return {"live": self._shadow, "base": self._base, "steps": np.array([self._steps])}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned."""
        self._shadow[:] = arrays["live"]
        self._base[:] = arrays["base"]
        self._steps = int(arrays["steps"][0])
