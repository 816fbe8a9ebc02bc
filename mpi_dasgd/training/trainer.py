"""The training of one rank: batch, gradient, step, record, snapshot, checkpoint."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from mpi_dasgd import algorithms, launch, straggler, world
from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import Diverged, PeerLost, UserError
from mpi_dasgd.storage.checkpoint import Checkpoints
from mpi_dasgd.storage.provenance import provenance
from mpi_dasgd.storage.results import consolidate
from mpi_dasgd.storage.run_directory import prepare
from mpi_dasgd.storage.runfile import RunFile, rank_path
from mpi_dasgd.storage.schema import APPLIED, INITIATED, UNKNOWN_AGE
from mpi_dasgd.tasks import data as tasks
from mpi_dasgd.tasks import models
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.evaluator import Evaluator, Snapshots
from mpi_dasgd.training.finalize import RunOutputs, write_results
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer
from mpi_dasgd.training.progress_line import ProgressLine
from mpi_dasgd.training.state_dict import load_checkpoint, state_dict
from mpi_dasgd.transport.membership import DEPARTED, FAILED

__all__ = ["Trainer", "train"]

_log = logging.getLogger("mpi_dasgd")

_FAREWELL = 0.3  # seconds in which other nodes read that this rank has left, before it is gone


def train(config: Config, environment: world.World) -> int:
    """Train as `config` says. Collective.

    Returns:
        The exit code: 0, or 3 if a rank diverged.

    Raises:
        UserError: on all ranks, for bad input.
    """
    return Trainer(config, environment).run()


class Trainer:
    """One rank's run of the main job."""

    def __init__(self, config: Config, environment: world.World) -> None:
        self.world = environment
        self.rank, self.size = environment.rank, environment.size
        self.directory = config.run_directory
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        torch.manual_seed(config.run.seed * 1000003 + self.rank)
        with environment.collective_errors():
            self.data = tasks.load(
                config.task.name, config.task.model, config.run.seed, config.task.directory
            )
            self.config = config = _with_samples(config, len(self.data.train_x))
            self.model = models.build(config.task.model, self.data.features, self.data.classes)
            self.device = world.choose_device(environment.node_rank, torch.cuda.device_count())
            self.model.to(self.device)
            self.optimizer = _optimizer(config, self.model)
            kind = algorithms.find(config.algorithm.name)
            workers = kind.workers(self.size, config.algorithm)
            self.batches = tasks.Batches(
                self.data,
                config.task.batch_size,
                seed=config.run.seed,
                rank=max(0, self.rank - workers.start),  # a server draws nothing
                ranks=max(1, len(workers)),
                sharded=config.task.data == "sharded",
            )
            self.straggler = straggler.Straggler(
                config.straggler,
                self.rank,
                self.size,
                config.run.seed,
            )
        # Before the directory is touched: what cannot run must not cost an older result.
        self.training = Decentralized(
            self.model,
            self.optimizer,
            config=config,
            environment=environment,
            record=self._record_exchange,
        )
        self.ages: deque[int] = deque(maxlen=1000)  # of the newest exchanges
        self.oldest = 0
        self.accuracy: float | None = None
        self.loss = math.nan
        with environment.collective_errors():
            if self.rank == 0:
                prepare(self.directory, config.run.overwrite, config.run.resume)
        checkpoints = self.directory / "checkpoints"
        resumed = load_checkpoint(self.training, checkpoints) if config.run.resume else None
        self.checkpoints: Checkpoints | None = None
        if config.checkpoint.count:
            self.checkpoints = Checkpoints(
                checkpoints, self.rank, self.size, config.checkpoint.keep, resumed=resumed
            )
        self.snapshots = Snapshots(self.directory / "snapshots")
        self.outputs = RunOutputs(self.directory)
        self.evaluator = Evaluator(self.model, self.training.parameters, self.data)
        self.file = RunFile(
            rank_path(self.directory, self.rank),
            rank=self.rank,
            size=self.size,
            attributes=self._attributes(resumed),
        )
        self.progress = ProgressLine(self.rank == 0)
        environment.comm.Barrier()
        self.training.budget.restart_clock()

    def _attributes(self, resumed: int | None) -> dict[str, Any]:
        config = self.config
        return {
            "config_json": config.model_dump_json(),
            "name": config.run.name,
            "algorithm": config.algorithm.name,
            "codec": self.training.codec.name,
            "topology": config.topology.graph,
            "task": config.task.name,
            "seed": config.run.seed,
            "device": self.device,
            "local_rank": self.world.node_rank,
            "nodes": self.world.nodes,
            "mpi_library": self.world.library,
            "transport": self.training.endpoint.transfer_mode,
            "parameters": self.training.parameters.size,
            "resumed_from_checkpoint": resumed or 0,
            **provenance(),
        }

    def run(self) -> int:
        """Train, evaluate, and write the results."""
        launch.ready()
        try:
            self._train()
            self.training.finish()
            self._milestone(self.config.evaluation.count)
            self._close_file("finished")
            self._end_finished()
        except (Diverged, PeerLost) as error:
            return self._end_failed(error)
        return self._leave()

    def _train(self) -> None:
        training, config = self.training, self.config
        points, saves = config.evaluation.count, config.checkpoint.count
        milestone = int(training.progress * points) + 1
        checkpoint = int(training.progress * saves) + 1
        while not training.finished:
            if training.computes_gradients:
                self._step()
            else:
                training.serve()
            progress = training.progress
            while milestone < points and progress * points >= milestone:
                self._milestone(milestone)
                milestone += 1
            if self.checkpoints and progress < 1.0 and progress * saves >= checkpoint:
                checkpoint = int(progress * saves)
                self.checkpoints.save(checkpoint, *state_dict(training))
                checkpoint += 1
            if self.progress.due:
                self.progress.show(self._line())
        # Not in the loop: the budget may run out between two looks at it, as in an evaluation.
        if self.checkpoints and checkpoint <= saves:
            self.checkpoints.save(saves, *state_dict(training))

    def _step(self) -> None:
        training = self.training
        begun = time.perf_counter()
        x, y = self.batches.batch(training.local.local_step)
        x, y = x.to(self.device), y.to(self.device)
        self.loss = self._gradient(x, y)
        if not math.isfinite(self.loss):
            raise Diverged(
                f"loss of rank {self.rank} became {self.loss} at its step {training.local.local_step + 1}; "
                f"try a smaller optimizer.lr than {self.config.optimizer.lr:g}"
            )
        computed = time.perf_counter() - begun
        self.straggler.slow_down(training.local.local_step, computed, lambda: self._gradient(x, y))
        exchanged, waited = training.exchange_seconds, training.wait_seconds
        spent = time.perf_counter()
        training.step(len(x))
        computed += time.perf_counter() - spent
        exchange, wait = training.exchange_seconds - exchanged, training.wait_seconds - waited
        self.file.append(
            "train", training.local.local_step, training.elapsed, training.samples,
            training.total_samples, self.loss, _rate(training.local), computed - exchange,
            exchange - wait, wait, training.delay, training.delay_factor,
        )  # fmt: skip

    def _gradient(self, x: torch.Tensor, y: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        return loss.item()

    def _record_exchange(self, exchange: ExchangeRecord) -> None:
        age = exchange.step - exchange.partner_step if exchange.partner >= 0 else UNKNOWN_AGE
        self.file.append(
            "exchange", exchange.step, self.training.elapsed, exchange.partner, exchange.kind,
            exchange.partner_step, age, exchange.age_s, exchange.nbytes, exchange.retries,
            exchange.distance, exchange.rejected, exchange.set_staleness,
        )  # fmt: skip
        if exchange.kind in (INITIATED, APPLIED):
            self.ages.append(max(0, age))
            self.oldest = max(self.oldest, age)

    def _milestone(self, milestone: int) -> None:
        """Keep this rank's model for the evaluation of the mean; evaluate it alone if that is wanted."""
        training = self.training
        when = (training.elapsed, training.samples, training.total_samples)
        self.snapshots.save(
            milestone, self.rank, training.parameters, *when, model=training.algorithm.model
        )
        if self.config.evaluation.live:
            loss, accuracy = self.evaluator.evaluate_current()
            self.accuracy = accuracy
            self.file.append(
                "evaluation", milestone, training.local.local_step, *when, loss, accuracy
            )

    def _line(self) -> str:
        training = self.training
        rate = training.total_samples / max(training.elapsed, 1e-9)
        parts = [
            f"{self.config.algorithm.name} {100 * training.progress:3.0f} %",
            f"{rate:,.0f} samples/s",
        ]
        if training.computes_gradients:
            parts.append(f"loss {self.loss:.4f}")
        if self.accuracy is not None:
            parts.append(f"accuracy {100 * self.accuracy:.1f} % (rank {self.rank})")
        if self.ages:
            parts.append(f"staleness {np.mean(self.ages):.1f} steps, at most {self.oldest}")
        counters = training.codec.counters
        if rejected := counters.get("buckets_rejected"):
            share = rejected / (rejected + counters["buckets_decoded"])
            parts.append(f"{100 * share:.2g} % of buckets not decoded")
        return "  ".join(parts)

    def _close_file(self, status: str) -> None:
        training = self.training
        self.file.close(
            status,
            {
                **training.counters,
                "steps": training.local.local_step,
                "samples": training.samples,
                "wall_s": training.elapsed,
                "cpu_s": time.process_time(),
            },
        )

    def _end_finished(self) -> None:
        """See to it that the lowest rank that lives evaluates the mean models and writes the results.

        The others stay until it has: if it dies, the next one does it, from the files of all.

        Raises:
            PeerLost: these files do not suffice.
        """
        self.progress.end(self._line())
        board = self.training.endpoint.membership
        if self.checkpoints:
            self.checkpoints.close(60.0, dead=lambda: tuple(board.dead))
        pause = 0.05
        # Not a barrier: MPICH may crash in one if a rank of another host dies meanwhile.
        while not self.outputs.complete:
            first = next(rank for rank in range(self.size) if rank not in board.dead)
            if self.rank == first:
                self._conclude()
            elif board.status[first] == DEPARTED:
                return
            elif FAILED in board.status:
                raise PeerLost(f"rank {board.status.index(FAILED)} could not write the results")
            else:
                time.sleep(pause)
                pause = min(1.0, 1.25 * pause)
                self.training.endpoint.refresh_membership()

    def _conclude(self) -> None:
        algorithm = self.training.algorithm
        dead = sorted(self.training.endpoint.membership.dead)
        write_results(
            self.directory,
            range(self.size),
            algorithm.model_ranks(self.size),
            self.config.evaluation.count,
            self.model,
            self.training.parameters,
            self.evaluator,
            workers=algorithm.workers(self.size, self.config.algorithm),
            dead=dead,
        )
        print(f"results: {self.directory}/results.h5, mean model: model.h5 beside it", flush=True)
        if dead:
            _log.warning("ranks %s were lost; the others finished the run", dead)

    def _leave(self) -> int:
        """Free the windows, if all ranks live; the results are written."""
        board = self.training.endpoint.membership
        if not board.dead:
            try:
                self.training.close()
            except PeerLost:
                pass
            else:
                return 0
        board.publish_status(DEPARTED)
        sys.stdout.flush()
        time.sleep(_FAREWELL)
        os._exit(0)  # MPI cannot be finalized without the dead

    def _end_failed(self, error: Diverged | PeerLost) -> int:
        """Save what there is; the first rank that failed says why, and writes the results."""
        first = self.training.fail()
        self._close_file("failed" if isinstance(error, Diverged) else "stopped")
        if first:
            _log.error("%s; the record so far is in %s", error, self.directory)
            # Less than the 5 s after which `launch` ends whoever is left, once the others are gone.
            dead = tuple(self.training.endpoint.membership.dead)
            consolidate(self.directory, timeout=4.0, dead=dead)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)  # others may be gone already: nothing collective any more


def _rate(local: TorchLocalOptimizer) -> float:
    """Return the learning rate of a rank's newest gradient, also where a server applies it."""
    used = local.update_seconds > 0  # else the optimizer's rate is still the base rate
    return local.lr if used else local.lr * local.lr_scale


def _with_samples(config: Config, samples_per_epoch: int) -> Config:
    """Turn a budget of epochs into one of samples; without any budget it is ten epochs."""
    budget = config.budget
    if budget.samples is not None or budget.seconds is not None:
        return config
    epochs = 10.0 if budget.epochs is None else budget.epochs
    samples = max(1, round(epochs * samples_per_epoch))
    return config.model_copy(update={"budget": budget.model_copy(update={"samples": samples})})


def _optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    settings = config.optimizer
    kind: Any = getattr(torch.optim, settings.name, None)
    known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if not known:
        raise UserError(
            f"optimizer.name: torch.optim has no optimizer {settings.name!r}; for example SGD, AdamW"
        )
    try:
        return kind(model.parameters(), lr=settings.lr, **settings.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.options: torch.optim.{settings.name} says: {error}") from error
