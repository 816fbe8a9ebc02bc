"""DASGD: every gradient reaches every replica exactly once (Tosi, Theobald; 2023; arXiv 2309.03754).

Each rank keeps a whole replica x_i, all equal at the start, and goes on without ever waiting:

1. gradient:  g_i at x_i, as the last step left it
2. update:    x_i <- x_i - eta g_i, at once
3. drain:     x_i <- x_i + u for every update u in the inbox
4. send:      to each rank j what it has not got yet; no room in its inbox: more next time
5. drain:     again, so that no gradient starts while updates wait; if something came, step 4 again

Nothing is divided by n: each of the n gradients moves every replica by the whole eta.

As in TensAIR, the authors' system, replicas differ only by the gradients that they do not both have;
their number is S(i, j) = |G_i ^ G_j|. Different from it, and why:

- **What is sent is the update** u = x_after - x_before of the local optimizer; with plain SGD -eta g. So any
  optimizer works and stays local. With momentum the replicas still agree (a linear filter of each rank's
  gradients); Adam is outside the theory, as in TensAIR.
- **Additions are exact**: a replica is a float64 sum on a grid (`replica.py`,
  `codecs/error_feedback.py`). Once all has arrived all replicas are equal bit for bit, also float32 models and with quantized messages.
- **What j must still get is one vector**, `owed`. A message takes out of it what its code can say; the rest,
  and updates that met a full inbox, stay and add up. Memory is bounded, nobody waits, nothing is lost.
- **Sparse graphs**: updates go along the breadth-first spanning tree from rank 0. What arrives from one
  neighbour is owed to all others. A tree has one path between two ranks: exactly once again.
- **One thread**: arrivals are applied between gradients; TensAIR has a thread that applies them at any time.
  The gradient is no other: it belongs to the x_i of its start.

Version vectors: V_i[k] is the number of gradients of rank k in replica i. Links keep the order of a source's
updates, so that the sets are prefixes and S(i, j) = sum_k |V_i[k] - V_j[k]| exactly. Every message has the
sender's V. A gradient counts as applied with the first message that contains it; a rest that its code could
not say is still owed then. Each source that advances is recorded as one APPLIED exchange: partner k,
partner_step V_i[k], staleness S(i, sender) before it.

Local steps H > 1 are refused: V counts gradients, and an update must be one.

A resumed run begins with a sum over all ranks, the only time that anybody waits. Checkpoints are taken at
different moments, so that the replicas as saved would never agree again: all go on from their mean, what was
owed included. A message on its way at the checkpoint counts by the share of the ranks that had it.

A rank that dies: on the complete graph the others drop what they owe it and go on; its last gradients may
have reached some of them only, whose replicas then differ by these. A tree needs all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.base import APPLIED, Algorithm, ExchangeRecord, LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.replica import Link, Replica
from mpi_dasgd.codecs.error_feedback import EXACT_RANGE
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.errors import Diverged, UserError
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
    capabilities = Capabilities(
        preserves_mean=False,  # one update moves the sum of the models n times
        uses_publication=False,
        minimum_ranks=2,
    )
    config_keys = ("relay",)
    codecs = ("none", "bf16", "qsgd8")
    versions: np.ndarray

    @classmethod
    def trailer_words(cls, ranks: int) -> int:
        """The sender's version vector, and whether its receiver is settled then."""
        return ranks + 1

    @classmethod
    def validate_requirements(cls, ranks: int, settings: Settings, graph: Topology) -> None:
        """Refuse local steps, and direct sending without links to all."""
        super().validate_requirements(ranks, settings, graph)
        if settings.local_steps != 1:
            raise UserError(
                "algorithm.local_steps: 'dasgd' sends and counts every gradient by itself, expected 1, "
                f"got {settings.local_steps}; 'swarm' and 'local_sgd' take local steps"
            )
        if settings.relay == "direct" and not graph.is_complete:
            raise UserError(
                "algorithm.relay: 'direct' needs links between all ranks, got topology.graph="
                f"{graph.name}; set topology.graph=complete, or algorithm.relay=tree"
            )

    def start(self) -> None:
        """Make the replica; nobody owes anything."""
        rank, graph = self.endpoint.rank, self.endpoint.topology
        self._relays = self.settings.relay == "tree" or not graph.is_complete
        behind = (
            tree_branches(graph, rank) if self._relays else dict.fromkeys(graph.neighbours(rank), 1)
        )
        self._replica = Replica(self.x, self.codec, behind)
        self._links = self._replica.links
        self.versions = np.zeros(self.endpoint.size, np.int64)
        self._resumed = False

    @property
    def required_ranks(self) -> frozenset[int]:
        """All ranks if they relay for each other, or while a resumed run begins."""
        everyone = self._relays or self._resumed
        return frozenset(range(self.endpoint.size) if everyone else ())

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Apply one gradient, send it, and take in those of others."""
        if self._resumed:
            yield from self._resynchronize()
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
        """Apply what is in the inbox; return how many messages that were."""
        arrivals = self.endpoint.inbox.receive()
        for arrival in arrivals:
            self._replica.add(arrival.message, self._onward(arrival.sender))
            self._advance(step, arrival)
            self.endpoint.inbox.free(arrival)
        return len(arrivals)

    def _onward(self, sender: int) -> list[Link]:
        """Links along which what comes from `sender` goes on."""
        return [link for j, link in self._links.items() if j != sender] if self._relays else []

    def _advance(self, step: int, arrival: ReceivedMessage) -> None:
        """V_i[k] <- V_sender[k] for the gradients that came with a message."""
        message, sender, ours = arrival.message, arrival.sender, self.versions
        theirs, header = message.trailer[:-1], message.header
        staleness = int(np.abs(ours - theirs).sum())
        # Directly only the sender's own gradients come, along a tree all that lie behind it.
        news = [sender] if theirs[sender] > ours[sender] else []
        if self._relays:
            news = np.flatnonzero(theirs > ours).tolist()
        ours[news] = theirs[news]
        age = (self.endpoint.time_ns() - header.time_ns) * 1e-9
        nbytes = header.nbytes
        for k in news or [sender]:  # a rest alone advances nobody
            version = int(ours[k])
            self.record(
                ExchangeRecord(step, k, APPLIED, version, age, nbytes, 0, set_staleness=staleness)
            )
            nbytes = 0
        for link in self._onward(sender):
            link.has_new_updates = link.has_new_updates or bool(news)
            link.has_residual = True
        if sender in self._links:
            self._links[sender].peer_settled = bool(message.trailer[-1])

    def _send(self, step: int, rests: bool = False) -> None:
        """Send to each neighbour what is owed to it, if there are new gradients or `rests` are wanted."""
        endpoint = self.endpoint
        self._drop_dead()
        for link in self._links.values():
            if not (link.has_new_updates or (rests and not self._knows_all(link))):
                continue
            posting = endpoint.acquire_send_buffer(link.rank)
            if posting is None:
                continue  # no room: what is owed adds up
            message = posting.message
            self._replica.pack(link, message)
            link.advertised_settled = self._settled(link)
            message.trailer[:-1] = self.versions
            message.trailer[-1] = link.advertised_settled
            message.stamp(rank=endpoint.rank, step=step, time_ns=endpoint.time_ns())
            endpoint.send(posting)

    def _settled(self, link: Link) -> bool:
        """Whether nothing is owed to `link`, nor to this rank by those for whom it relays."""
        return not link.has_residual and all(
            other.peer_settled for other in self._onward(link.rank)
        )

    def _knows_all(self, link: Link) -> bool:
        return (
            not link.has_new_updates
            and not link.has_residual
            and link.advertised_settled == self._settled(link)
        )

    def _drop_dead(self) -> None:
        """Forget what is owed to the dead; with a tree the run ends instead, as `needs` says."""
        living = self.endpoint.neighbours()
        if not self._relays and len(living) < len(self._links):
            for j in set(self._links).difference(living):
                del self._links[j]

    def absorb(self, step: int) -> None:
        """Apply and relay what has arrived, and send every rest."""
        self._receive(step)
        self._send(step, rests=True)

    @property
    def is_drained(self) -> bool:
        """Whether this replica has every gradient of all ranks, and all has gone on from here."""
        endpoint, links = self.endpoint, self._links.values()
        sources = range(endpoint.size) if self._relays else (endpoint.rank, *self._links)
        return (
            all(
                link.peer_settled and link.advertised_settled and self._knows_all(link)
                for link in links
            )
            and all(self.versions[k] >= endpoint.gradients_of(k) for k in sources)
            and endpoint.is_flushed()
        )

    def finalize(self) -> Iterator[Request]:
        """See that the replica can be drained: what is not finite would be owed for ever."""
        if self._resumed:
            yield from self._resynchronize()
        rank, largest = self.endpoint.rank, self._replica.largest
        if not np.isfinite(largest):
            raise Diverged(
                f"a parameter of rank {rank} became {largest}; try a smaller optimizer.lr"
            )
        if largest >= EXACT_RANGE:
            warnings.warn(
                f"dasgd: a parameter of rank {rank} is {largest:g}; from {EXACT_RANGE:g} on replicas may "
                "differ in their last bits",
                stacklevel=2,
            )

    def state(self) -> dict[str, np.ndarray]:
        """Return the exact replica, what is owed, and the version vector."""
        return {**self._replica.state(), "versions": self.versions}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned."""
        self._replica.load_state(arrays)
        self.versions[:] = arrays["versions"]

    def restart(self, step: int) -> None:
        """Have the next step begin with `_resynchronize`."""
        self.versions[self.endpoint.rank] = step
        self._resumed = True

    def _resynchronize(self) -> Iterator[Request]:
        """x_i <- the mean of all replicas, what is owed included; V_i[k] <- steps of k."""
        rank, size, elements = self.endpoint.rank, self.endpoint.size, self.x.size
        both = np.zeros(elements + size)
        both[:elements] = self._replica.consensus_share()
        both[elements + rank] = self.versions[rank]
        total = self.endpoint.allreduce(both)
        while not total.test():
            yield total
        self._replica.replace(both[:elements] / size)
        self.versions[:] = both[elements:]
        self._resumed = False
