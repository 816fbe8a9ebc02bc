"""EASGD: elastic averaging SGD, asynchronous (Zhang, Choromanska, LeCun; NeurIPS 2015; arXiv 1412.6651).

Rank 0 keeps a center c; each worker explores with a model of its own, tied to the center by a spring.
Every H = `local_steps` steps of its own clock worker i

1. local:    x_i <- x_i - eta g_i
2. read:     ĉ, the newest center that rank 0 has published
3. elastic:  d = alpha (x_i - ĉ);  x_i <- x_i - d;  send d to rank 0; no room there: skip this exchange
4. center:   rank 0, when d arrives:  c <- c + d, and publish c

alpha = `moving_rate`, else beta / p with the paper's beta = 0.9, p workers. EAMSGD is the same with momentum
in the workers' optimizer; momentum is never averaged. The result is the center.

Nobody waits: the paper's worker fetches c and updates it in one transaction, here d may be of a center
that has moved since. Both sides move by the same d, so that the sum of c, of all x_i and of the d on
their way changes by gradients only. A published center serves each worker once: else fast workers would
push a center that is slow to answer beyond their own models. The paper takes the gradient at the model
before step 3, and applies it after; this order has the gradient always at the model that it changes.

Records: a worker's `partner_step` is its own step at which it asked for the center, `age_s` the center's
age; the server's `step` is the number of deltas absorbed so far.

A server that works (`server_trains`) has c beside its own model, and ends with c as its model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.base import ABSORBED, INITIATED, SKIPPED, ExchangeRecord, LocalOptimizer
from mpi_dasgd.algorithms.description import Description
from mpi_dasgd.algorithms.pair_averaging import announce
from mpi_dasgd.algorithms.server import ServerAlgorithm
from mpi_dasgd.codecs import ExchangeBuffers
from mpi_dasgd.transport.endpoint import ReadRequest, Request

__all__ = ["EASGD"]

_BETA = 0.9  # p alpha, in the paper's experiments


class EASGD(ServerAlgorithm):
    """Workers tied elastically to a center."""

    name = "easgd"
    description = Description(
        paper="Zhang et al. 2015, arXiv 1412.6651",
        exchanges="models with a center, elastically",
        traffic="2 M / H; server: 0",
        memory="9 M; server that works: 9 M + 2 P",
        waits="never",
    )
    config_keys = ("moving_rate", "local_steps", "server_trains")
    codecs = ("none", "bf16", "fp16", "lattice8", "lattice4", "lattice16", "qsgd8")

    def start(self) -> None:
        """Publish the center, which is the initial model."""
        super().start()
        workers = self.workers(self.endpoint.size, self.settings)
        self.alpha = self.settings.moving_rate or _BETA / len(workers)
        self.center = self.x
        self._started = self.x
        if self.endpoint.rank == 0 and self.computes_gradients:
            self.center, self._started = self.x.copy(), self.x.copy()
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a center that did not come out of a step."""
        self._reading: ReadRequest | None = None  # of the center, asked for at step _asked
        self._asked = self._absorbed = 0  # deltas that the center has taken in
        self._served = -1  # how many the center had that served this worker last
        if self.endpoint.rank == 0:
            self._publish()

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Lines 1 to 3, and 4 on a server that works."""
        local.apply()
        due = local.local_step % self.settings.local_steps == 0
        if self.endpoint.rank == 0:
            self.serve(local)
            if due:
                delta = self.alpha * (self.x - self.center)
                self.x -= delta
                self.center += delta
                self._absorbed += 1
                self._publish()
            return
        self._exchange(local.local_step)  # with a center that was asked for earlier
        if due and self._reading is None:
            self._reading, self._asked = self.endpoint.read(0), local.local_step
            self._exchange(local.local_step)
        return
        yield  # an asynchronous algorithm never does

    def _exchange(self, step: int) -> None:
        """Lines 2 and 3, if the center is here."""
        reading, endpoint = self._reading, self.endpoint
        if reading is None or not reading.is_settled:
            return
        self._reading = None
        center = reading.message
        header = None if center is None else center.header
        news = header is not None and header.step != self._served
        posting = endpoint.acquire_send_buffer(0) if news else None
        if header is None or posting is None:
            endpoint.counters.skipped += 1
            self.record(ExchangeRecord(step, -1, SKIPPED, -1, 0.0, 0, 0))
            return
        outcome = self.codec.average_pair(
            self.x,
            ExchangeBuffers(partner_model=center, weight=self.alpha, reply_delta=posting.message),
        )
        now = endpoint.time_ns()
        posting.message.stamp(rank=endpoint.rank, step=step, time_ns=now)
        endpoint.send(posting)
        self._served = header.step
        age = (now - header.time_ns) * 1e-9
        nbytes = 2 * header.nbytes
        self.record(ExchangeRecord(step, 0, INITIATED, self._asked, age, nbytes, 0, *outcome))

    def serve(self, local: LocalOptimizer) -> int:
        """Line 4 for all deltas that have arrived; return how many there were."""
        endpoint = self.endpoint
        self.lost()
        arrivals = endpoint.inbox.receive()
        if arrivals:
            messages = [arrival.message for arrival in arrivals]
            publication = endpoint.publication.reserve()
            buffers = ExchangeBuffers(deltas=messages, weight=self.alpha, publication=publication)
            self.codec.average_pair(self.center, buffers)
            for arrival in arrivals:
                header = arrival.message.header
                endpoint.inbox.free(arrival)
                age = (endpoint.time_ns() - header.time_ns) * 1e-9
                self.record(
                    ExchangeRecord(self._absorbed, arrival.sender, ABSORBED, header.step, age, 0, 0)
                )
                self._absorbed += 1
            announce(endpoint, publication, self._absorbed)
        return len(arrivals)

    def _publish(self) -> None:
        publication = self.endpoint.publication.reserve()
        if publication is not None:
            self.codec.encode(self.center, publication)
            announce(self.endpoint, publication, self._absorbed)

    def absorb(self, step: int) -> None:
        """The server serves on."""
        if self.endpoint.rank == 0:
            self.serve(self.local)

    def finalize(self) -> Iterator[Request]:
        """A server that works ends with the center."""
        if self.center is not self.x:
            self.x[:] = self.center
            self.center = self.x
        return super().finalize()

    @property
    def model(self) -> np.ndarray:
        """The center, on rank 0."""
        return self.center

    def mass(self) -> np.ndarray:
        """Models, and the way that a center beside them has gone."""
        return self.x if self.center is self.x else self.x + self.center - self._started

    def state(self) -> dict[str, np.ndarray]:
        """The center, where it is not the model."""
        return {} if self.center is self.x else {"center": self.center}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back the center."""
        if self.center is not self.x:
            self.center[:] = arrays["center"]
