"""Parameters of lower precision: what their master keeps, and what writes do to it."""

from __future__ import annotations

import pytest
import torch

from mpi_dasgd.model.working_copy import WorkingCopy


def _copy(*values: float, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, WorkingCopy]:
    master = torch.tensor(values)
    return master, WorkingCopy(master, dtype)


def test_changes_below_the_precision_of_the_parameters_add_up_in_the_master() -> None:
    master, copy = _copy(1.0)
    for _ in range(8):  # bf16 has 8 bits: no single one of these would be seen
        master += 0.001
        copy.write()
        copy.take_writes()
        copy.take_update()
    assert float(copy.memory.tensor) == 1.0078125
    assert float(master) == pytest.approx(1.008)


def test_the_optimizer_changes_the_master_by_what_it_changed_the_parameters() -> None:
    master, copy = _copy(1.001, 5.0)
    copy.memory.tensor[0] += 1
    copy.take_update()
    assert master.tolist() == pytest.approx([2.001, 5.0])
    copy.take_update()  # nothing is counted twice
    assert master.tolist() == pytest.approx([2.001, 5.0])


def test_a_written_value_counts_exactly() -> None:
    master, copy = _copy(1.001, 1.002)
    copy.memory.tensor[0] = 0
    copy.take_writes()
    assert master.tolist() == pytest.approx([0, 1.002])
    copy.memory.tensor[1] = float("nan")
    copy.take_writes()
    assert master.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_exchanges_the_parameters_are_those_of_plain_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = torch.randn(500).to(dtype)
    master, copy = torch.zeros(500), WorkingCopy(torch.zeros(500), dtype)
    copy.memory.tensor.copy_(plain)
    copy.take_writes()
    for _ in range(200):
        step = (torch.randn(500) * torch.rand(500) ** 8).to(dtype)
        plain += step
        copy.write()
        copy.memory.tensor += step
        copy.take_update()
    copy.write()
    assert torch.equal(copy.memory.tensor, plain)
    del master
