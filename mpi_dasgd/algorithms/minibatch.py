"""Mini-batch SGD through the server of `asgd`.

Koloskova et al. 2022, section 2, where it is a case of Algorithm 1: C_0 = all; A_t is empty until
the n gradients of a batch have been applied, then A_t = all. The gradients are applied one by one
as they are received, each with the full rate: tau = 0, 1, ..., n-1 within a batch, of mean (n-1)/2.
Momentum and schedule see n gradients where `allreduce` has one.

The factor 1/n: a batch moves the model by eta (g_1 + ... + g_n). `allreduce` moves it by eta times
their mean, so that `minibatch` at eta is `allreduce` at n eta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpi_dasgd.algorithms.asgd import ASGD
from mpi_dasgd.config.schema import AlgorithmConfig, Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.topology import Topology

__all__ = ["MiniBatch"]


class MiniBatch(ASGD):
    """A server that sends its model to all workers once it has received all their gradients."""

    name = "minibatch"
    description = replace(ASGD.description, waits="for the slowest worker of each batch")

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse settings that choose clients: a batch includes them all.

        Raises:
            UserError: says why, and what would work.
        """
        super().validate_requirements(ranks, settings, graph)
        for key, value, expected in (
            ("client_sampling", settings.client_sampling, "idle"),
            ("concurrency", settings.concurrency, None),
            ("delay_adaptive_rule", settings.delay_adaptive_rule, "constant"),
        ):
            if value != expected:
                raise UserError(
                    f"algorithm.{key}: 'minibatch' has one gradient of each worker in every batch, "
                    f"expected {expected or 'no value'}, got {value!r}; asgd takes others"
                )

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Return all warnings but that about sharded data: workers have equal shares of a batch."""
        return super(ASGD, cls).warnings(config)

    def _choose(self, client: int | None) -> Sequence[int]:
        """Return A_t: all workers, once no gradient of the batch is missing."""
        return () if self.meter.in_flight else tuple(self.living)
