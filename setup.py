"""Build of the native kernels; everything else about the package is in pyproject.toml.

CMake builds them, or the C++ compiler alone where there is no CMake. If they cannot be built, the
package is installed without them, uses NumPy instead, and reports it
(`mpi_dasgd.kernels.native.status`); with MPI_DASGD_REQUIRE_NATIVE=1 that is an error.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
KERNELS = Path("mpi_dasgd", "kernels")
FLAGS = Path("cmake", "cxx_flags.txt")
SETS = Path("cmake", "instruction_sets.txt")


class NativeError(Exception):
    """Failure to build the library; the message gives the reason."""


class BuildNative(build_ext):
    """Build command of ``mpi_dasgd/kernels/_native.so``, or of ``_native_failure.txt`` instead."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name without a Python tag: the library has plain C functions."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build the library in the build folder."""
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        failure = library.with_name("_native_failure.txt")
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        failure.unlink(missing_ok=True)
        try:
            build_library(library)
        except NativeError as error:
            if os.environ.get("MPI_DASGD_REQUIRE_NATIVE") == "1":
                raise
            failure.write_text(f"{error}\n", encoding="utf-8")
            print(
                f"\n*** WARNING: mpi_dasgd is installed WITHOUT its native kernels: {error}\n"
                "*** Training works, with NumPy in their place, and takes longer.\n",
                file=sys.stderr,
                flush=True,
            )

    def copy_extensions_to_source(self) -> None:
        """Copy what was built beside the sources, for an editable install; remove older results."""
        built = Path(self.build_lib).resolve() / KERNELS
        for name in ("_native.so", "_native_failure.txt"):
            (HERE / KERNELS / name).unlink(
                missing_ok=True
            )  # a library in use is replaced, not overwritten
            if (built / name).exists():
                shutil.copy2(built / name, HERE / KERNELS / name)


def build_library(library: Path) -> None:
    """Compile ``kernels/cpu/*.cpp`` to `library`, with CMake if it is installed.

    Raises:
        NativeError: there is no compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CXX", ""))
    if not compiler:
        compiler = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        name = compiler[0] if compiler else "c++, g++ or clang++"
        raise NativeError(f"there is no C++ compiler ({name})")
    with tempfile.TemporaryDirectory() as build:
        if shutil.which("cmake"):
            run(["cmake", "-S", str(HERE), "-B", build, "-DCMAKE_BUILD_TYPE=Release"])
            run(["cmake", "--build", build, "--parallel"])
            shutil.copy2(Path(build, "_native.so"), library)
        else:
            compile_library(compiler, Path(build), library)


def compile_library(compiler: list[str], build: Path, library: Path) -> None:
    """Do what ``cmake/NativeKernels.cmake`` does, with the compiler alone.

    Raises:
        NativeError: the compiler failed.
    """
    flags = ["-std=c++17", *(HERE / FLAGS).read_text(encoding="utf-8").split(), "-fPIC"]
    sources = sorted((HERE / KERNELS / "cpu").glob("*.cpp"))
    per_set = [source for source in sources if source.stem in ("lattice", "optimizer", "roofline")]
    objects, defines = [], []
    for line in ("base", *(HERE / SETS).read_text(encoding="utf-8").splitlines()):
        name, *set_flags = line.split()
        if set_flags and not compiles(compiler, set_flags, build):
            continue
        defines += [f"-DMPD_HAVE_{name.upper()}"] if set_flags else []
        for source in per_set:
            output = ["-o", str(build / f"{source.stem}_{name}.o")]
            objects.append(output[1])
            run([*compiler, *flags, *set_flags, f"-DMPD_ISA={name}", "-c", str(source), *output])
    others = [str(source) for source in sources if source not in per_set]
    shared = ["-pthread", "-shared", "-o", str(library)]
    run([*compiler, *flags, *defines, *others, *objects, *shared])


def compiles(compiler: list[str], flags: list[str], build: Path) -> bool:
    """Return whether the compiler knows these flags."""
    source = build / "empty.cpp"
    source.write_text("int main() {}\n", encoding="utf-8")
    command = [*compiler, *flags, "-c", str(source), "-o", str(build / "empty.o")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(command: list[str]) -> None:
    """Run a build command and print its output.

    Raises:
        NativeError: it failed.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, flush=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
        raise NativeError(f"`{command[0]}` failed: {' '.join(lines[first : first + 4])}")


setup(
    ext_modules=[
        Extension(
            "mpi_dasgd.kernels._native",
            sources=[],
            # Part of the source distribution, too.
            depends=[
                "CMakeLists.txt",
                "cmake/NativeKernels.cmake",
                str(FLAGS),
                str(SETS),
                *(str(path.relative_to(HERE)) for path in sorted(HERE.glob("jobs/*"))),
                "constraints.txt",
                "Makefile",
            ],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
