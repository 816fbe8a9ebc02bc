"""OSGP: overlapped stochastic gradient push.

Assran, Loizou, Ballas, Rabbat; ICML 2019; arXiv 1811.10792. Push-sum needs no answer and no order
of messages: mass counts whenever it is received. So gradients and messages can overlap
(`push_sum.py` explains the mass, and why z is held):

1. local:    X_i <- X_i - eta g_i(z_i)
2. receive:  add all received mass
3. send:     half of (X_i, w_i) to one rank
4. model:    z_i = X_i / w_i

`overlap_tau` unset: asynchronous. The receiver is a neighbour drawn uniformly, on any graph; if its
inbox is full the mass stays here. No rank ever waits.

`overlap_tau = tau`: the paper's tau-OSGP. Receivers rotate as in `sgp`, and step k waits until the
messages of step k - tau and of all steps before are received. The paper sends every tau steps:
`local_steps = tau`. A message that others wait for is always sent: a rank that may send no mass
sends it with weight 0.

Each gradient moves the sum of the X_i by eta g, whichever rank computes it. But z_i moves by (eta /
w_i) g, and a rank that sends k times as often as others has k times less mass: on fast ranks w_i is
small. Chance makes it smaller still: m sends without a received message in between leave 2^-m. **A
rank with less than 1/2 therefore sends no mass** (`MIN_WEIGHT`), so that w_i >= 1/4 and no step is
larger than 4 eta. That is push-sum as well: any split of the mass conserves it. Without this
minimum the run diverges (a test shows it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.push_sum import MIN_WEIGHT, PushSum
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request

__all__ = ["OSGP"]


class OSGP(PushSum):
    """Push-sum that does not wait, or only for messages of earlier steps."""

    name = "osgp"
    description = replace(
        PushSum.description,
        paper="Assran et al. 2019, arXiv 1811.10792",
        memory="4 M",
        waits="never; with `overlap_tau`: for messages sent that many steps ago",
    )
    config_keys = ("local_steps", "overlap_tau")

    @classmethod
    def is_lockstep(cls, settings: AlgorithmConfig) -> bool:
        """Return whether ranks wait for each other's messages: with `overlap_tau`."""
        return settings.overlap_tau is not None

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse graphs without a rotation, if ranks wait for messages.

        Raises:
            UserError: says why, and what would work.
        """
        super().validate_requirements(ranks, settings, graph)
        if settings.overlap_tau is not None:
            cls._check_rotation(settings, graph)

    def restart(self, step: int) -> None:
        """Begin with weight 1; messages of steps before are not waited for."""
        super().restart(step)
        self._step = step
        period = self.settings.local_steps
        self._awaited = (step // period + 1) * period  # oldest exchange without its message
        self._received: set[int] = set()  # exchanges from there on whose message was received

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Apply one gradient, add all received mass, and send after `local_steps` gradients."""
        self._update(local)  # 1
        step = self._step = local.local_step
        self._receive()  # 2, 4
        if step % self.settings.local_steps:
            return
        if self.settings.overlap_tau is None:
            self._try_send(step)  # 3
            return
        yield from self._wait_and_send(self._out_neighbour(step), step)  # 3
        while self._awaited <= step - self.settings.overlap_tau:
            yield from self._wait_until(lambda: self._awaited in self._received)
            self._received.remove(self._awaited)
            self._awaited += self.settings.local_steps

    def _try_send(self, step: int) -> None:
        neighbours = self.endpoint.neighbours()
        if neighbours and self.weight_quanta >= MIN_WEIGHT:
            send_buffer = self.endpoint.acquire_send_buffer(self.rng.choice(neighbours))
            if send_buffer is not None:
                self._send(send_buffer, step)
                return
        self.records.skipped(step)

    def absorb(self, step: int) -> None:
        """Add the received mass outside of a step."""
        self._receive()

    def _receive(self) -> None:
        inbox = self.endpoint.inbox
        for received in inbox.receive():
            if self.settings.overlap_tau is not None:
                self._received.add(received.message.header.step)
            self._accumulate(received.message, self._step)
            inbox.free(received)
