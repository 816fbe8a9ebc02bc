"""The rooms of the package: imports run downwards only, and light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT

PACKAGE = ROOT / "mpi_dasgd"

# From the bottom up; a room may import from those before it, and from itself.
FLOORS = [
    {"errors", "__init__"},
    {"config", "topology", "stepsize", "lr_schedule", "delays", "straggler", "parameters"},
    {"launch"},
    {"storage", "kernels", "tasks", "world", "progress"},
    {"codecs", "analysis", "versions", "staleness"},
    {"transport"},
    {"algorithms"},
    {"simulate", "virtual_rank", "trace", "local", "replay", "collective", "simulation"},
    {"decentralized"},
    {"evaluation", "state"},
    {"conclusion"},
    {"trainer", "training"},
    {"doctor", "bench", "studies"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def _imported(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mpi_dasgd":
            rooms |= {alias.name for alias in node.names if alias.name in FLOOR}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpi_dasgd."):
            rooms.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mpi_dasgd.")}
    return rooms


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_run_downwards(path: Path) -> None:
    room = _room(path)
    assert room in FLOOR, f"say in FLOORS where {room} belongs"
    if room == "__init__":
        return  # offers what lies above on first use
    upwards = {other for other in _imported(path) if FLOOR[other] > FLOOR[room]}
    sideways = {other for other in _imported(path) if other != room and FLOOR[other] == FLOOR[room]}
    assert not upwards, f"{room} imports {upwards} from above"
    assert not {(room, other) for other in sideways} & {(o, room) for o in sideways}


def _loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
    )
    return set(done.stdout.split())


def test_the_package_itself_loads_neither_mpi_nor_torch() -> None:
    assert not {"torch", "mpi4py", "cupy", "h5py"} & _loaded_by("import mpi_dasgd")


def test_reports_load_neither_mpi_nor_torch_nor_cuda() -> None:
    loaded = _loaded_by("import mpi_dasgd.cli, mpi_dasgd.analysis.load, mpi_dasgd.analysis.page")
    assert not {"torch", "mpi4py", "cupy"} & loaded


def test_algorithms_and_simulator_load_no_mpi() -> None:
    assert not {"mpi4py", "cupy"} & _loaded_by("import mpi_dasgd.simulation.simulator")
