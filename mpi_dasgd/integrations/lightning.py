"""Lightning's `Trainer` as a decentralized training: a strategy.

    from mpi_dasgd.integrations.lightning import DecentralizedStrategy

    trainer = Trainer(strategy=DecentralizedStrategy(), max_epochs=3)

Start it with ``mpi-dasgd launch -n 4 script.py``, mpirun or srun.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

import torch

from mpi_dasgd.device import binding
from mpi_dasgd.errors import UserError
from mpi_dasgd.integrations.collectives import Collectives, collectives
from mpi_dasgd.integrations.session import Session
from mpi_dasgd.world import expected_ranks

try:
    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.strategies import ParallelStrategy
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        f"lightning cannot be imported ({error}); pip install 'mpi_dasgd[lightning]'"
    ) from error

__all__ = ["DecentralizedStrategy"]

rank_zero_only.rank = expected_ranks()[1]  # for what is printed before there is a Trainer


class MpiRanks(ClusterEnvironment):
    """The ranks of the job, for Lightning: they are started, and there is no process group."""

    def __init__(self, together: Collectives) -> None:
        self._world = together.world
        hosts = together.gather(socket.gethostname())
        self._node_rank = list(dict.fromkeys(hosts)).index(socket.gethostname())

    @property
    def creates_processes_externally(self) -> bool:
        """True: the ranks run already."""
        return True

    @property
    def main_address(self) -> str:
        """Address for a process group: unused."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Port for a process group: unused."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Return False: it is never chosen without the strategy."""
        return False

    def world_size(self) -> int:
        """Return the number of ranks."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Do nothing: the launcher has set it."""

    def global_rank(self) -> int:
        """Return this rank."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the launcher has set it."""

    def local_rank(self) -> int:
        """Return this rank among those of its node."""
        return self._world.node_rank

    def node_rank(self) -> int:
        """Return the number of this node."""
        return self._node_rank


class DecentralizedStrategy(ParallelStrategy):
    """Makes the training of a `lightning.Trainer` a decentralized one.

    Every rank runs the same script. The data are sharded by Lightning, as with DDP; rank 0 prints,
    logs and saves. Whatever is evaluated or saved is the mean of all ranks' models, and after
    ``trainer.fit()`` every rank has it.

    Args:
        algorithm: name of the algorithm.
        accelerator, checkpoint_io, precision_plugin: as of every strategy of Lightning.
        settings: other arguments of `mpi_dasgd.attach`.

    Attributes:
        training: the `Decentralized` of the training that runs or ran last; None before.
    """

    strategy_name = "decentralized"

    def __init__(
        self,
        algorithm: str = "adpsgd",
        *,
        accelerator: pl.accelerators.Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **settings: Any,
    ) -> None:
        self._collectives = collectives()
        super().__init__(
            accelerator=accelerator,
            cluster_environment=MpiRanks(self._collectives),
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.training: Any = None
        self._settings = {"algorithm": algorithm, **settings}
        self._session: Session | None = None
        self._trainer: pl.Trainer | None = None

    def set_world_ranks(self) -> None:
        """Let Lightning know which process is the first one."""
        rank_zero_only.rank = self.global_rank

    @property
    def is_distributed(self) -> bool:
        """Whether there are several ranks: Lightning then shards the data."""
        return self.world_size > 1

    @property
    def root_device(self) -> torch.device:
        """Device of this rank."""
        devices = self.parallel_devices or [torch.device("cpu")]
        number = binding.local_rank()
        return devices[(self.local_rank if number is None else number) % len(devices)]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of shards, and that of this rank."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def model_to_device(self) -> None:
        """Move the model to the device of this rank."""
        assert self.model is not None
        self.model.to(self.root_device)

    # All ranks together

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        self._collectives.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`."""
        return self._collectives.broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean, sum or maximum over the ranks of a tensor; all else unchanged."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        operation = str(reduce_op).rpartition(".")[2].lower()
        operation = {"avg": "mean"}.get(operation, operation)
        return self._collectives.reduce_tensor(tensor, operation)

    def all_gather(
        self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False
    ) -> torch.Tensor:
        """Return the tensors of all ranks, (ranks, ...)."""
        if sync_grads:
            raise UserError(
                "all_gather: sync_grads=True is not possible, as gradients stay on their rank"
            )
        return torch.stack(self._collectives.gather_tensor(tensor))

    # One training

    def setup(self, trainer: pl.Trainer) -> None:
        """Prepare the model and its optimizer, as of every strategy."""
        if self._layer_sync is not None:
            raise UserError(
                "Trainer(sync_batchnorm=True): all ranks would wait for each other in every layer; "
                "leave it out (the statistics are averaged with the models)"
            )
        self._trainer = trainer
        super().setup(trainer)
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, Metric):
                module.distributed_available_fn = lambda: self.world_size > 1
                module.dist_sync_fn = self._gather_metric

    def _gather_metric(self, tensor: torch.Tensor, group: object = None) -> list[torch.Tensor]:
        parts = self._collectives.gather(tensor.cpu())
        return [part.to(tensor.device) for part in parts]

    def on_train_start(self) -> None:
        """Attach the model and its optimizer. Collective."""
        assert self._trainer is not None and self.lightning_module is not None
        with self._collectives.world.collective_errors():
            if len(self.optimizers) != 1:
                raise UserError(
                    f"configure_optimizers: expected one optimizer, got {len(self.optimizers)}; "
                    "use one with several parameter groups"
                )
        settings = dict(self._settings)
        settings.setdefault("samples_per_step", _samples_per_step(self._trainer))
        self._session = Session(self.lightning_module, self.optimizers[0], settings)
        self.training = self._session.training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with this rank's own model; stop if another rank has stopped."""
        if self._session is not None:
            self._session.go_on()
            if self._session.must_stop():
                assert self._trainer is not None
                self._trainer.should_stop = True

    def on_validation_start(self) -> None:
        """Take the mean model. Collective."""
        if self._session is not None:
            self._pause(evaluates=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the mean model. Collective, but for a rank that has failed."""
        if self._session is not None and sys.exc_info()[0] is None:
            self._pause(evaluates=False)
        return super().lightning_module_state_dict()

    def _pause(self, *, evaluates: bool) -> None:
        assert self._session is not None
        if not self._session.pause(evaluates, not evaluates):
            raise UserError(
                "another rank has ended its training, while this one "
                f"{'evaluates' if evaluates else 'saves'}; decide alike on all ranks when to stop "
                "(trainer.strategy.reduce_boolean_decision)"
            )

    def on_train_end(self) -> None:
        """End the training: every rank gets the mean model. Collective."""
        session, self._session = self._session, None
        if session is not None:
            assert self._trainer is not None
            session.end(is_early=self._trainer.should_stop)

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks."""
        session, self._session = self._session, None
        if session is not None:
            session.fail()


def _samples_per_step(trainer: pl.Trainer) -> int:
    batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
    return int(batch_size) * int(trainer.accumulate_grad_batches)
