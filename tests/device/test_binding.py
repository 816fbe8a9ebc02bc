"""Which GPU a rank has: by launcher, alone or shared, and whether it sees its neighbours'."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpi_dasgd.device import binding
from mpi_dasgd.device.binding import RankGpu, choose_device, hidden_peers, local_rank, shared_gpu
from mpi_dasgd.errors import UserError
from tests.support.mpi_ranks import run_ranks


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (0, ["cpu", "cpu", "cpu"]),
        (1, ["cuda:0", "cuda:0", "cuda:0"]),  # each process sees its own
        (2, ["cuda:0", "cuda:1", "cuda:0"]),
    ],
)
def test_device_of_a_rank(visible: int, devices: list[str]) -> None:
    assert [choose_device(rank, visible) for rank in range(3)] == devices


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, None),
        ({"MPI_LOCALRANKID": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        ({"SLURM_LOCALID": "1"}, 1),  # srun
        ({"SLURM_LOCALID": "0", "MPI_LOCALRANKID": "3"}, 3),  # a launcher in a batch script
        ({"SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 3),
        ({"MPI_LOCALRANKID": "", "SLURM_LOCALID": "x"}, None),
    ],
)
def test_number_on_the_node(environment: dict[str, str], number: int | None) -> None:
    assert local_rank(environment) == number


class TwoGpus:
    """A machine of two GPUs, as torch sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: list[str] = []
        for name, value in {
            "device_count": lambda: 2,
            "current_device": lambda: 1,
            "set_device": self.choose,
            "get_device_properties": lambda index: SimpleNamespace(uuid=f"uuid-{index}"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in list(os.environ):
            if name in binding._LOCAL_RANK_VARIABLES:
                monkeypatch.delenv(name)

    def choose(self, device: str) -> None:
        self.chosen.append(device)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> TwoGpus:
    return TwoGpus(monkeypatch)


def test_the_launchers_number_counts_and_else_that_of_mpi(
    gpus: TwoGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = SimpleNamespace(node_rank=2)
    assert binding.device_of_rank(third) == "cuda:0"
    monkeypatch.setenv("MPI_LOCALRANKID", "1")
    assert binding.device_of_rank(third) == "cuda:1"
    assert gpus.chosen == ["cuda:0", "cuda:1"]


def test_a_gpu_that_cannot_be_used(gpus: TwoGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: str) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nand much more")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(UserError, match=r"cuda:0 cannot be used \(CUDA error: all.*busy\): free"):
        binding.device_of_rank(SimpleNamespace(node_rank=0))


def test_the_device_is_chosen_before_mpi_starts_where_there_is_a_driver(
    gpus: TwoGpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MPI_LOCALRANKID", "3")
    monkeypatch.setattr(binding, "_DRIVER_FILES", (str(tmp_path / "nvidiactl"),))
    binding.bind_before_mpi()
    assert not gpus.chosen
    (tmp_path / "nvidiactl").touch()
    binding.bind_before_mpi()
    assert gpus.chosen == ["cuda:1"]
    monkeypatch.delenv("MPI_LOCALRANKID")
    binding.bind_before_mpi()  # a run of one process
    assert gpus.chosen == ["cuda:1"]


def test_what_a_rank_tells_of_its_gpu(gpus: TwoGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    of_cpu = binding.read_rank_gpu(torch.device("cpu"))
    assert (of_cpu.device, of_cpu.identity, of_cpu.visible) == ("cpu", "", 0)
    gpu = binding.read_rank_gpu(torch.device("cuda"), may_share=True)
    assert (gpu.device, gpu.identity, gpu.visible, gpu.setting) == ("cuda:1", "uuid-1", 2, None)
    assert gpu.may_share
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")  # slices of one card
    slices = [binding.read_rank_gpu(torch.device(f"cuda:{i}")).identity for i in (0, 1)]
    assert slices == ["uuid-0 MIG-a", "uuid-1 MIG-b"]

    def no_driver(index: int) -> None:
        raise RuntimeError("no driver")

    for properties in (lambda _: SimpleNamespace(), no_driver):  # torch 2.2 to 2.4 tells no uuid
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        assert "uuid" not in binding.read_rank_gpu(torch.device("cuda:0")).identity


def _gpu(identity: str, **fields: object) -> RankGpu:
    return RankGpu("node", **{"device": "cuda:0", "identity": identity, "visible": 1, **fields})


CPU = RankGpu("node")


def test_shared_gpus() -> None:
    assert shared_gpu([CPU, CPU, _gpu("a"), _gpu("b")]) == ""
    assert shared_gpu([_gpu(""), _gpu("")]) == ""  # unknown
    text = shared_gpu([CPU, _gpu("a"), _gpu("b"), _gpu("a", device="cuda:2"), _gpu("a")])
    assert text == "ranks 1, 3 and 4 have their models on one GPU (cuda:0 of rank 1, on node)"


@pytest.mark.parametrize(
    ("ranks", "are_hidden"),
    [
        ([_gpu("a", setting="0"), _gpu("b", setting="0")], True),  # Slurm, by cgroup
        ([_gpu("a"), _gpu("b")], True),  # containers
        ([CPU, _gpu("a", setting="0"), _gpu("b", setting="0")], True),
        ([_gpu("a", setting="0"), _gpu("b", setting="1")], False),  # nothing but the variable
        ([_gpu("a", setting="GPU-a"), _gpu("b", setting="GPU-b")], False),
        ([_gpu("a", visible=2), _gpu("b", device="cuda:1", visible=2)], False),
        ([_gpu("a"), _gpu("a")], False),  # shared
        ([_gpu("a"), RankGpu("other", "cuda:0", "b", 1)], False),  # nodes of one GPU
        ([_gpu("a")], False),
        ([CPU, CPU], False),
    ],
)
def test_hidden_peers(ranks: list[RankGpu], are_hidden: bool) -> None:
    text = hidden_peers(ranks)
    assert bool(text) == are_hidden
    if are_hidden:
        assert "on node ranks see a GPU each" in text
        assert "--gpus-per-node=4 --ntasks-per-node=4" in text


@pytest.mark.concurrent
def test_models_of_two_ranks_on_one_gpu_are_refused_once() -> None:
    """Of any program, the package's own or the user's; if one of them alone may share, too."""
    done = run_ranks(
        2,
        """
        import sys, torch, mpi_dasgd
        from mpi_dasgd import world
        from mpi_dasgd.device import binding

        w = world.start()
        own = [f"gpu {w.rank}", "the same", "the same", "the same"]
        may_share = [False, True, w.rank == 0, False]
        binding.read_rank_gpu = lambda device, share: binding.RankGpu(
            "node", "cuda:0", own[case], 1, "0", share
        )

        def body():
            global case
            for case, share in enumerate(may_share):
                model = torch.nn.Linear(2, 2)
                config = {"algorithm.name": "adpsgd", "device.share": share}
                optimizer = torch.optim.SGD(model.parameters(), lr=1)
                try:
                    training = mpi_dasgd.Decentralized(
                        model, optimizer, config=config, environment=w
                    )
                    training.close()
                except mpi_dasgd.errors.UserError:
                    print(f"rank {w.rank} refused in case {case}", flush=True)
                    if case == 3:
                        raise
            return 0

        sys.exit(w.run(body))
        """,
        check=False,
    )
    assert done.code == 2
    assert done.stdout.count("refused") == 4
    for rank, case in ((0, 2), (0, 3), (1, 2), (1, 3)):
        assert f"rank {rank} refused in case {case}" in done.stdout
    assert done.stderr.count("error: ranks 0 and 1 have their models on one GPU") == 1
    assert "device.share=true" in done.stderr and "Traceback" not in done.stderr
