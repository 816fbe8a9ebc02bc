"""The loader of the native library: one of another version is not used."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from mpi_dasgd.kernels import native
from tests.support.mpi_ranks import ROOT

KERNELS = ROOT / "mpi_dasgd" / "kernels"


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no c++")
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "older version of mpi_dasgd: interface 1, expected"),
        ("long long mpd_abi() { return 1000; }", "newer version of mpi_dasgd: interface 1000"),
    ],
)
def test_a_library_of_another_version_is_not_used(tmp_path: Path, source: str, says: str) -> None:
    """As after a pull without a build, which called functions with the wrong arguments."""
    shutil.copy(KERNELS / "native.py", tmp_path)
    code = f'extern "C" {{ const char* mpd_instruction_set() {{ return "old"; }} {source} }}'
    (tmp_path / "old.cpp").write_text(code)
    command = ["c++", "-shared", "-fPIC", "-o", tmp_path / "_native.so", tmp_path / "old.cpp"]
    subprocess.run(command, check=True, timeout=60)
    loader = runpy.run_path(str(tmp_path / "native.py"))
    assert loader["load"]() is None
    assert says in loader["status"]()


def test_python_and_the_library_have_the_same_number() -> None:
    defined = re.search(r"#define MPD_ABI (\d+)", (KERNELS / "layout.h").read_text())
    assert defined is not None and int(defined[1]) == native._ABI
