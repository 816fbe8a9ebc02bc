"""Decentralized: turns a PyTorch training loop into a decentralized one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mpi_dasgd import world
from mpi_dasgd.algorithms import RecordSink
from mpi_dasgd.config import Config, load
from mpi_dasgd.errors import DeviceFailed, UserError
from mpi_dasgd.training.budget import Budget
from mpi_dasgd.training.construction import collective_construction
from mpi_dasgd.training.deprecated import renamed_arguments, renamed_attribute
from mpi_dasgd.training.join import make_shadow
from mpi_dasgd.training.learning_rate import LearningRate
from mpi_dasgd.training.optimizer_attachment import Attachment, torch_optimizer
from mpi_dasgd.training.participation import Participation
from mpi_dasgd.training.pause import Pauses
from mpi_dasgd.training.rank_parts import build_rank, start_world
from mpi_dasgd.training.shutdown import leave, workers_have_stopped
from mpi_dasgd.training.stepper import Stepper
from mpi_dasgd.training.waiter import Waiter
from mpi_dasgd.transport.activity import Activity
from mpi_dasgd.transport.membership import RUNNING
from mpi_dasgd.transport.release import await_release

__all__ = ["Decentralized"]


class Decentralized:
    """Averages a model with those of the other ranks after every step, without waiting for them.

    ::

        training = mpi_dasgd.Decentralized(model, optimizer, total_samples=100_000)
        while not training.finished:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            training.step(len(x))       # instead of optimizer.step()
        training.close()

    With `mpi_dasgd.attach` instead, `optimizer.step()` stays. Construction and `close` are
    collective; no other call is, unless it says so.

    Args:
        model: module with parameters on one device, of real or complex floating-point types; those
            of rank 0 are copied to all ranks. They become views of one flat vector, or have master
            values in it (bf16, fp16); see `FlatParameters`.
        optimizer: any torch optimizer over parameters of `model`; its state stays local. Parameters
            of it that the model does not have are exchanged too, and so are those it has that are
            frozen: they may be unfrozen later.
        algorithm, topology, codec: names, as in the configuration.
        total_samples: budget of all ranks together, after which `finished` is true; None: no end.
        seconds: the same in wall time.
        config: configuration of the run, instead of the five arguments above: a `Config`, the path
            of a TOML file, or a mapping of keys (``{"algorithm.name": "swarm"}``).
        environment: what `mpi_dasgd.world.start` returned, if it was called before.
        record: called with every exchange, in their order; for a model on a GPU when the GPU has
            done it (`ExchangeRecord.late_s`), and for the last ones in `finish`, or when an error
            leaves the ``with`` block. A `RecordRing` gets them as rows.
        buffer_rules: what becomes of buffers that differ between ranks, by patterns of their names,
            as in ``{"*.cos_cached": "keep"}``: ``mean``, ``max``, ``rank0`` or ``keep``; by default
            the mean of floating-point ones, and the maximum of integers. See `ModelBuffers`.

    Raises:
        UserError: settings that do not fit each other, the model or the number of ranks, or that
            are not those of all ranks, as the models must be.

    Attributes:
        rank, size: this rank, and the number of ranks.
        config: configuration of the run.
        parameters: parameters of the model, as one vector.
        buffers: its buffers, and parameters that are not in the vector.
        local: optimizer of this rank, with the number of its steps.
        codec: codec of the messages, with its counters.
        device_choice: where the models are exchanged, and why.
        lockstep: whether all ranks make the same number of steps.
        samples_per_step: samples that a step counts, where `optimizer.step` is called; may be set.
    """

    @collective_construction
    @renamed_arguments(graph="topology", samples="total_samples")
    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: str = "adpsgd",
        *,
        topology: str = "complete",
        codec: str = "auto",
        total_samples: int | None = None,
        seconds: float | None = None,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        environment: world.World | None = None,
        record: RecordSink = None,
        buffer_rules: Mapping[str, str] | None = None,
    ) -> None:
        self.world = environment = environment or start_world()
        self.rank, self.size = environment.rank, environment.size
        with environment.collective_errors():
            optimizer = torch_optimizer(optimizer)
            config = _load_config(
                config,
                {
                    "algorithm.name": algorithm,
                    "topology.graph": topology,
                    "codec.name": codec,
                    "budget.samples": total_samples,
                    "budget.seconds": seconds,
                },
            )
            Attachment.require_free(optimizer)
        self.config = config
        parts = build_rank(config, environment, model, optimizer, record, buffer_rules)
        self.parameters, self.local, self.optimizer = parts.parameters, parts.local, optimizer
        self.buffers, self.device_choice = parts.buffers, parts.device_choice
        self.codec, self.endpoint, self.algorithm = parts.codec, parts.endpoint, parts.algorithm
        self.lockstep = parts.run.lockstep
        self.budget = Budget(parts.run, self.endpoint.membership, self.rank)
        self.learning_rate = LearningRate(parts.run, self.endpoint)
        self._waiter = Waiter(self.endpoint, self.algorithm, config.transport.stall_timeout)
        self._shadow = make_shadow(parts, self.budget)
        self._pauses = Pauses(
            environment.comm, parts, self.learning_rate, self._waiter, self._shadow
        )
        self._stepper = Stepper(
            parts, self.budget, self.learning_rate, self._waiter, self._shadow, self._pauses
        )
        self._closed = False
        self._only_serves = not self.algorithm.computes_gradients
        self.samples_per_step = 1
        self._attachment = Attachment(optimizer, self.local, self.algorithm.name)
        with self.parameters.device.current_stream():
            self.algorithm.start()
            self.endpoint.flush()
        await_release(self.endpoint.release)
        environment.comm.Barrier()  # every rank has published before any chooses a partner
        self._participation = Participation(self.endpoint, self.close)
        self.budget.restart_clock()

    @property
    def computes_gradients(self) -> bool:
        """Whether this rank computes gradients and calls `step`; else it calls `serve`."""
        return self.algorithm.computes_gradients

    computes = renamed_attribute("computes", "computes_gradients")

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or this rank serves others and all of them have left."""
        if self.budget.is_spent(self.local.local_step):
            return True
        return self._only_serves and workers_have_stopped(self.endpoint, self.algorithm)

    @property
    def progress(self) -> float:
        """Fraction of the budget that all ranks have used, in [0, 1]; 0 without a budget."""
        return self.budget.progress

    @property
    def samples(self) -> int:
        """Samples that this rank has processed."""
        return self.budget.samples

    @property
    def total_samples(self) -> int:
        """Samples that all ranks have processed, as far as this one has seen."""
        return self.budget.total_samples

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return self.budget.elapsed

    @property
    def exchange_seconds(self) -> float:
        """Time spent in exchanges so far, `wait_seconds` included."""
        return self._stepper.exchange_seconds

    @property
    def delay(self) -> int:
        """Gradients that other ranks computed while this one computed its newest."""
        return self.learning_rate.delay

    @property
    def delay_factor(self) -> float:
        """Factor of `algorithm.delay_adaptive_rule` on the learning rate for `delay`."""
        return self.learning_rate.delay_factor

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting in exchanges so far."""
        return self._waiter.wait_seconds

    def step(self, samples: int = 1, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the gradient and exchange: call it instead of ``optimizer.step()``.

        Args:
            samples: size of the batch whose gradient this is.
            closure: as ``optimizer.step`` takes it: computes the gradient and returns the loss.

        Returns:
            What `closure` returned; None without one.

        Raises:
            UserError: this rank only serves others, training has ended (the budget was spent
                before, or `finish` or `close` was called), or the model can no longer be averaged.
            Diverged: the gradient, or the model after it, is not finite; no other rank has seen it.
                If models are exchanged on a GPU: the model of the step before, which others may
                have averaged with, as the host does not wait for the GPU.
            PeerLost: a rank has failed, or one that this algorithm cannot do without is gone, or
                none makes progress for `transport.stall_timeout` seconds.
        """
        if self._attachment.hooks is None:
            return self._stepper.step(samples, self._attachment.closure(closure))
        self.samples_per_step = samples
        return self.optimizer.step(*(() if closure is None else (closure,)))

    def attach(self, samples_per_step: int = 1) -> None:
        """Make ``optimizer.step()`` a step of this training; see `mpi_dasgd.attach`."""
        self.samples_per_step = samples_per_step
        self._attachment.attach(lambda closure: self._stepper.step(self.samples_per_step, closure))

    def detach(self) -> None:
        """Leave the optimizer as it was before: from now on its steps train this rank alone."""
        self._attachment.detach()

    def serve(self) -> None:
        """Process messages of other ranks for a moment: where `computes_gradients` is false.

        Raises:
            UserError: this rank computes gradients, or training has ended.
            PeerLost: see `step`.
        """
        self._stepper.serve()

    def finish(self) -> None:
        """Stop exchanging, and absorb what others still send: after it no delta is in flight.

        Ranks wait here for each other's last messages, but for no dead rank's. Those that still
        train go on: with an algorithm in lockstep this rank takes part in their steps, without
        gradients, until all have left. Called by `close`.

        Raises:
            Diverged: the model is not finite, and others would average with it.
            PeerLost: see `step`.
        """
        self._pauses.refuse_inside("finish()")
        if self._is_running:
            self._stepper.may_step = False
            with self.parameters.device.current_stream():
                self.parameters.gather()
                leave(
                    self.endpoint,
                    self.algorithm,
                    self._waiter,
                    self._shadow,
                    self.local,
                    self._pauses.take_part,
                )
                self.parameters.scatter()
        self.algorithm.settle()

    @property
    def _is_running(self) -> bool:
        return self.endpoint.membership.status[self.rank] == RUNNING

    def average(self) -> None:
        """Replace the model by the one that is trained: the mean of all ranks' models and buffers.

        With a server it is the server's model, and the mean of the workers' buffers. Collective, at
        any time: in the midst of training the ranks wait for each other until nothing is in flight,
        and go on from the mean.

        Raises:
            UserError: another rank makes another collective call, or is in `close`.
            Diverged: this rank's model is not finite.
            PeerLost: see `step`.
        """
        self._pauses.average()

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Stop all ranks in a ``with`` block, where nothing is in flight. Collective.

        ::

            with training.paused():
                model.load_state_dict(state)    # on every rank

        Training goes on from what is written to the models inside. With a server of gradients
        (`asgd`, `minibatch`) that is the model of rank 0, on all ranks.

        Raises:
            UserError: see `average`; or the models differ, and the algorithm needs one on all.
            PeerLost: see `step`.
        """
        return self._pauses.paused()

    def mean_model(self) -> contextlib.AbstractContextManager[None]:
        """Hold the mean of all models and buffers in a ``with`` block. Collective.

        ::

            with training.mean_model():
                accuracy = evaluate(model)

        Afterwards each rank has its own model again, bit for bit, and training goes on as if
        nothing had been. Where ranks wait for each other's answers (variants `bipartite` and
        `blocking`, `asgd`, `minibatch`) what is in flight is absorbed before; workers of a server
        of gradients go on with its model.

        Raises:
            UserError, PeerLost: see `average`.
        """
        return self._pauses.mean_model()

    @property
    def counters(self) -> dict[str, float]:
        """Counts of transport, codec and algorithm so far; see `mpi_dasgd.transport.counters`.

        On a GPU it waits for the exchanges that were begun, and they are recorded.
        """
        self.algorithm.settle()
        counts = self.endpoint.total_counters().as_dict()
        return {**counts, **self.codec.counters, **self.algorithm.metrics()}

    def fail(self, exit_code: int = 1, error: BaseException | None = None) -> None:
        """Tell the other ranks that this one has failed.

        Args:
            exit_code: exit code with which this process ends, and the others as well, 1 to 255.
            error: what ends it, if known.
        """
        self._participation.fail(exit_code, error)

    def claim_report(self) -> bool:
        """Return True for the first rank that calls: it alone reports why the training failed."""
        return self._participation.claim_report()

    def close(self) -> None:
        """Finish, and free the windows. Collective; later calls do nothing.

        A program that ends with exit code 0 calls it at its end if it has not done so. If a rank
        has died, the others finish without it; their processes then end without finalizing MPI.

        Raises:
            PeerFailed: a rank has failed, or an error has left a ``with`` block of this training.
            PeerLost: see `step`.
        """
        if not self._closed:
            self._pauses.refuse_inside("close()")
            self._participation.refuse_if_failed()
            self._closed = True
            self._attachment.close()
            self.finish()
            self.endpoint.membership.report_activity(Activity.CLOSING)
            self._participation.end()

    def __enter__(self) -> Decentralized:
        return self

    def __exit__(
        self, exc_type: object, exc_value: BaseException | None, traceback: object
    ) -> None:
        if exc_value is None:
            self.close()
        else:
            self._participation.fail_by(exc_value)
            with contextlib.suppress(DeviceFailed):  # its last exchanges are recorded all the same
                self.algorithm.settle()


def _load_config(config: object, settings: Mapping[str, Any]) -> Config:
    """Return `config`, or what it names or describes; without it what `settings` describe."""
    if isinstance(config, Config):
        return config
    if config is None or isinstance(config, (str, Path, Mapping)):
        return load(settings if config is None else config)
    raise UserError(
        "config: expected a mpi_dasgd.config.Config, a mapping of keys or the path of a TOML file, "
        f"got {type(config).__name__}"
    )
