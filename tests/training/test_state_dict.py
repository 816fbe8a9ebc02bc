"""A rank's state goes into a checkpoint and comes back."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.training import state_dict as module
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer


class Rank:
    """A rank with batch norm and a server's center, and the values that were restored to it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        parameters = FlatParameters(self.model)
        buffers = ModelBuffers(self.model, set(map(id, parameters.parameters)))
        self.center = np.full(4, float(seed))
        self.restored: dict[str, Any] = {}
        self.training: Any = SimpleNamespace(
            parameters=parameters, buffers=buffers, optimizer=self.optimizer, samples=40 + seed,
            elapsed=1.5,
            local=TorchLocalOptimizer(self.optimizer, parameters), lockstep=False, rank=0, size=3,
            codec=SimpleNamespace(
                state=lambda: {"seeds": np.arange(2)}, load_state=self._store("codec")
            ),
            algorithm=SimpleNamespace(
                name="easgd", rng=random.Random(seed), absorb=self._store("absorbed"),
                state=lambda: {"center": self.center}, load_state=self._store("algorithm"),
                restart=self._store("restarted at"),
            ),
            budget=SimpleNamespace(resume=lambda *counts: self._store("budget")(counts)),
            endpoint=SimpleNamespace(
                flush=self._flush, release=SimpleNamespace(is_pending=False, flush=self._flush),
                report_gradients=self._store("gradients"),
                membership=SimpleNamespace(
                    report_samples=self._store("samples"), gradients=[0, 0, 0]
                ),
            ),
            learning_rate=SimpleNamespace(gradients_seen=0),
        )  # fmt: skip

    def _flush(self) -> None:
        self.flushed_after = list(self.restored)

    def _store(self, name: str) -> Any:
        return lambda value: self.restored.__setitem__(name, value)

    def train(self) -> torch.Tensor:
        """Make a step on random data; return the model's output."""
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def test_a_rank_goes_on_as_if_it_had_not_stopped() -> None:
    first = Rank(1)
    first.training.local.local_step = 17
    first.train()
    arrays, meta = module.state_dict(first.training)
    arrays = {name: array.copy() for name, array in arrays.items()}
    expected = [first.train() for _ in range(3)]
    draws = first.training.algorithm.rng.random()

    second = Rank(2)
    module._load_state(second.training, arrays, json.loads(json.dumps(meta)))
    assert [second.train() for _ in range(3)] == expected  # model, buffers, moments, and RNG
    assert second.training.algorithm.rng.random() == draws
    assert second.training.local.local_step == 17
    np.testing.assert_array_equal(second.restored.pop("algorithm")["center"], first.center)
    np.testing.assert_array_equal(second.restored.pop("codec")["seeds"], [0, 1])
    assert second.flushed_after[-1] == "restarted at", "what it publishes must reach the others"
    assert second.restored == {
        "budget": (41, 1.5), "samples": 41, "gradients": 17, "restarted at": 17,
    }  # fmt: skip


def test_what_has_arrived_is_absorbed_first() -> None:
    rank = Rank(1)
    rank.training.local.local_step = 3
    module.state_dict(rank.training)
    assert rank.restored == {"absorbed": 3}
    assert rank.flushed_after == ["absorbed"]


def test_gradients_of_the_earlier_part_are_seen() -> None:
    rank = Rank(1)
    module._count_seen_gradients(rank.training, [3, 5, 4])
    assert rank.training.endpoint.membership.gradients == [3, 5, 4]
    assert rank.training.learning_rate.gradients_seen == 12


def test_ranks_in_lockstep_must_resume_at_one_step() -> None:
    rank = Rank(1)
    rank.training.lockstep = True
    module._count_seen_gradients(rank.training, [4, 4, 4])
    with pytest.raises(UserError, match=r"ranks of 'easgd' are in lockstep.* steps \[3, 5, 4\]"):
        module._count_seen_gradients(rank.training, [3, 5, 4])


def test_the_state_of_an_optimizer_in_bf16_comes_back_exactly() -> None:
    def rank() -> Any:
        model = torch.nn.Linear(8, 4, dtype=torch.bfloat16)
        made = Rank(1)
        made.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        made.training.optimizer, made.training.parameters = made.optimizer, FlatParameters(model)
        return made, model

    (first, model), (second, other) = rank(), rank()
    model(torch.randn(8, 8, dtype=torch.bfloat16)).square().mean().backward()
    first.optimizer.step()
    arrays, meta = module.state_dict(first.training)
    module._load_state(second.training, arrays, json.loads(json.dumps(meta)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        buffer = second.optimizer.state[q]["momentum_buffer"]
        assert torch.equal(buffer, first.optimizer.state[p]["momentum_buffer"])
        assert buffer.dtype == torch.bfloat16 and torch.equal(p, q)


def test_estimates_of_a_vector_of_another_length_are_made_anew() -> None:
    loaded: dict[str, np.ndarray] = {}
    codec: Any = SimpleNamespace(
        state=lambda: {"estimate": np.ones(3, np.float32), "messages": np.array([2])},
        load_state=loaded.update,
    )
    module._load_codec(codec, {"estimate": np.full(2, 7, np.float32), "messages": np.array([5])})
    assert loaded["messages"].tolist() == [5]
    assert loaded["estimate"].tolist() == [0, 0, 0]
    module._load_codec(codec, {"estimate": np.full(3, 7, np.float32), "messages": np.array([5])})
    assert loaded["estimate"].tolist() == [7, 7, 7]


def test_a_checkpoint_has_the_random_generator_of_the_gpu(monkeypatch: Any) -> None:
    state = torch.arange(16, dtype=torch.uint8)
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: seen.append(args))
    on_gpu: Any = SimpleNamespace(flat=SimpleNamespace(is_cuda=True, device="cuda:1"))
    on_cpu: Any = SimpleNamespace(flat=SimpleNamespace(is_cuda=False))
    arrays = module._random_states(on_gpu)
    module._set_random_states(on_cpu, arrays)
    assert not seen
    module._set_random_states(on_gpu, module._random_states(on_cpu))  # one of a CPU has none
    assert not seen
    module._set_random_states(on_gpu, arrays)
    assert torch.equal(seen[0][0], state) and seen[0][1] == "cuda:1"
