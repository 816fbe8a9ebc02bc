"""Ranks that were given different runs are told so, all of them, before they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpi_dasgd import config
from mpi_dasgd.algorithms.build import build_run
from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.training.agreement import (
    describe,
    facts_of_config,
    facts_of_model,
    facts_of_optimizer,
    facts_of_run,
    require_agreement,
)
from tests.support.rank_pool import run_pooled
from tests.support.threaded_ranks import errors_on_ranks, on_ranks


def _run(*overrides: str) -> dict[str, Any]:
    return facts_of_run(build_run(config.load(None, overrides), 4))


def _model(module: torch.nn.Module) -> dict[str, Any]:
    flat = FlatParameters(module)
    return facts_of_model(flat, ModelBuffers(module, set(map(id, flat.parameters))))


def _difference(*facts: dict[str, Any]) -> str:
    """What two or more ranks that have `facts` are told, behind the colon and before the remedy."""
    told = errors_on_ranks(
        len(facts), lambda comm: require_agreement(comm, facts[comm.rank]), UserError
    )
    assert told.startswith("the ranks do not agree: ")
    assert told.endswith("; give all ranks the same settings")
    return told.removeprefix("the ranks do not agree: ").rpartition("; give")[0]


def test_ranks_that_agree_exchange_one_hash() -> None:
    facts = {**_run(), **_model(torch.nn.Linear(3, 2))}
    gathered: list[Any] = []

    def program(comm: Any) -> None:
        allgather = comm.allgather
        comm.allgather = lambda value: gathered.append(value) or allgather(value)
        require_agreement(comm, facts)

    on_ranks(3, program)
    assert len(gathered) == 3 and {len(digest) for digest in gathered} == {16}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("topology.graph=ring", 'topology.graph is "complete" on rank 0, "ring" on rank 1'),
        ("codec.name=none", 'codec.name is "lattice8" on rank 0, "none" on rank 1'),
        ("budget.samples=3", "budget.samples is unset on rank 0, 3 on rank 1 (it counts"),
        ("run.seed=2", "run.seed is 1 on rank 0, 2 on rank 1 (the seeds"),
        ("transport.mode=rma", 'transport.mode is "auto" on rank 0, "rma" on rank 1'),
        ("algorithm.mixing_weight=0.4", "algorithm.mixing_weight is 0.5 on rank 0, 0.4 on rank 1"),
        (
            "algorithm.name=allreduce",
            'algorithm.name is "adpsgd" on rank 0, "allreduce" on rank 1; codec.name is "lattice8" '
            'on rank 0, "none" on rank 1',
        ),
    ],
)
def test_settings_that_differ_are_named_with_both_values(override: str, expected: str) -> None:
    assert _difference(_run(), _run(override)).startswith(expected)


def test_settings_of_one_machine_may_differ_and_so_may_words_for_the_same() -> None:
    own = ("codec.threads=2", "task.directory=/data", "transport.progress_interval=0.01")
    assert _run(*own, "codec.name=lattice8") == _run("codec.name=auto")
    assert facts_of_config(config.load(None, own)) == facts_of_config(config.load(None))
    of_train = ("run.name=of_rank_1", "optimizer.lr=2")  # an own loop does not read them
    assert _run(*of_train) == _run()
    different = facts_of_config(config.load(None, of_train))
    assert _difference(facts_of_config(config.load(None)), different) == (
        'run.name is "run" on rank 0, "of_rank_1" on rank 1; optimizer.lr is 0.1 on rank 0, 2.0 on '
        "rank 1"
    )


def test_files_of_edges_are_compared_by_what_they_say(tmp_path: Path) -> None:
    def facts(*edges: str) -> dict[str, Any]:
        file = tmp_path / "edges.txt"
        file.write_text("\n".join(edges))
        return _run("topology.graph=edge_list", f"topology.file={file}")

    first = facts("0 1", "1 2", "2 3")
    assert _difference(first, facts("0 1", "1 2", "1 3")) == (
        "edge 2-3 exists on rank 0 only and edge 1-3 exists on rank 1 only"
    )
    weighted = facts("0 1 0.25", "1 2 0.25", "2 3 0.5"), facts("0 1 0.25", "1 2 0.25", "2 3 0.25")
    assert _difference(*weighted) == "edge 2-3 has weight 0.5 on rank 0, weight 0.25 on rank 1"


def _layers(*names: str) -> torch.nn.ModuleDict:
    shapes = {"left": (3, 2), "right": (1, 4)}
    return torch.nn.ModuleDict({name: torch.nn.Linear(*shapes[name]) for name in names})


def _with_buffer(**buffers: torch.Tensor) -> dict[str, Any]:
    module = torch.nn.Linear(1, 1)
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return _model(module)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            _model(_layers("left", "right")),
            _model(_layers("right", "left")),
            "parameter 1 is left.weight on rank 0, right.weight on rank 1 (layers in another "
            "order, or weights that share memory)",
        ),
        (
            _model(torch.nn.Linear(3, 2)),
            _model(torch.nn.Linear(2, 3)),
            "parameter weight has shape [2, 3], strides [3, 1] on rank 0, shape [3, 2], strides "
            "[2, 1] on rank 1",
        ),
        (
            _model(torch.nn.Linear(3, 2)),
            _model(torch.nn.Linear(3, 2, bias=False)),
            "parameter bias exists on rank 0 only",
        ),
        (
            _model(_layers("left")),
            _model(_layers("left", "right")),
            "parameter right.weight and 1 more exists on rank 1 only",
        ),
        (
            _with_buffer(a=torch.zeros(2)),
            _with_buffer(a=torch.zeros(2).half()),
            'buffer a has dtype "torch.float32" on rank 0, dtype "torch.float16" on rank 1',
        ),
        (
            _with_buffer(a=torch.zeros(2)),
            _with_buffer(a=torch.zeros(3)),
            "buffer a has shape [2] on rank 0, shape [3] on rank 1",
        ),
        (_with_buffer(), _with_buffer(a=torch.zeros(1)), "buffer a exists on rank 1 only"),
        (
            _model(torch.nn.BatchNorm1d(2)),
            _model(torch.nn.BatchNorm1d(2, track_running_stats=False)),
            "buffer num_batches_tracked and 2 more exists on rank 0 only",
        ),
    ],
)
def test_models_that_differ_are_told_by_the_first_name(
    first: dict[str, Any], second: dict[str, Any], expected: str
) -> None:
    assert _difference(first, second) == expected


def test_buffers_in_another_order_are_matched_by_name() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    assert _with_buffer(a=a, b=b)["buffer"] == _with_buffer(b=b, a=a)["buffer"]


def test_optimizers_are_compared_where_all_ranks_apply_the_same_gradients() -> None:
    def facts(name: str, **options: Any) -> dict[str, Any]:
        parameters = [torch.nn.Parameter(torch.ones(1))]
        return facts_of_optimizer(getattr(torch.optim, name)(parameters, **options))

    adam = facts("Adam", lr=0.1)
    assert adam == facts("Adam", lr=0.1, foreach=True)
    assert _difference(adam, facts("Adam", lr=torch.tensor(0.5), betas=(0.5, 0.9))) == (
        "optimizer group 0 has lr 0.1, betas [0.9, 0.999] on rank 0, lr 0.5, betas [0.5, 0.9] on "
        "rank 1"
    )
    assert 'class of the optimizer is "Adam" on rank 0, "AdamW" on rank 1' in _difference(
        adam, facts("AdamW", lr=0.1)
    )


def test_ranks_that_share_a_value_are_listed_together() -> None:
    def program(comm: Any) -> None:
        require_agreement(comm, {"a": 1, "b": [1, 2, 1, 3][comm.rank]})

    assert "b is 1 on ranks 0, 2, 2 on rank 1, 3 on rank 3; give" in errors_on_ranks(
        4, program, UserError
    )


def test_many_differences_are_cut_short() -> None:
    facts = [{str(key): 10 * rank + key for key in range(6)} for rank in range(3)]
    groups = [(range(10 * rank, 10 * rank + 10), each) for rank, each in enumerate(facts)]
    told = describe(json.loads(json.dumps([(list(r), f) for r, f in groups])), others=5)
    assert told.count(" is ") == 4 and "; and 2 more" in told
    assert "ranks 10, 11, 12, 13, 14, 15, 16, 17 and 2 more" in told
    assert "(5 other ranks differ from all of these)" in told


PROGRAM = """
import torch, mpi_dasgd
from mpi_dasgd import world
from mpi_dasgd.errors import UserError
from mpi_dasgd.training import agreement

environment = world.start()
comm = environment.comm
rank, last = comm.rank, comm.rank == comm.size - 1

def told(build, **settings):
    "The message that all ranks get; it is one, and they can go on after it."
    message = "no error"
    try:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        training = mpi_dasgd.Decentralized(model, optimizer, environment=environment, **settings)
        training.close()
    except UserError as error:
        message = str(error)
    messages = comm.allgather(message)
    assert len(set(messages)) == 1, messages
    return message

def linear(): return torch.nn.Linear(3, 2)
def size(): return torch.nn.Linear(3, 2 + last)
def layers():
    names = ["left", "right"] if not last else ["right", "left"]
    return torch.nn.ModuleDict({n: torch.nn.Linear(1, 2 + (n == "left")) for n in names})
def buffers():
    model = linear()
    for name in ["a", "b"][: 1 + last]:
        model.register_buffer(name, torch.zeros(2))
    return model
class Grows(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
def dtype(): return linear().double() if last else linear()

def expect(text, message):
    if rank == 0: print(message)
    assert text in message, message

rate = 0.1
r, n = comm.size - 1, comm.size
others = "rank 0" if n == 2 else "ranks 0, 1"
expect("no error", told(linear))
expect(f'topology.graph is "complete" on {others}, "ring" on rank {r}',
       told(linear, topology="ring" if last else "complete"))
expect('algorithm.name is "adpsgd"', told(linear, algorithm="allreduce" if last else "adpsgd"))
expect('codec.name is "lattice8"', told(linear, codec="none" if last else "lattice8"))
expect(f"budget.samples is 10 on {others}, 11 on rank {r}", told(linear, total_samples=10 + last))
expect(f"parameter weight has shape [2, 3]", told(size))
for rate_of_last, message in ((0.1, "no error"), (0.2, "optimizer group 0 has lr 0.1")):
    rate = rate_of_last if last else 0.1
    expect(message, told(linear, algorithm="allreduce"))
    expect("no error", told(linear, algorithm="local_sgd"))
rate = 0.1
expect(f"parameter 1 is left.weight on {others}, right.weight on rank {r}", told(layers))
expect(f"buffer b exists on rank {r} only", told(buffers))
expect(f"rank {r}", told(dtype))
expect('buffer_rules', told(linear, buffer_rules={"x": "keep"} if last else None))
# a buffer that has grown in training, elsewhere by less
model = Grows()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with mpi_dasgd.Decentralized(model, optimizer, environment=environment) as training:
    model.cache = torch.full((2 + last,), float(rank))
    try:
        training.average()
    except UserError as error:
        expect(f"buffer cache has shape [2] on {others}, shape [3] on rank {r}", str(error))
    else:
        raise AssertionError("averaged")
    training.buffers.rules = {"cache": "keep"}
    training.average()
    assert model.cache.tolist() == [rank] * (2 + last)
# a rank whose optimizer belongs to another training
pairs = [(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in (linear(), linear())]
training = mpi_dasgd.Decentralized(*pairs[0], environment=environment)
try:
    mpi_dasgd.Decentralized(*pairs[not last], environment=environment)
except UserError as error:
    expect(f"or give each its own optimizer (rank {r})", str(error))
else:
    raise AssertionError("made")
training.close()
# a rank whose own settings are refused
expect(f"(rank {r})", told(linear, algorithm="adpsdg" if last else "adpsgd"))
expect(f"(rank {r})", told(linear, algorithm="allreduce", codec="lattice8" if last else "none"))
# another version there
agreement.mpi_dasgd.__version__ += "x" * last
expect("version of mpi_dasgd is", told(linear))
agreement.mpi_dasgd.__version__ = agreement.mpi_dasgd.__version__.rstrip("x")
order = agreement.sys.byteorder
agreement.sys.byteorder = "other" if last else order
expect("byte order is", told(linear))
agreement.sys.byteorder = order
expect("no error", told(linear))
"""


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_end_with_one_message_and_none_waits(ranks: int) -> None:
    run_pooled(ranks, PROGRAM)
