"""EASGD: elastic averaging SGD, asynchronous.

Zhang, Choromanska, LeCun; NeurIPS 2015; arXiv 1412.6651. Rank 0 keeps a center c; each worker
explores with a model of its own, tied to the center by a spring. Every H = `local_steps` steps of
its own clock worker i does

1. local:    x_i <- x_i - eta g_i
2. read:     ĉ, the newest center that rank 0 has published
3. elastic:  d = alpha (x_i - ĉ);  x_i <- x_i - d;  send d to rank 0; if its inbox is full, skip
             this exchange
4. center:   rank 0, when d is received:  c <- c + d, and publish c

alpha is `moving_rate`, or beta / p with the paper's beta = 0.9 and p workers. EAMSGD is the same
with momentum in the workers' optimizer; momentum is never averaged. The result is the center.

No rank waits: the paper's worker fetches c and updates it in one transaction, here d may refer to a
center that has moved since. Both sides move by the same d, so that gradients alone change the sum
of c, of all x_i and of the d in flight. A published center serves each worker once: otherwise fast
workers would push a center that is slow to answer beyond their own models. The paper takes the
gradient at the model before step 3, and applies it after; in this order the gradient is always
taken at the model that it changes.

Records: a worker's `partner_step` is its own step at which it started to read the center, `age_s`
the center's age; the server's `step` is the number of deltas absorbed so far.

A server that trains (`server_trains`) has c beside its own model, and ends with c as its model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.asynchronous import AsynchronousAlgorithm
from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.communication import publish, publish_vector, send
from mpi_dasgd.algorithms.description import Description
from mpi_dasgd.algorithms.records import ABSORBED, INITIATED
from mpi_dasgd.algorithms.server import ServerAlgorithm
from mpi_dasgd.codecs import ExchangeBuffers
from mpi_dasgd.transport.endpoint import ReadRequest, Request

__all__ = ["EASGD"]

_BETA = 0.9  # p alpha, in the paper's experiments


class EASGD(AsynchronousAlgorithm, ServerAlgorithm):
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
        self._initial_center = self.x
        if self.endpoint.rank == 0 and self.computes_gradients:
            self.center, self._initial_center = self.x.copy(), self.x.copy()
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a center that is not the result of a step."""
        self._read: ReadRequest | None = None  # of the center
        self._read_step = 0  # own step at which it was started
        self._absorbed = 0  # deltas that the center has absorbed
        self._served = -1  # that number in the center that this worker has used last
        if self.endpoint.rank == 0:
            self._publish()

    def advance(self, local: LocalOptimizer) -> None:
        """Do lines 1 to 3 on a worker, and line 4 on a server that trains."""
        local.apply()
        is_due = local.local_step % self.settings.local_steps == 0
        if self.endpoint.rank == 0:
            self.serve(local)
            if is_due:
                delta = self.alpha * (self.x - self.center)
                self.x -= delta
                self.center += delta
                self._absorbed += 1
                self._publish()
            return
        self._exchange(local.local_step)  # with a center whose read was started earlier
        if is_due and self._read is None:
            self._read, self._read_step = self.endpoint.read(0), local.local_step
            self._exchange(local.local_step)

    def _exchange(self, step: int) -> None:
        """Do lines 2 and 3, if the center has been read."""
        request, endpoint = self._read, self.endpoint
        if request is None or not request.is_settled:
            return
        self._read = None
        center = request.message
        header = None if center is None else center.header
        is_new = header is not None and header.step != self._served
        send_buffer = endpoint.acquire_send_buffer(0) if is_new else None
        if header is None or send_buffer is None:
            self.records.skipped(step)
            return
        buffers = ExchangeBuffers(
            partner_model=center, weight=self.alpha, reply_delta=send_buffer.message
        )
        outcome = self.codec.average_pair(self.x, buffers)
        now = endpoint.time_ns()
        send(endpoint, send_buffer, step, now)
        self._served = header.step
        self.records.exchange(
            INITIATED,
            step,
            partner=0,
            partner_step=self._read_step,
            sent_ns=header.time_ns,
            nbytes=2 * header.nbytes,
            outcome=outcome,
            now_ns=now,
        )

    def serve(self, local: LocalOptimizer) -> int:
        """Do line 4 for all received deltas; return their number."""
        endpoint = self.endpoint
        self.remove_lost()
        received = endpoint.inbox.receive()
        if received:
            slot = endpoint.publication.reserve()
            deltas = [delta.message for delta in received]
            buffers = ExchangeBuffers(deltas=deltas, weight=self.alpha, publication=slot)
            self.codec.average_pair(self.center, buffers)
            for delta in received:
                header = delta.message.header
                endpoint.inbox.free(delta)
                self.records.message(ABSORBED, self._absorbed, header)
                self._absorbed += 1
            publish(endpoint, slot, self._absorbed)
        return len(received)

    def _publish(self) -> None:
        publish_vector(self.endpoint, self.codec, self.center, self._absorbed)

    def absorb(self, step: int) -> None:
        """Go on serving, on the server."""
        if self.endpoint.rank == 0:
            self.serve(self.local)

    def suspend(self) -> Iterator[Request]:
        """Stop: a worker that reads the center holds nothing of it."""
        if self.center is not self.x:
            self._before_pause = self.x.copy()
        return iter(())

    def reset(self, step: int) -> None:
        """Begin with the model as center."""
        if self.center is not self.x:
            self.center[:] = self._initial_center[:] = self._before_pause[:] = self.x
        self.resume(step)

    def resume(self, step: int) -> None:
        """Publish the center, with what the user has written, and use no older one."""
        self._read = None
        if self.center is not self.x:
            written = self.x != self._before_pause
            self.center[written] = self.x[written]
        if self.endpoint.rank == 0:
            self._publish()

    def finalize(self) -> Iterator[Request]:
        """Replace the model of a server that trains by the center."""
        if self.center is not self.x:
            self.x[:] = self.center
            self.center = self.x
        return super().finalize()

    @property
    def model(self) -> np.ndarray:
        """The center, on rank 0."""
        return self.center

    def mass(self) -> np.ndarray:
        """Return the model, and what a center beside it has moved since the start."""
        return self.x if self.center is self.x else self.x + self.center - self._initial_center

    def state(self) -> dict[str, np.ndarray]:
        """Return the center, where it is not the model."""
        return {} if self.center is self.x else {"center": self.center}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the center."""
        if self.center is not self.x:
            self.center[:] = arrays["center"]
