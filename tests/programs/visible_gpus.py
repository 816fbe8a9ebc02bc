"""Which GPU each rank of a Slurm job takes, with files in place of GPUs; in place of Python.

    MPI_DASGD_PYTHON="python visible_gpus.py"

Slurm hides no files here. With FAKE_CGROUP=1 the ranks see its GPUs as within a cgroup: by numbers
that begin with 0.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from mpi_dasgd import world
from mpi_dasgd.device import binding

real = os.environ.get("CUDA_VISIBLE_DEVICES", "")
numbers = real.split(",") if real else []
if os.environ.get("FAKE_CGROUP"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(len(numbers))))
torch.cuda.device_count = lambda: len(numbers)
torch.cuda.set_device = lambda device: None
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=numbers[index])

environment = world.start()
environment.abort_on_exception()


def body() -> int:
    """Choose the devices, print them, and go on as a training would."""
    device = torch.device(binding.device_of_rank(environment))
    gpus = environment.comm.allgather(binding.read_rank_gpu(device))
    if environment.rank == 0:
        hidden = binding.hidden_peers(gpus)
        print(json.dumps([[g.identity, g.device] for g in gpus]), f"hidden={hidden}", flush=True)
    binding.require_own_device(environment, device, may_share=False)
    return 0


sys.exit(environment.run(body))
