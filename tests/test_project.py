"""The files of the project that are not code agree with the code, and with each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import mpi_dasgd
from mpi_dasgd.algorithms import ALGORITHMS
from tests.support.mpi_ranks import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = {".py", ".cpp", ".cu", ".h", ".sbatch", ".toml"}
VARIABLE = re.compile(r"\bMPI_DASGD_[A-Z_]*[A-Z]\b")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("package", "pattern"),
    [
        (package, pattern)
        for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
    ],
)
def test_every_pattern_of_the_package_data_matches_a_file(package: str, pattern: str) -> None:
    assert list(ROOT.joinpath(*package.split(".")).glob(pattern))


def test_the_citation_names_the_version_and_the_four_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == mpi_dasgd.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    cited = {
        identifier["value"].replace("arXiv:", "arXiv ")
        for paper in citation["references"]
        for identifier in paper["identifiers"]
    }
    implemented = {
        re.sub(r".*(arXiv [\d.]+).*", r"\1", ALGORITHMS[name].description.paper)
        for name in ("adpsgd", "swarm", "dasgd", "asgd")
    }
    assert cited == implemented


def test_the_change_log_ends_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert headings[0] == "Unreleased"
    assert headings[1] == mpi_dasgd.__version__


def test_the_licence_is_the_one_that_the_metadata_name() -> None:
    assert PYPROJECT["project"]["license"] == "BSD-3-Clause"
    assert "the mpi_dasgd developers" in (ROOT / "LICENSE").read_text()


def test_every_environment_variable_stands_in_the_table_and_no_other() -> None:
    """`cmake/` is left out: its variables of this prefix are CMake's own."""
    sources = [ROOT / name for name in ("Makefile", "setup.py", ".ci/run")]
    for folder in ("mpi_dasgd", "tests", "jobs", "examples"):
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES]
    read = {name for path in sources for name in VARIABLE.findall(path.read_text())}
    text = (ROOT / "docs" / "environment.md").read_text()
    assert set(re.findall(r"^\| `(MPI_DASGD_\w+)` \|", text, re.M)) == read


def test_the_workflow_only_calls_the_ci_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_hooks_name_no_host_and_run_what_make_installs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    installed = " ".join(PYPROJECT["project"]["optional-dependencies"]["dev"])
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        program = Path(hook["entry"].split()[0])
        assert program.parent == Path(".venv/bin")
        assert re.search(rf"\b{program.name}\b", installed)
