"""DASGD: every gradient reaches every replica exactly once.

Tosi, Theobald; 2023; arXiv 2309.03754. Each rank keeps a whole replica x_i, all equal at the start,
and goes on without ever waiting:

1. gradient:  g_i at x_i, as the last step left it
2. update:    x_i <- x_i - eta g_i, at once
3. drain:     x_i <- x_i + u for every update u in the inbox
4. send:      to each rank j what it has not been sent; if its inbox is full: more next time
5. drain:     again, so that no gradient starts while updates wait; if there were any, step 4 again

Nothing is divided by n: each of the n gradients moves every replica by the whole eta.

As in TensAIR, the authors' system, replicas differ only by the gradients that just one of them has;
their number is S(i, j) = |G_i ^ G_j|. Different from it, and why:

- **What is sent is the update** u = x_after - x_before of the local optimizer; with plain SGD it is
  -eta g. So any optimizer works and stays local. With momentum the replicas still agree (a linear
  filter of each rank's gradients); Adam is outside the theory, as in TensAIR.
- **Additions are exact**: a replica is a float64 sum on a grid (`replica.py`,
  `codecs/error_feedback.py`). Once all updates are received all replicas are equal bit for bit,
  also with float32 models and with quantized messages.
- **What j still needs is one vector**, its `residual`. A message subtracts from it what its code
  can represent; the remainder, and updates that found a full inbox, stay and add up. Memory is
  bounded, no rank waits, nothing is lost.
- **Sparse graphs**: updates go along the breadth-first spanning tree from rank 0. What is received
  from one neighbour is added to the residuals of all others. A tree has one path between two ranks:
  exactly once again.
- **One thread**: received updates are applied between gradients; TensAIR has a thread that applies
  them at any time. The gradient is the same: it belongs to the x_i of its start.

Version vectors: V_i[k] is the number of gradients of rank k in replica i. Links keep the order of a
source's updates, so that the sets are prefixes and S(i, j) = sum_k |V_i[k] - V_j[k]| exactly. Every
message has the sender's V. A gradient counts as applied when the first message containing it
arrives; the quantization residual follows in later messages. Each source that advances is recorded
as one APPLIED exchange: partner k, partner_step V_i[k], staleness S(i, sender) before it.

What the user writes to the model between two steps is no update: it changes this replica alone.

Local steps H > 1 are refused: V counts gradients, and an update must be one.

A resumed run begins with a sum over all ranks, the only time that a rank waits. Checkpoints are
taken at different moments, so that the replicas as saved would never agree again: all go on from
their mean, residuals included. A message in flight at the checkpoint counts by the share of the
ranks that had received it.

If a rank dies: on the complete graph the others drop its residuals and go on; its last gradients
may have reached some of them only, whose replicas then differ by these. A tree needs all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.communication import send, wait
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.records import APPLIED
from mpi_dasgd.algorithms.replica import Link, Replica
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.topology import Topology, tree_branches
from mpi_dasgd.transport.endpoint import Request
from mpi_dasgd.transport.inbox import ReceivedMessage

__all__ = ["DASGD"]


class DASGD(Algorithm):
    """Whole replicas that exchange gradients, each of them exactly once."""

    name = "dasgd"
    description = Description(
        paper="Tosi & Theobald 2023, arXiv 2309.03754",
        exchanges="updates, to all ranks",
        traffic="(n-1) M; tree, about: 2 M",
        memory="4 M + 2 n P; tree of degree r: 4 M + 2 (r+1) P",  # a float64 sum is 2 P
        waits="never",
        effective_step="n",
    )
    # One update moves the sum of the models n times.
    capabilities = Capabilities(
        preserves_mean=False, replicated=True, uses_publication=False, minimum_ranks=2
    )
    config_keys = ("relay",)
    codecs = ("none", "bf16", "qsgd8")
    versions: np.ndarray

    @classmethod
    def trailer_words(cls, ranks: int) -> int:
        """Return the length of the sender's version vector and of a flag: whether it is settled."""
        return ranks + 1

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse local steps, and direct sending without links to all ranks.

        Raises:
            UserError: says why, and what would work.
        """
        super().validate_requirements(ranks, settings, graph)
        if settings.local_steps != 1:
            raise UserError(
                "algorithm.local_steps: 'dasgd' sends and counts every gradient by itself, "
                f"expected 1, got {settings.local_steps}; 'swarm' and 'local_sgd' take local steps"
            )
        if settings.relay == "direct" and not graph.is_complete:
            raise UserError(
                "algorithm.relay: 'direct' needs links between all ranks, got topology.graph="
                f"{graph.name}; set topology.graph=complete, or algorithm.relay=tree"
            )

    def start(self) -> None:
        """Make the replica, with no residuals."""
        rank, graph = self.endpoint.rank, self.endpoint.topology
        self._relays = self.settings.relay == "tree" or not graph.is_complete
        subtree_sizes = (
            tree_branches(graph, rank) if self._relays else dict.fromkeys(graph.neighbours(rank), 1)
        )
        self._replica = Replica(self.x, self.codec, subtree_sizes)
        self._links = self._replica.links
        self.versions = np.zeros(self.endpoint.size, np.int64)
        self._resumed = False

    @property
    def required_ranks(self) -> frozenset[int]:
        """All ranks if they relay for each other, or while a resumed run begins; otherwise none."""
        all_required = self._relays or self._resumed
        return frozenset(range(self.endpoint.size) if all_required else ())

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Apply one gradient, send it, and apply the received ones."""
        if self._resumed:
            yield from self._resynchronize()
        self._replica.adopt_writes()
        local.apply()  # 2
        self._replica.add_own()
        self.versions[self.endpoint.rank] = local.local_step
        for link in self._links.values():
            link.has_new_updates = True
        self._receive(local.local_step)  # 3
        self._send(local.local_step)  # 4
        if self._receive(local.local_step):  # 5
            self._send(local.local_step)

    def _receive(self, step: int) -> int:
        """Apply the messages in the inbox; return their number."""
        messages = self.endpoint.inbox.receive()
        for received in messages:
            self._replica.add(received.message, self._onward(received.sender))
            self._advance(step, received)
            self.endpoint.inbox.free(received)
        return len(messages)

    def _onward(self, sender: int) -> list[Link]:
        """Return the links along which updates from `sender` are relayed."""
        return [link for j, link in self._links.items() if j != sender] if self._relays else []

    def _advance(self, step: int, received: ReceivedMessage) -> None:
        """V_i[k] <- V_sender[k] for the gradients in a message."""
        message, sender, own = received.message, received.sender, self.versions
        senders, header = message.trailer[:-1], message.header
        staleness = int(np.abs(own - senders).sum())
        # A direct message has only the sender's own gradients, along a tree all from its side.
        advanced = [sender] if senders[sender] > own[sender] else []
        if self._relays:
            advanced = np.flatnonzero(senders > own).tolist()
        own[advanced] = senders[advanced]
        nbytes = header.nbytes
        for k in advanced or [sender]:  # a message that only flushes residuals advances no version
            self.records.exchange(
                APPLIED,
                step,
                partner=k,
                partner_step=int(own[k]),
                sent_ns=header.time_ns,
                nbytes=nbytes,
                set_staleness=staleness,
            )
            nbytes = 0
        for link in self._onward(sender):
            link.has_new_updates = link.has_new_updates or bool(advanced)
            link.has_residual = True
        if sender in self._links:
            self._links[sender].peer_settled = bool(message.trailer[-1])

    def _send(self, step: int, flush: bool = False) -> None:
        """Send each neighbour its residual if it has new gradients, or if `flush` is set."""
        endpoint = self.endpoint
        self._drop_dead()
        for link in self._links.values():
            if not (link.has_new_updates or (flush and not self._is_up_to_date(link))):
                continue
            send_buffer = endpoint.acquire_send_buffer(link.rank)
            if send_buffer is None:
                continue  # its inbox is full: the residual adds up
            message = send_buffer.message
            self._replica.pack(link, message)
            link.advertised_settled = self._is_settled(link)
            message.trailer[:-1] = self.versions
            message.trailer[-1] = link.advertised_settled
            send(endpoint, send_buffer, step)

    def _is_settled(self, link: Link) -> bool:
        """Return whether `link` has no residual here, nor one in flight to this rank."""
        return not link.has_residual and all(
            other.peer_settled for other in self._onward(link.rank)
        )

    def _is_up_to_date(self, link: Link) -> bool:
        has_unsent = link.has_new_updates or link.has_residual
        return not has_unsent and link.advertised_settled == self._is_settled(link)

    def _drop_dead(self) -> None:
        """Drop the links to the dead; with a tree the run ends instead, by `required_ranks`."""
        living = self.endpoint.neighbours()
        if not self._relays and len(living) < len(self._links):
            for j in set(self._links).difference(living):
                del self._links[j]

    def absorb(self, step: int) -> None:
        """Apply and relay the received updates, and flush all residuals."""
        if self.endpoint.inbox.has_messages:
            self._replica.adopt_writes()
        self._receive(step)
        self._send(step, flush=True)

    @property
    def is_drained(self) -> bool:
        """Whether this replica has every gradient of all ranks, and has relayed them all."""
        endpoint, links = self.endpoint, self._links.values()
        sources = range(endpoint.size) if self._relays else (endpoint.rank, *self._links)
        return (
            all(
                link.peer_settled and link.advertised_settled and self._is_up_to_date(link)
                for link in links
            )
            and all(self.versions[k] >= endpoint.gradients_of(k) for k in sources)
            and endpoint.is_flushed()
        )

    def finalize(self) -> Iterator[Request]:
        """Check that the replica can be drained: a residual that is not finite never becomes 0."""
        if self._resumed:
            yield from self._resynchronize()
        self._replica.check_range(self.endpoint.rank)

    def reset(self, step: int) -> None:
        """Begin with the model as replica; that it is drained, all residuals are 0."""
        self._replica.replace(self.x)

    def resume(self, step: int) -> None:
        """Go on: what the user has written is this replica's alone."""

    def state(self) -> dict[str, np.ndarray]:
        """Return the exact replica, the residuals, and the version vector."""
        self._replica.adopt_writes()
        return {**self._replica.state(), "versions": self.versions}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned."""
        self._replica.load_state(arrays)
        self.versions[:] = arrays["versions"]

    def restart(self, step: int) -> None:
        """Have the next step begin with `_resynchronize`."""
        self.versions[self.endpoint.rank] = step
        self._resumed = True

    def _resynchronize(self) -> Iterator[Request]:
        """x_i <- the mean of all replicas, residuals included; V_i[k] <- number of steps of k."""
        rank, size, elements = self.endpoint.rank, self.endpoint.size, self.x.size
        sums = np.zeros(elements + size)  # of the replicas, and of the version vectors
        sums[:elements] = self._replica.consensus_share()
        sums[elements + rank] = self.versions[rank]
        yield from wait(self.endpoint.allreduce(sums))
        self._replica.replace(sums[:elements] / size)
        self.versions[:] = sums[elements:]
        self._resumed = False
