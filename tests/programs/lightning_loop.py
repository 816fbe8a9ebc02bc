"""Ranks train small models with `lightning.Trainer`, in the directory that is given."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from mpi4py import MPI
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from mpi_dasgd.errors import UserError
from mpi_dasgd.integrations.lightning import DecentralizedStrategy
from tests.support.mpi_ranks import parallel_assert

warnings.filterwarnings("ignore")
COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
FOLDER = Path(sys.argv[1])
INPUTS = torch.randn(88, 8, generator=torch.Generator().manual_seed(3))
DATA = TensorDataset(INPUTS, INPUTS[:, :3].argmax(1), torch.arange(88))


class Classifier(lightning.LightningModule):
    """A small network that remembers which samples it has seen."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        )
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.optimizers_wanted = optimizers
        self.seen: list[int] = []

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        self.seen += batch[2].tolist()
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)
        self.log("validation_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        made = [
            torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            for _ in range(self.optimizers_wanted)
        ]
        if len(made) > 1:
            self.automatic_optimization = False
            return made
        return made, [torch.optim.lr_scheduler.StepLR(made[0], 1, 0.5)]


def check(condition: object, message: str) -> None:
    parallel_assert(COMM, bool(condition), message)


def weights(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


def check_equal(model: torch.nn.Module, message: str) -> None:
    check(len(set(COMM.allgather(weights(model).tobytes()))) == 1, f"{message}: models differ")


def trainer(strategy: DecentralizedStrategy, **more: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"max_epochs": 3, "accelerator": "cpu", "enable_checkpointing": False}
    return lightning.Trainer(strategy=strategy, **{**quiet, **defaults, **more})


def loaders(batch: int = 8) -> tuple[DataLoader, DataLoader]:
    return DataLoader(DATA, batch, shuffle=True), DataLoader(DATA, 16)


def evaluates_and_saves() -> None:
    """Evaluation and checkpoints of the mean model, files of rank 0 only, resumption, bf16."""
    model, strategy = Classifier(), DecentralizedStrategy(topology="ring")
    best = ModelCheckpoint(FOLDER / "best", monitor="validation_loss", save_last=True)
    run = trainer(
        strategy,
        callbacks=[EarlyStopping("validation_loss", patience=3), best],
        enable_checkpointing=True,
        logger=CSVLogger(str(FOLDER)),
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        precision="bf16-mixed",
    )
    run.fit(model, *loaders())
    check(not torch.distributed.is_initialized(), "there is a process group")
    steps = 3 * (-(-(88 // 8 // SIZE + 1) // 2))
    check(run.global_step == strategy.training.local.local_step == steps, f"{run.global_step}")
    check(run.is_global_zero == (RANK == 0) and run.world_size == SIZE, "numbers")
    every = sorted(x for part in COMM.allgather(model.seen) for x in part)
    check(every == sorted(list(range(88)) * 3), "not each sample once in each epoch")
    check_equal(model, "at the end")
    kept = {name: float(value) for name, value in run.callback_metrics.items() if name != "loss"}
    check(len({str(m) for m in COMM.allgather(kept)}) == 1, f"metrics differ: {kept}")
    check(strategy.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**3, "the scheduler's rate")
    check(len(list((FOLDER / "lightning_logs").iterdir())) == 1, "one log")
    saved = torch.load(FOLDER / "best" / "last.ckpt", weights_only=False)
    check(saved["global_step"] == steps, "last checkpoint")
    last = Classifier()
    last.load_state_dict(saved["state_dict"])
    with torch.no_grad():
        by_hand = (last.network(DATA.tensors[0]).argmax(1) == DATA.tensors[1]).float().mean()
    check(abs(float(by_hand) - kept["accuracy"]) < 0.03, f"{by_hand} is not {kept['accuracy']}")

    resumed = trainer(DecentralizedStrategy(), max_epochs=4)
    resumed.fit(last, *loaders(), ckpt_path=str(FOLDER / "best" / "last.ckpt"))
    check(
        resumed.current_epoch == 4 and resumed.global_step == steps + steps // 3 * 2 - 0, "resume"
    )
    check_equal(last, "resumed")


def equals_one_process() -> None:
    """`allreduce` makes the steps of one process with all batches."""
    torch.manual_seed(RANK)
    model, plain = Classifier(), Classifier()
    plain.load_state_dict(COMM.bcast(model.state_dict()))
    trainer(DecentralizedStrategy("allreduce")).fit(model, DataLoader(DATA, 4))
    (optimizer,), (scheduler,) = plain.configure_optimizers()
    seen = torch.tensor(COMM.allgather(model.seen))  # (ranks, samples)
    for step, rows in enumerate(seen.split(4, 1), 1):
        optimizer.zero_grad()
        plain.loss([tensor[rows.reshape(-1)] for tensor in DATA.tensors]).backward()
        optimizer.step()
        if step % (88 // 4 // SIZE) == 0:
            scheduler.step()
    distance = abs(weights(model) - weights(plain)).max()
    check(distance < 1e-6, f"not the model of one process: {distance}")


class StopsAt(Callback):
    """Ends the training of rank 1."""

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        if RANK == 1 and trainer.global_step == 3:
            trainer.should_stop = True


def one_rank_ends_it_for_all() -> None:
    model = Classifier()
    run = trainer(DecentralizedStrategy(), callbacks=[StopsAt()], max_epochs=4000)
    run.fit(model, loaders(4)[0])
    check(run.global_step < 20000, f"{run.global_step} steps")
    check_equal(model, "stopped early")
    before = weights(model).copy()
    trainer(DecentralizedStrategy()).fit(model, loaders()[0])
    check_equal(model, "second training")
    check(abs(weights(model) - before).max() > 0, "the second training did nothing")


def refuses() -> None:
    for model, more, part in (
        (Classifier(), {"sync_batchnorm": True}, "sync_batchnorm"),
        (Classifier(2), {}, "configure_optimizers"),
    ):
        try:
            trainer(DecentralizedStrategy(), **more).fit(model, loaders()[0])
            message = "nothing"
        except UserError as error:
            message = str(error)
        check(part in message, message)


evaluates_and_saves()
equals_one_process()
one_rank_ends_it_for_all()
refuses()
