"""The configuration: defaults, overrides, and clear refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest

from mpi_dasgd import algorithms, codecs, config
from mpi_dasgd.config import schema
from mpi_dasgd.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

JOBS = sorted((Path(__file__).parents[2] / "jobs").rglob("*.toml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_jobs_are_valid(job: Path) -> None:
    config.load(job)


def test_described_configuration_is_toml_that_means_the_same() -> None:
    settings = config.load(
        None, ["budget.epochs=3", "optimizer.options={momentum=0.5,nesterov=true}"]
    )
    text = "\n".join(config.describe(settings))
    assert config.Config.model_validate(tomllib.loads(text)) == settings
    assert all(
        "#" in line for line in text.splitlines() if "=" in line
    )  # every key has its meaning


def test_later_overrides_win_and_names_may_look_like_numbers() -> None:
    settings = config.load(None, ["optimizer.lr=1", "optimizer.lr=0.5", "run.name=3"])
    assert settings.optimizer.lr == 0.5
    assert settings.run.name == "3"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.max_atempts=1", ["algorithm.max_atempts", "unknown key", "'max_attempts'"]),
        ("algoritm.max_attempts=1", ["algoritm", "unknown key", "'algorithm'"]),
        ("algorithm.name=adpsdg", ["algorithm.name", "'adpsdg'", "'adpsgd'"]),
        ("task.name=digit", ["task.name", "'digit'", "'digits'"]),
        ("topology.graph=rings", ["topology.graph", "'rings'", "'ring'"]),
        ("optimizer.lr=fast", ["optimizer.lr", "number", "'fast'"]),
        ("optimizer.lr=-1", ["optimizer.lr", "greater than 0", "-1"]),
        ("schedule.warmup=2", ["schedule.warmup", "less than or equal to 1", "2"]),
        ("budget.samples=0", ["budget.samples", "greater than 0"]),
        ("algorithm.mixing_weight=0.9", ["algorithm.mixing_weight", "0.5"]),
        ("codec.threads=0", ["codec.threads: expected auto", "1 or more, got 0"]),
        ("codec.threads=all", ["codec.threads: expected auto", "got 'all'"]),
        ("codec.threads=true", ["codec.threads: expected auto", "got True"]),
        ("codec.threads=1.5", ["codec.threads: expected auto", "got 1.5"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_refusals_name_key_value_and_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        config.load(None, [override])
    assert [word for word in words if word not in str(refused.value)] == []


def test_two_budgets_are_refused_but_one_may_replace_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of samples, epochs, seconds"):
        config.load(None, ["budget={samples=1,seconds=1}"])
    settings = config.load(JOBS[-1], ["budget.seconds=2"])
    assert (settings.budget.seconds, settings.budget.samples, settings.budget.epochs) == (
        2,
        None,
        None,
    )


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: No such file"):
        config.load(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\n")
    with pytest.raises(UserError, match=r"bad\.toml is not TOML"):
        config.load(bad)


def _literals(section: str, key: str) -> set[str]:
    model = schema.Config.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, schema.Section)
    return set(get_args(model.model_fields[key].annotation))


def test_names_in_the_schema_are_those_of_the_code() -> None:
    assert _literals("algorithm", "name") == set(algorithms.ALGORITHMS)
    assert _literals("codec", "name") == {"auto", *codecs.CODECS}
