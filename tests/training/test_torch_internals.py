"""Torch's internals as steps use them, also where a version of torch has them otherwise."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch

from mpi_dasgd.training import torch_internals


def _loaded_anew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("internals_anew", torch_internals.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_one(tensor: Any) -> None:
    """Torch's function before version 2.6."""
    if not isinstance(tensor, torch.Tensor):
        raise RuntimeError("increment_version expect a Tensor as input")
    torch._C._increment_version([tensor])


@pytest.mark.parametrize("is_old", [False, True])
def test_versions_of_all_tensors_are_incremented(
    is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_old:
        monkeypatch.setattr(torch.autograd.graph, "increment_version", _of_one)
    tensors = [torch.zeros(2), torch.zeros(())]
    _loaded_anew().increment_versions(tensors)
    assert [t._version for t in tensors] == [1, 1]


def test_the_compiler_can_be_set_where_torch_lets_it_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(*_: object) -> None:
        raise AssertionError

    before = torch_internals.set_compiler(None)
    assert torch_internals.set_compiler(before) is None
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_eval_frame")
    assert _loaded_anew().set_compiler(compiler) is compiler
