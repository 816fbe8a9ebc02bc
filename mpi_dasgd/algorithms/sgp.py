"""SGP: stochastic gradient push (Assran, Loizou, Ballas, Rabbat; ICML 2019; arXiv 1811.10792).

Synchronous SGD over a directed graph that changes from step to step. In step k each rank sends half
of its push-sum mass to one rank, and waits for that of one rank (`push_sum.py` explains the mass,
and why z is held):

1. local:    X_i <- X_i - eta g_i(z_i)
2. send:     half of (X_i, w_i) to rank i + d_k
3. receive:  (X_i, w_i) <- (X_i, w_i) + the message of step k from rank i - d_k
4. model:    z_i = X_i / w_i

The offsets d_k, cyclically: `exponential` 1, 2, 4, ... below n; `complete` 1, 2, 3, ... below n;
`ring` 1. For n a power of two the exponential graph reaches exact consensus in log2 n steps without
gradients. Every exchange is doubly stochastic, so w_i is 1 at the end of each step; it is sent all
the same.

With H local steps (`local_steps`) steps 2 to 4 are done after every H gradients; the paper has
H = 1.

**One slot is enough.** A fast rank may send its message of step k + 1 before a slower one sends
that of step k. As long as the message of its own step is missing, a rank that waits copies those of
later steps and frees their slots. So no rank waits forever: let k be the smallest step that any
rank is in. A rank in step k that finds no free slot at j has not sent the message of step k that j
needs; so j is in step k, too, and computes or empties its inbox. A rank that waits for a message of
step k waits for a rank in step k that finds a free slot, as shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.push_sum import PushSum
from mpi_dasgd.codecs import Message
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request

__all__ = ["SGP"]


class SGP(PushSum):
    """Synchronous push-sum with one out-neighbour per step."""

    name = "sgp"
    description = replace(
        PushSum.description,
        paper="Assran et al. 2019, arXiv 1811.10792",
        memory="4 M; more for each early message: M",
        waits="every H steps, for one rank",
    )
    capabilities = replace(PushSum.capabilities, synchronous=True)
    config_keys = ("local_steps",)

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse graphs without a rotation.

        Raises:
            UserError: says why, and what would work.
        """
        super().validate_requirements(ranks, settings, graph)
        cls._check_rotation(settings, graph)

    def restart(self, step: int) -> None:
        """Begin with weight 1, which it was: at the end of a step each rank has its full mass."""
        super().restart(step)
        self._step = step
        self._awaited = -1  # step whose message is used at once
        self._early: dict[int, Message] = {}  # copies of messages of later steps, by step

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Apply one gradient, and exchange after every `local_steps` gradients."""
        self._update(local)  # 1
        step = self._step = local.local_step
        if step % self.settings.local_steps:
            return
        yield from self._wait_and_send(self._out_neighbour(step), step)  # 2
        early = self._early.pop(step, None)
        if early is None:
            self._awaited = step
            yield from self._wait_until(lambda: self._awaited < 0)  # 3, 4
        else:
            self._accumulate(early, step)

    @property
    def _accepts_messages(self) -> bool:
        return self._step not in self._early

    def _receive(self) -> None:
        inbox = self.endpoint.inbox
        for received in inbox.receive():
            message = received.message
            sender_step = message.header.step
            if sender_step == self._awaited:
                self._awaited = -1
                self._accumulate(message, sender_step)
            else:
                self._early[sender_step] = Message(message.buffer.copy(), message.layout)
            inbox.free(received)

    def mass(self) -> np.ndarray:
        """Return the own numerator and those of messages that were received early."""
        return sum((self.mass_of(early) for early in self._early.values()), super().mass())
