"""Decentralized: turns a PyTorch training loop into a decentralized one. The trainer is its first user."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch

from mpi_dasgd import launch, world
from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.algorithms.build import build_run
from mpi_dasgd.config import consistency
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.training import synchronize
from mpi_dasgd.training.flat_parameters import FlatParameters
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer
from mpi_dasgd.transport.endpoint import Request
from mpi_dasgd.transport.membership import FAILED, FINISHED, RUNNING

__all__ = ["Decentralized"]

_log = logging.getLogger("mpi_dasgd")

PEER_CHECK_SECONDS = 0.005  # seconds between two looks at the notices of other ranks


class Decentralized:
    """Averages a model with those of the other ranks after every step, without waiting for them.

    ::

        training = mpi_dasgd.Decentralized(model, optimizer, samples=100_000)
        while not training.finished:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            training.step(len(x))       # instead of optimizer.step()
        training.close()

    Construction and `close` are collective; nothing is in between.

    Args:
        model: float32 parameters on one device; those of rank 0 are copied to all ranks, and
            become views of one flat vector.
        optimizer: any torch optimizer over the parameters of `model`; its state stays local.
        algorithm, graph, codec: names, as in the configuration.
        samples: budget of all ranks together, after which `finished` is true; None for no end.
        seconds: the same in wall time.
        config: all settings at once, instead of the five above.
        environment: what `mpi_dasgd.world.start` returned, if it was called before.
        record: called with every exchange.

    Raises:
        UserError: for settings that do not fit each other or the number of ranks.

    Attributes:
        rank, size: this rank, and how many there are.
        codec: what crosses the wire, and what was decoded so far.
        samples: samples that this rank has processed.
        exchange_seconds, wait_seconds: time spent in exchanges, and waiting in them, so far.
        delay: gradients that other ranks computed while this one computed its newest.
        delay_factor: what the rule for delays made of it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: str = "adpsgd",
        *,
        graph: str = "complete",
        codec: str = "auto",
        samples: int | None = None,
        seconds: float | None = None,
        config: Config | None = None,
        environment: world.World | None = None,
        record: Callable[[ExchangeRecord], None] | None = None,
    ) -> None:
        own_world = environment is None  # else its owner says when set-up is over
        if environment is None:
            launch.setting_up()
            environment = world.start()
            environment.abort_on_exception()
        from mpi_dasgd.transport.rma.endpoint import (
            RmaEndpoint,  # not before: it would start MPI itself
        )

        if config is None:
            config = _configure(algorithm, graph, codec, samples, seconds)
        self.world = environment
        self.rank, self.size = environment.rank, environment.size
        self.optimizer = optimizer
        self.samples = 0
        self.exchange_seconds = self.wait_seconds = 0.0
        self._config = config
        self._closed = False
        with environment.collective_errors():
            parts = build_run(config, self.size)
            self.parameters = FlatParameters(model)
            x = self.parameters.host_view
            self.codec = parts.make_codec(self.rank, x.size, x.dtype)
            for warning in parts.warnings if self.rank == 0 else ():
                _log.warning(warning)
            consistency.check(config, parts.algorithm_cls.name, parts.lockstep)
        synchronize.broadcast_parameters(environment.comm, self.parameters)
        self.local = TorchLocalOptimizer(optimizer, self.parameters)
        transport = config.transport
        self.endpoint = RmaEndpoint(
            environment.comm,
            self.codec.layout,
            parts.topology,
            mode=transport.path,
            publication_slots=parts.publication_slots,
            inbox_slots=parts.inbox_slots,
            progress_interval=transport.progress_interval,
            heartbeat_timeout=transport.silence,
        )
        self.algorithm = parts.make_algorithm(
            self.endpoint, self.codec, x, record or (lambda exchange: None)
        )
        self.algorithm.local = self.local
        self._lockstep, self._max_steps_ahead = parts.lockstep, parts.max_steps_ahead
        self._schedule, self._step_rule = parts.schedule, parts.step_rule
        self.delay, self.delay_factor = 0, 1.0
        self._gradients_seen = 0
        self._begun = self._peers_checked = time.monotonic()
        self._elapsed_before = 0.0
        self.algorithm.start()
        environment.comm.Barrier()  # every rank has published before any looks for a partner
        self.restart_clock()
        if own_world:
            launch.ready()

    def restart_clock(self) -> None:
        """Count `elapsed` from now, or from where an earlier part of the run ended."""
        self._begun = time.monotonic() - self._elapsed_before

    def resume(self, steps: int, samples: int, elapsed: float) -> None:
        """Go on from a checkpoint: counts of the earlier part, and the model that was set, published."""
        self.local.local_step = steps
        self.samples = samples
        self._elapsed_before = elapsed
        self.endpoint.membership.report_samples(samples)
        self.endpoint.report_gradients(steps)
        self.algorithm.restart(steps)

    def resumed_at(self, steps: Sequence[int]) -> None:
        """Have seen the gradients of the earlier part: steps of all ranks, to be called after `resume`.

        Raises:
            UserError: ranks that go in step are at different ones.
        """
        if self._lockstep and len(set(steps)) > 1:
            raise UserError(
                f"run.resume: ranks of {self.algorithm.name!r} go in step, but their checkpoints are of "
                f"steps {list(steps)}; begin anew"
            )
        self.endpoint.membership.gradients[:] = steps
        self._gradients_seen = sum(steps)

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self._begun

    @property
    def total_samples(self) -> int:
        """Samples that all ranks have processed, as far as this one has seen."""
        if self._lockstep:
            return self.samples * self.size
        return self.endpoint.membership.total_samples

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]; 0 if there is no budget."""
        budget = self._config.budget
        if budget.samples is not None:
            return min(1.0, self.total_samples / budget.samples)
        if budget.seconds is not None:
            return min(1.0, self.elapsed / budget.seconds)
        return 0.0

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        if self._timed_lockstep:
            last = self.endpoint.membership.read_last_step(0)
            return 0 < last <= self.local.local_step
        return self.progress >= 1.0

    @property
    def _timed_lockstep(self) -> bool:
        """Whether ranks that go in step must stop by the clock: rank 0 then declares the last step."""
        return self._lockstep and self._config.budget.seconds is not None

    def step(self, samples: int = 1) -> None:
        """Apply the gradient and exchange: call it instead of ``optimizer.step()``.

        Args:
            samples: size of the batch whose gradient this is.

        Raises:
            UserError: this rank only serves others.
            PeerLost: a rank has failed, or one that this algorithm cannot do without is gone.
        """
        if not self.computes_gradients:
            raise UserError(
                f"rank {self.rank} is the server of {self.algorithm.name!r} and takes no gradients: call "
                "training.serve() while training.computes is false, or set algorithm.server_works=true"
            )
        begun = time.perf_counter()
        self.samples += samples
        local = self.local
        local.local_step += 1
        self.endpoint.report_gradients(local.local_step)
        self.delay = max(0, self.endpoint.gradients() - self._gradients_seen - 1)
        local.lr_scale = self._schedule.factor(self.progress)
        if not self.algorithm.capabilities.applies_step_rule:
            self.delay_factor = self._step_rule(self.delay)
            local.lr_scale *= self.delay_factor
        if self._timed_lockstep and self.rank == 0 and self.progress >= 1.0:
            self._declare_last_step()
        updated = local.update_seconds
        for pending in self.algorithm.step(local):
            self._wait(pending)
        self.parameters.copy_to_device()
        self.endpoint.membership.report_samples(self.samples)
        self._gradients_seen = self.endpoint.gradients()
        if time.monotonic() - self._peers_checked > PEER_CHECK_SECONDS:
            self._check_peers()
        self.exchange_seconds += time.perf_counter() - begun - (local.update_seconds - updated)

    def _declare_last_step(self) -> None:
        """Tell all ranks, once, where to stop: beyond what any of them can have begun by now."""
        board, local_steps = self.endpoint.membership, self._config.algorithm.local_steps
        if board.read_last_step(0) == 0:
            exchange = (
                -(-self.local.local_step // local_steps) * local_steps
            )  # the next one of rank 0
            board.publish_last_step(exchange + self._max_steps_ahead)

    def serve(self) -> None:
        """Deal with what other ranks have sent: called instead of `step` where `computes` is false.

        Returns after a moment, or when there was something to do.

        Raises:
            PeerLost: as `step`.
        """
        self.local.lr_scale = self._schedule.factor(self.progress)
        begun = time.perf_counter()
        pause = 0.0
        while (
            not self.algorithm.serve(self.local)
            and time.perf_counter() - begun < PEER_CHECK_SECONDS
        ):
            time.sleep(pause)
            pause = min(2e-4, pause + 1e-5)
        self.parameters.copy_to_device()
        if time.monotonic() - self._peers_checked > PEER_CHECK_SECONDS:
            self._check_peers()

    @property
    def computes_gradients(self) -> bool:
        """Whether this rank computes gradients, or only serves others."""
        return self.algorithm.computes_gradients

    def _check_peers(self) -> None:
        self.endpoint.refresh_membership()
        self._peers_checked = time.monotonic()
        board = self.endpoint.membership
        if FAILED in board.status:
            raise PeerLost(f"rank {board.status.index(FAILED)} has failed")
        if missed := board.dead & self.algorithm.required_ranks:
            raise PeerLost(f"rank {min(missed)} is gone, and {self.algorithm.name} needs it")

    def _wait(self, pending: Request | None, done: Callable[[], bool] | None = None) -> None:
        """Wait politely: give the core away, longer and longer, and mind the other ranks."""
        begun = time.perf_counter()
        pause = 0.0
        done = done or (pending.test if pending is not None else None)
        assert done is not None
        while not done():
            time.sleep(pause)
            waited = time.perf_counter() - begun
            pause = 0.0 if waited < 1e-4 else min(5e-4, waited / 8)
            if waited > PEER_CHECK_SECONDS:
                self._check_peers()
        self.wait_seconds += time.perf_counter() - begun

    def finish(self) -> None:
        """Stop exchanging, and absorb what others still send: after it no delta is on its way.

        Ranks do not wait for each other's training here but for the last messages; a rank that
        has died is not waited for. Called by `close`.
        """
        board = self.endpoint.membership
        if board.status[self.rank] != RUNNING:
            return
        for pending in self.algorithm.finalize():
            self._wait(pending)
        self._wait(None, self._delivered)
        board.publish_status(FINISHED)
        while not (self._quiet() and self.algorithm.is_drained):
            self.algorithm.absorb(self.local.local_step)
            time.sleep(0.001)
            self._check_peers()
        self.algorithm.absorb(self.local.local_step)
        self.parameters.copy_to_device()

    def _delivered(self) -> bool:
        """Whether all that was sent has arrived; absorbs: ranks may wait for each other's room."""
        if self.endpoint.is_flushed():
            return True
        self.algorithm.absorb(self.local.local_step)
        return False

    def _quiet(self) -> bool:
        board = self.endpoint.membership
        return all(
            status != RUNNING or rank in board.dead for rank, status in enumerate(board.status)
        )

    def average(self) -> None:
        """Replace the model by the one that was trained: the mean of all ranks' models, buffers too.

        Of algorithms with a server it is the server's model, and the mean of the workers' buffers.
        Collective.
        """
        ranks = self.algorithm.model_ranks(self.size)
        workers = self.algorithm.workers(self.size, self._config.algorithm)
        synchronize.average_models(self.world.comm, self.parameters, ranks, workers)

    @property
    def counters(self) -> dict[str, float]:
        """What transport, codec and algorithm did so far, by name; see `mpi_dasgd.transport.counters`."""
        counts = dataclasses.asdict(self.endpoint.total_counters())
        return {**counts, **self.codec.counters, **self.algorithm.metrics()}

    def fail(self) -> bool:
        """Tell the other ranks that this one has failed; return whether it is the first to do so."""
        self.endpoint.membership.publish_status(FAILED)
        return self.endpoint.membership.claim_error_report()

    def close(self) -> None:
        """Finish, and free the windows. Collective; later calls do nothing."""
        if not self._closed:
            self._closed = True
            self.finish()
            self.endpoint.close()

    def __enter__(self) -> Decentralized:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.fail()


def _configure(
    algorithm: str, graph: str, codec: str, samples: int | None, seconds: float | None
) -> Config:
    from mpi_dasgd.config import load

    settings: Iterable[tuple[str, Any]] = (
        ("algorithm.name", algorithm),
        ("topology.graph", graph),
        ("codec.name", codec),
        ("budget.samples", samples),
        ("budget.seconds", seconds),
    )
    return load(None, (f"{key}={value}" for key, value in settings if value is not None))
