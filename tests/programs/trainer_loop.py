"""Ranks train small models with `transformers.Trainer`, in the directory that is given."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mpi_dasgd.errors import UserError
from mpi_dasgd.integrations.huggingface import DecentralizedCallback
from tests.support.mpi_ranks import parallel_assert

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
FOLDER = Path(sys.argv[1])


class Rows(torch.utils.data.Dataset):
    """Rising numbers, and which of them were asked for."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, 20, (count, 8), generator=generator).sort(1).values
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.seen.append(index)
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Linear(torch.nn.Module):
    """A model whose loss is a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (self.layer(input_ids / 20.0) - labels[:, :1] / 20).square().mean()
        return {"loss": loss}


def check(condition: object, message: str) -> None:
    parallel_assert(COMM, bool(condition), message)


def transformer() -> GPT2LMHeadModel:
    set_seed(7)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def trainer(
    model: torch.nn.Module, *callbacks: TrainerCallback, rows: int = 50, **arguments: Any
) -> Trainer:
    defaults = {
        "output_dir": str(FOLDER / "default"),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    settings = TrainingArguments(**{**defaults, **arguments})
    check(not torch.distributed.is_initialized(), "there is a process group")
    return Trainer(
        model, settings, train_dataset=Rows(rows), eval_dataset=Rows(13), callbacks=list(callbacks)
    )


def weights(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


def check_equal(model: torch.nn.Module, message: str) -> None:
    check(len(set(COMM.allgather(weights(model).tobytes()))) == 1, f"{message}: models differ")


def evaluates_and_keeps_the_best() -> None:
    """Evaluation of the mean model, best checkpoint, files of rank 0 only, bf16, a scheduler."""
    folder = FOLDER / "best"
    predictions: list[Any] = []
    run = trainer(
        transformer(),
        EarlyStoppingCallback(2),
        DecentralizedCallback(topology="ring"),
        output_dir=str(folder),
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        bf16=True,
        lr_scheduler_type="cosine",
        gradient_accumulation_steps=2,
    )
    run.compute_metrics = lambda found: predictions.append(found) or {}
    run.train()
    batches = math.ceil(50 / 4 / SIZE)
    steps = 3 * math.ceil(batches / 2)
    check(run.state.global_step == steps, f"{run.state.global_step} of {steps} steps")
    seen = run.train_dataset.seen
    check(set().union(*map(set, COMM.allgather(seen))) == set(range(50)), "not all rows")
    check(len(seen) <= 3 * (50 // SIZE + 4), f"{len(seen)} rows: not sharded")
    check_equal(run.model, "at the end")
    metrics = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    check(len(metrics) == 3 and len({tuple(m) for m in COMM.allgather(metrics)}) == 1, "metrics")
    best = Path(run.state.best_model_checkpoint)
    saved = load_file(best / "model.safetensors")
    for name, value in run.model.state_dict().items():
        check(name == "lm_head.weight" or torch.equal(saved[name], value), f"not the best: {name}")
    evaluated = predictions[int(np.argmin(metrics))]
    whole = run.eval_dataset.rows
    check(np.array_equal(evaluated.label_ids, whole.numpy()), "not each row once, in order")
    with torch.no_grad():
        logits = run.model.eval()(input_ids=whole).logits.numpy()
    distance = abs(logits - evaluated.predictions).max()
    check(distance < 1e-2 * abs(logits).max(), f"another model was evaluated: {distance}")
    files = {file.name for file in best.iterdir()}
    check({"optimizer.pt", "scheduler.pt", "trainer_state.json"} <= files, f"files {files}")
    check({f"rng_state_{rank}.pth" for rank in range(SIZE)} <= files, f"files {files}")


def equals_one_process() -> None:
    """`allreduce` makes the steps of one process with all batches; `resume` goes on with them."""
    rows, rate, epochs = 48, 0.05, 2
    set_seed(3)
    model, plain = Linear(), Linear()
    plain.load_state_dict(COMM.bcast(model.state_dict()))
    data = Rows(rows).rows
    optimizer = torch.optim.SGD(plain.parameters(), lr=rate, momentum=0.9)
    steps = epochs * rows // 4 // SIZE
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(11 + epoch))
        for step, batch in enumerate(data[order].split(4 * SIZE)):
            done = epoch * steps // epochs + step
            optimizer.param_groups[0]["lr"] = rate * (1 - done / steps)  # Trainer's default
            optimizer.zero_grad()
            plain(batch, batch)["loss"].backward()
            optimizer.step()

    def run(model: torch.nn.Module, folder: str = "one", **more: Any) -> Trainer:
        return trainer(
            model,
            DecentralizedCallback("allreduce"),
            rows=rows,
            output_dir=str(FOLDER / folder),
            num_train_epochs=epochs,
            learning_rate=rate,
            optim="sgd",
            optim_args="momentum=0.9",
            max_grad_norm=0.0,
            data_seed=11,
            save_strategy="steps",
            save_steps=4,
            **more,
        )

    start = Linear()
    start.load_state_dict(model.state_dict())
    run(model).train()
    distance = abs(weights(model) - weights(plain)).max()
    check(distance < 1e-6, f"not the model of one process: {distance}")
    resumed = run(start)
    resumed.train(resume_from_checkpoint=str(FOLDER / "one" / "checkpoint-4"))
    distance = abs(weights(resumed.model) - weights(plain)).max()
    check(distance < 1e-6, f"resumed: {distance}")


class StopsAt(TrainerCallback):
    """Ends the training of rank 1."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = RANK == 1 and state.global_step == 3


def one_rank_ends_it_for_all() -> None:
    for algorithm, evaluation in (
        ("adpsgd", "epoch"),
        ("adpsgd", "steps"),
        ("allreduce", "no"),
        ("allreduce", "epoch"),
    ):
        run = trainer(
            Linear(),
            StopsAt(),
            DecentralizedCallback(algorithm),
            rows=4000,
            num_train_epochs=3,
            eval_strategy=evaluation,
            eval_steps=400,
        )
        run.train()
        check(run.state.global_step < 1000, f"{algorithm}: {run.state.global_step} steps")
        check_equal(run.model, f"{algorithm}, {evaluation}")
        before = weights(run.model).copy()
        run.train()  # once more, with the same trainer
        check_equal(run.model, "second training")
        check(abs(weights(run.model) - before).max() > 0, "the second training did nothing")


def refuses() -> None:
    for more, part in (
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ):
        try:
            trainer(Linear(), DecentralizedCallback(), **more)
            message = "nothing"
        except UserError as error:
            message = str(error)
        check(part in message, message)
    try:
        trainer(Linear(), DecentralizedCallback("asgd")).train()
        message = "nothing"
    except UserError as error:
        message = str(error)
    check("server_trains" in message, message)


evaluates_and_keeps_the_best()
equals_one_process()
one_rank_ends_it_for_all()
refuses()
