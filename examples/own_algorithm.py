"""An algorithm of your own, on the virtual clock; on ranks of MPI, start it with

mpi-dasgd launch -n 4 examples/own_algorithm.py ranks
"""

import sys

import numpy as np
import torch

from mpi_dasgd import Decentralized, algorithms, config
from mpi_dasgd.algorithms.communication import publish_vector
from mpi_dasgd.simulation.simulator import simulate


@algorithms.register
class ClippedGossip(algorithms.AsynchronousAlgorithm):
    """x_i <- x_i + clip(w (x_j - x_i)), j a random neighbour; then x_i <- x_i - eta g_i."""

    name = "clipped_gossip"
    # Neighbours are read, so that it needs no inbox; only the reader moves.
    capabilities = algorithms.Capabilities(uses_inbox=False, preserves_mean=False)
    config_keys = ("mixing_weight",)  # the keys of section `algorithm` that it uses
    request = None  # a read of a neighbour's model that is not complete yet

    def start(self):
        self.restart(0)

    def restart(self, step):
        """Publish the model, unless readers hold all slots."""
        publish_vector(self.endpoint, self.codec, self.x, step)

    def advance(self, local):
        """Average with one neighbour, apply one gradient; a late model is used in a later step."""
        request = self.request or self.endpoint.read(self.rng.choice(self.endpoint.neighbours()))
        self.request = None if request.test() else request
        if self.request is None and request.message is not None:
            move = self.settings.mixing_weight * (request.message.payload - self.x)
            self.x += move * min(1, 1 / max(np.linalg.norm(move), 1e-30))
        local.apply()
        self.restart(local.local_step)


if "ranks" in sys.argv:
    model = torch.nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Decentralized(model, optimizer, "clipped_gossip", total_samples=20_000) as training:
        while not training.finished:
            x = torch.randn(32, 10)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            training.step(len(x))
    print(f"rank {training.rank}: error {(model.weight - 1).abs().max():.1e}")
else:
    keys = ["algorithm.name=clipped_gossip", "task.name=quadratic", "optimizer.options={}"]
    print(simulate(config.load(None, [*keys, "task.batch_size=1", "budget.samples=10_000"])))
