"""Training of one rank: batch, gradient, step, record, snapshot, checkpoint."""

from __future__ import annotations

from typing import Any

from mpi_dasgd import algorithms, launch, world
from mpi_dasgd.config.schema import Config
from mpi_dasgd.device import binding
from mpi_dasgd.errors import Diverged, PeerLost
from mpi_dasgd.storage.checkpoint import Checkpoints
from mpi_dasgd.storage.provenance import provenance
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.storage.run_directory import prepare
from mpi_dasgd.storage.runfile import RunFile, rank_path
from mpi_dasgd.storage.snapshots import Snapshot, Snapshots
from mpi_dasgd.training.agreement import facts_of_config, require_agreement
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.evaluator import Evaluator
from mpi_dasgd.training.progress_line import ProgressLine
from mpi_dasgd.training.recorder import Recorder
from mpi_dasgd.training.run_end import RunEnd
from mpi_dasgd.training.state_dict import load_checkpoint, state_dict
from mpi_dasgd.training.trainer_step import prepare_step
from mpi_dasgd.training.workload import build_workload

__all__ = ["Trainer", "train"]


def train(config: Config, environment: world.World) -> int:
    """Train as `config` says. Collective.

    Returns:
        The exit code: 0, or 3 if a rank diverged.

    Raises:
        UserError: on all ranks, for bad input.
    """
    return Trainer(config, environment).run()


class Trainer:
    """Training of one rank, from an empty run directory to the results. Construction is collective.

    Args:
        config: configuration of the run.
        environment: the ranks, and this one's place among them.

    Raises:
        UserError: on all ranks, for bad input.

    Attributes:
        config: configuration, with a budget of epochs as samples.
        training: training of this rank.
    """

    def __init__(self, config: Config, environment: world.World) -> None:
        rank, size = environment.rank, environment.size
        require_agreement(environment.comm, facts_of_config(config))
        with environment.collective_errors():
            algorithm_cls = algorithms.find(config.algorithm.name)
            self.device = binding.device_of_rank(environment)
            self.workload = build_workload(
                config,
                rank,
                size,
                workers=algorithm_cls.workers(size, config.algorithm),
                device=self.device,
            )
        self.config = config = _with_samples(config, len(self.workload.data.train_x))
        exchanges = RecordRing("exchange")
        # Before the directory is touched: what cannot run must not cost an older result.
        self.training = training = Decentralized(
            self.workload.model,
            self.workload.optimizer,
            config=config,
            environment=environment,
            record=exchanges,
        )
        if rank == 0 and training.device_choice.memory == "ipc":  # of the others a warning has told
            world.print_message(training.device_choice.reason)
        directory = config.run_directory
        with environment.collective_errors():
            if rank == 0:
                prepare(directory, config.run.overwrite, config.run.resume)
        self.checkpoints, resumed = self._open_checkpoints()
        self.snapshots = Snapshots(directory / "snapshots")
        self.evaluator = Evaluator(
            self.workload.model, training.parameters, training.buffers, self.workload.data
        )
        self.run_end = RunEnd(
            training, self.evaluator, directory, config.evaluation.count, self.checkpoints
        )
        file = RunFile(
            rank_path(directory, rank),
            rank=rank,
            size=size,
            attributes=self._attributes(environment, resumed),
            exchanges=exchanges,
        )
        self.recorder = Recorder(file, training)
        self.step = prepare_step(self.device, training, self.workload, self.recorder)
        self.progress_line = ProgressLine(rank == 0)
        environment.comm.Barrier()
        training.budget.restart_clock()
        exchanges.origin = training.budget.origin

    def _open_checkpoints(self) -> tuple[Checkpoints | None, int | None]:
        """Load the newest checkpoint, if the run resumes; return where to save, and its index."""
        training, config = self.training, self.config
        directory = config.run_directory / "checkpoints"
        resumed = load_checkpoint(training, directory) if config.run.resume else None
        if not config.checkpoint.count:
            return None, resumed
        keep = config.checkpoint.keep
        checkpoints = Checkpoints(directory, training.rank, training.size, keep, resumed=resumed)
        return checkpoints, resumed

    def _attributes(self, environment: world.World, resumed: int | None) -> dict[str, Any]:
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
            "local_rank": environment.node_rank,
            "nodes": environment.nodes,
            "mpi_library": environment.library,
            "transport": self.training.endpoint.transfer_mode,
            "device_choice": self.training.device_choice.reason,
            "parameters": self.training.parameters.size,
            "resumed_from_checkpoint": resumed or 0,
            **provenance(),
        }

    def run(self) -> int:
        """Train, evaluate, and write the results; return the exit code."""
        launch.ready()
        try:
            self._train()
            self.training.finish()
            self._pass_milestone(self.config.evaluation.count)
            self.recorder.close("finished")
            self.progress_line.end(self.recorder.progress_text())
            self.run_end.finish()
        except (Diverged, PeerLost) as error:
            self.step.salvage()
            self.run_end.fail(error, self.recorder)
        self.run_end.leave()
        return 0

    def _train(self) -> None:
        training, config, step = self.training, self.config, self.step
        milestones, saves = config.evaluation.count, config.checkpoint.count
        milestone = int(training.progress * milestones) + 1
        checkpoint = int(training.progress * saves) + 1
        computes_gradients = training.computes_gradients
        while not training.finished:
            if computes_gradients:
                step.make()
                progress = training.budget.progress_of_step()
            else:
                training.serve()
                progress = training.progress
            while milestone < milestones and progress * milestones >= milestone:
                self._pass_milestone(milestone)
                milestone += 1
            if self.checkpoints and progress < 1.0 and progress * saves >= checkpoint:
                checkpoint = int(progress * saves)
                step.flush()
                self.checkpoints.save(checkpoint, *state_dict(training))
                checkpoint += 1
            if self.progress_line.due:
                self.progress_line.show(self.recorder.progress_text())
        step.flush()
        # Not in the loop: the budget may run out between two reads of it, as in an evaluation.
        if self.checkpoints and checkpoint <= saves:
            self.checkpoints.save(saves, *state_dict(training))

    def _pass_milestone(self, milestone: int) -> None:
        """Keep this rank's model for the evaluation of the mean; evaluate it now if that is on."""
        training, parameters = self.training, self.training.parameters
        self.step.flush()
        when = (training.elapsed, training.samples, training.total_samples)
        parameters.gather()
        model = parameters.to_host(training.algorithm.model)
        snapshot = Snapshot(model, training.buffers.pack(), *when)
        self.snapshots.save(milestone, training.rank, snapshot)
        if self.config.evaluation.live:
            loss, accuracy = self.evaluator.evaluate_current()
            self.recorder.record_evaluation(milestone, when, loss, accuracy)


def _with_samples(config: Config, samples_per_epoch: int) -> Config:
    """Turn a budget of epochs into one of samples; without any budget it is ten epochs."""
    budget = config.budget
    if budget.samples is not None or budget.seconds is not None:
        return config
    epochs = 10.0 if budget.epochs is None else budget.epochs
    samples = max(1, round(epochs * samples_per_epoch))
    return config.model_copy(update={"budget": budget.model_copy(update={"samples": samples})})
