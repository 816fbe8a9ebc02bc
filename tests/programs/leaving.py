"""Ranks that leave their loops at different steps, with every algorithm, and with two models."""

from __future__ import annotations

import time
from typing import Any

import torch
from mpi4py import MPI

import mpi_dasgd
from mpi_dasgd.errors import Diverged, UserError
from tests.support.mpi_ranks import parallel_assert

COMM = MPI.COMM_WORLD
BATCH = 8
RING = {"topology.graph": "ring"}
RUNS: list[dict[str, Any]] = [
    {"algorithm.name": "allreduce"},
    {"algorithm.name": "local_sgd", "algorithm.local_steps": 4},
    {"algorithm.name": "dpsgd", **RING},
    {"algorithm.name": "dpsgd", "algorithm.local_steps": 3},
    {"algorithm.name": "sgp", "topology.graph": "exponential"},
    {"algorithm.name": "sgp", **RING, "algorithm.local_steps": 2},
    {"algorithm.name": "osgp", **RING, "algorithm.overlap_tau": 2},
    {"algorithm.name": "osgp"},
    {"algorithm.name": "adpsgd"},
    {"algorithm.name": "adpsgd", "algorithm.variant": "pull"},
    {"algorithm.name": "adpsgd", "algorithm.variant": "bipartite", **RING},
    {"algorithm.name": "swarm", "algorithm.local_steps": 2},
    {"algorithm.name": "swarm", "algorithm.variant": "blocking"},
    {"algorithm.name": "swarm", "algorithm.variant": "pull"},
    {"algorithm.name": "dasgd"},
    {"algorithm.name": "dasgd", "algorithm.relay": "tree"},
    {"algorithm.name": "asgd"},
    {"algorithm.name": "asgd", "algorithm.server_trains": True},
    {"algorithm.name": "minibatch"},
    {"algorithm.name": "minibatch", "algorithm.server_trains": True},
    {"algorithm.name": "easgd"},
    {"algorithm.name": "easgd", "algorithm.server_trains": True},
    {"algorithm.name": "alone"},
]


class Run:
    """One model in training, on data of this rank's own."""

    def __init__(self, settings: dict[str, Any], rate: float = 0.05, *, adam: bool = False) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(4, 3)
        self.unused = torch.nn.Parameter(torch.ones(()))  # a decay would show in it
        self.optimizer: torch.optim.Optimizer
        if adam:
            self.model.register_parameter("unused", self.unused)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), rate, weight_decay=0.1)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9)
        self.training = mpi_dasgd.Decentralized(
            self.model, self.optimizer, config={"transport.stall_timeout": 20, **settings}
        )

    def step(self, step: int, samples: int = BATCH) -> None:
        """One step, or on a server one moment of serving."""
        if self.training.computes_gradients:
            self.backward(COMM.rank, step)
            self.training.step(samples)
        else:
            self.training.serve()

    def backward(self, rank: int, step: int) -> None:
        """The gradient of `rank` in `step`, and the rate of a schedule."""
        if isinstance(self.optimizer, torch.optim.SGD):
            self.optimizer.param_groups[0]["lr"] = 0.05 / (1 + 0.1 * step)
        generator = torch.Generator().manual_seed(1000 * rank + step)
        self.optimizer.zero_grad()
        (self.model(torch.randn(BATCH, 4, generator=generator)) - rank).pow(2).mean().backward()

    def weights(self) -> list[float]:
        """All weights."""
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).tolist()


def last_step(rank: int) -> int:
    """Rank 0 leaves before its first step, the last rank stays longest but one."""
    return 0 if rank == 0 else 21 - 6 * (rank % 2)


def leave_at_different_steps(settings: dict[str, Any]) -> None:
    """Each rank has a number of batches of its own; then it closes."""
    run = Run(settings)
    training, own = run.training, last_step(COMM.rank)
    for step in range(1, own + 1):
        run.step(step)
    training.close()
    longest = max(map(last_step, range(COMM.size)))
    workers = [r for r in range(COMM.size) if r in training.algorithm.workers(
        COMM.size, training.algorithm.settings)]  # fmt: skip
    samples = BATCH * sum(map(last_step, workers))
    what = f"{settings} {training.local.local_step} {training.total_samples}"
    parallel_assert(
        COMM, training.local.local_step == (longest if training.lockstep else own), what
    )
    parallel_assert(COMM, training.samples == BATCH * own, what)
    parallel_assert(COMM, training.total_samples == samples, what)
    every = COMM.allgather(run.weights())
    if training.algorithm.capabilities.one_model or training.algorithm.name == "dasgd":
        parallel_assert(COMM, all(weights == every[0] for weights in every), f"{what} {every}")
    if training.algorithm.name == "allreduce":
        parallel_assert(COMM, _close(every[0], _reference()), what)
    training.average()
    mean = COMM.allgather(run.weights())
    parallel_assert(COMM, all(weights == mean[0] for weights in mean), what)


def _reference() -> list[float]:
    """One process: each gradient is that of all ranks that have not left, over their number."""
    run = object.__new__(Run)
    torch.manual_seed(1)
    run.model = torch.nn.Linear(4, 3)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, max(map(last_step, range(COMM.size))) + 1):
        total = [torch.zeros_like(p) for p in run.model.parameters()]
        for rank in range(COMM.size):
            if step <= last_step(rank):
                run.backward(rank, step)
                for sum_, p in zip(total, run.model.parameters(), strict=True):
                    assert p.grad is not None
                    sum_ += p.grad / COMM.size
        for sum_, p in zip(total, run.model.parameters(), strict=True):
            p.grad = sum_
        run.optimizer.step()
    return run.weights()


def _close(a: list[float], b: list[float]) -> bool:
    return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)


def two_models(settings: dict[str, Any]) -> None:
    """As in a GAN: two models in one loop, which ends earlier on some ranks; both orders."""
    for first in (0, 1):
        runs = [Run(settings), Run(settings)]
        for step in range(1, 6 + 7 * ((COMM.rank + first) % 2)):
            for run in runs:
                run.step(step)
        while not all(run.training.computes_gradients for run in runs):  # a server
            for run in runs:
                run.step(0)
            if runs[0].training.total_samples > BATCH:
                break
        for run in (runs[first], runs[1 - first]):
            run.training.close()
        if runs[0].training.lockstep:
            steps = [run.training.local.local_step for run in runs]
            parallel_assert(COMM, steps == [12, 12], f"{settings} {steps}")


def one_model_goes_on_after_the_other() -> None:
    """A rank in the end of one model's training follows the other, and then goes on with it.

    So that its model and its optimizer must be as if it had computed all those steps.
    """
    first, second = (Run({"algorithm.name": "allreduce"}, adam=True) for _ in range(2))
    for step in range(5 if COMM.rank == 0 else 11):
        first.step(step)
        second.step(step)
    first.training.close()
    for step in range(20):
        weights = COMM.allgather(second.weights())
        parallel_assert(COMM, all(w == weights[0] for w in weights), f"step {step}")
        second.step(step)
    steps = second.training.local.local_step
    parallel_assert(COMM, steps == 31, f"{steps} steps")
    parallel_assert(COMM, _close([second.unused.item()], [1.0]), "a parameter that no batch uses")
    second.training.close()


def smaller_batches() -> None:
    """A budget in samples, and one rank's batches are smaller: each does its share."""
    run = Run({"algorithm.name": "allreduce", "budget.samples": 100 * COMM.size})
    batch = BATCH - COMM.rank % 2
    steps = 0
    while not run.training.finished:
        steps += 1
        run.step(steps, batch)
    run.training.close()
    parallel_assert(COMM, steps == -(-100 // batch), f"{steps} steps")
    total = sum(-(-100 // b) * b for b in (BATCH - rank % 2 for rank in range(COMM.size)))
    parallel_assert(
        COMM, run.training.total_samples == total, f"{run.training.total_samples} samples"
    )
    parallel_assert(COMM, run.training.finished and run.training.progress == 1, "closed")


def rank_0_leaves_a_budget_in_seconds() -> None:
    """Rank 0, which declares the last step by its clock, has left its loop before."""
    start = time.monotonic()
    run = Run({"algorithm.name": "dpsgd", **RING, "budget.seconds": 0.4})
    while not run.training.finished and not (COMM.rank == 0 and run.training.local.local_step > 3):
        run.step(1)
        time.sleep(0.002)
    run.training.close()
    steps = COMM.allgather(run.training.local.local_step)
    parallel_assert(COMM, len(set(steps)) == 1 and 0.4 <= time.monotonic() - start < 10, str(steps))
    parallel_assert(COMM, run.training.finished or COMM.rank == 0, "the budget is spent")


def a_server_without_a_budget() -> None:
    """Its workers have loops over their own data; it has served when all of them have left."""
    run = Run({"algorithm.name": "asgd"})
    if run.training.computes_gradients:
        for step in range(4 * COMM.rank):
            run.step(step)
    else:
        while not run.training.finished:
            run.training.serve()
    run.training.close()


def an_interrupted_step_is_made_again() -> None:
    """One rank's gradient is refused, and its loop goes on to the next batch."""
    for name in ("allreduce", "local_sgd", "dpsgd"):
        run = Run({"algorithm.name": name, **(RING if name == "dpsgd" else {})})
        refused = 0
        for step in range(9):
            run.backward(COMM.rank, step)
            if step == 5 and COMM.rank == 1:
                run.model.weight.grad = torch.full((3, 4), float("nan"))
                before = run.weights()
            try:
                run.training.step(BATCH)
            except Diverged:
                refused += 1
                if name != "allreduce":  # it is refused when it is applied
                    torch.nn.utils.vector_to_parameters(
                        torch.tensor(before), run.model.parameters()
                    )
                    run.optimizer.state.clear()
        run.training.close()
        parallel_assert(COMM, refused == (COMM.rank == 1), f"{name}: {refused} refused")
        steps = run.training.local.local_step
        parallel_assert(COMM, steps == 9, f"{name}: {steps} steps")
        finite = bool(torch.isfinite(torch.tensor(run.weights())).all())
        parallel_assert(COMM, finite, name)


def ends_are_final() -> None:
    """Steps and `serve` after the end, or with the budget spent, are refused."""
    run = Run({"algorithm.name": "adpsgd", "budget.samples": BATCH * COMM.size})
    while not run.training.finished:
        run.step(1)
    parallel_assert(COMM, "the budget was spent" in _refusal(run), "budget")
    run.training.finish()
    parallel_assert(COMM, "this rank exchanges no more" in _refusal(run), "finish")
    run.training.close()
    parallel_assert(COMM, "this rank exchanges no more" in _refusal(run), "close")
    run.training.close()
    counted = run.training.finished, run.training.progress, len(run.training.counters) > 5
    parallel_assert(COMM, counted == (True, 1.0, True), str(counted))


def _refusal(run: Run) -> str:
    before = run.weights()
    try:
        run.step(2)
    except UserError as error:
        return str(error) if run.weights() == before else "the model has moved"
    return "not refused"


def one_after_the_other() -> None:
    """The same model and optimizer again; `with`; made in a function and forgotten."""
    run = Run({"algorithm.name": "allreduce"})
    for round_ in range(3):
        with run.training:
            for _ in range(3 + (COMM.rank + round_) % 2):
                run.step(0)  # the rates of the ranks must agree at the next begin
        weights = COMM.allgather(run.weights())
        parallel_assert(COMM, all(w == weights[0] for w in weights), f"round {round_}")
        run.training = mpi_dasgd.Decentralized(run.model, run.optimizer, "allreduce")
    run.training.close()


def main() -> None:
    """All cases, with one report at the end."""
    for settings in RUNS:
        if settings.get("algorithm.variant") != "bipartite" or COMM.size % 2 == 0:
            leave_at_different_steps(settings)
            if settings["algorithm.name"] != "minibatch":  # whose work items nobody else can have
                two_models(settings)
    one_model_goes_on_after_the_other()
    smaller_batches()
    rank_0_leaves_a_budget_in_seconds()
    a_server_without_a_budget()
    an_interrupted_step_is_made_again()
    ends_are_final()
    one_after_the_other()


main()
