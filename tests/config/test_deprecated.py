"""Old names of keys and values are read for one release, and their new names are said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from mpi_dasgd import config
from mpi_dasgd.config import deprecated, schema
from mpi_dasgd.errors import UserError

OLD = """
[algorithm]
order = "average"
tries = 7
weight = 0.25
clients = "free"
[codec]
gamma = 2
[transport]
path = "remote"
silence = 3
[topology]
graph = "edges"
[straggler]
kind = "constant"
mode = "work"
[evaluation]
points = 4
[simulation]
gradients = "off"
precision = "float32"
"""


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    deprecated._warn.cache_clear()


def _check(settings: config.Config) -> None:
    algorithm = settings.algorithm
    assert algorithm.order == "adapt_with_combine"
    assert (algorithm.max_attempts, algorithm.mixing_weight) == (7, 0.25)
    assert algorithm.client_sampling == "idle"
    assert settings.codec.scale_margin == 2
    assert (settings.transport.mode, settings.transport.heartbeat_timeout) == ("rma", 3)
    assert settings.topology.graph == "edge_list"
    assert (settings.straggler.distribution, settings.straggler.mode) == ("constant", "busy")
    assert settings.evaluation.count == 4
    assert settings.simulation.gradients is False
    assert settings.simulation.dtype == "float32"


def _sections() -> dict[str, Any]:
    return config.loader.tomllib.loads(OLD)


def test_a_file_with_old_names_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text(OLD)
    _check(config.load(path))


def test_overrides_with_old_names_are_read() -> None:
    overrides = [
        f"{section}.{key}={value}"
        for section, values in _sections().items()
        for key, value in values.items()
    ]
    _check(config.load(None, overrides))


def test_a_configuration_in_python_and_one_stored_as_json_may_have_old_names() -> None:
    _check(config.Config(**_sections()))
    _check(config.Config.model_validate(_sections()))


def test_each_old_name_is_warned_of_once_and_names_the_new_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "mpi_dasgd"):
        for _ in range(2):
            config.load(None, ["algorithm.tries=7", "transport.path=remote"])
    assert caplog.messages == [
        "algorithm.tries is deprecated and will be removed: "
        "it is now called algorithm.max_attempts",
        "transport.path is deprecated and will be removed: it is now called transport.mode",
        "transport.mode=remote is deprecated and will be removed: "
        "it is now called transport.mode=rma",
    ]


def test_only_rank_0_warns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPI_DASGD_RANKS", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    assert config.load(None, ["algorithm.tries=7"]).algorithm.max_attempts == 7
    assert caplog.messages == []


def test_new_names_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config.load(None, ["algorithm.max_attempts=7", "transport.mode=rma", "topology.graph=ring"])
    assert caplog.messages == []


def test_an_override_replaces_a_value_given_under_the_other_name(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[evaluation]\npoints = 4\n")
    assert config.load(path, ["evaluation.count=5"]).evaluation.count == 5
    path.write_text("[evaluation]\ncount = 4\n")
    assert config.load(path, ["evaluation.points=5"]).evaluation.count == 5


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    path.write_text("[evaluation]\npoints = 4\ncount = 4\n")
    message = "points is the old name of count: give count alone"
    with pytest.raises(UserError, match=f"both.toml: evaluation: {message}"):
        config.load(path)
    with pytest.raises(ValidationError, match=message):
        config.Config.model_validate({"evaluation": {"points": 4, "count": 4}})


@pytest.mark.parametrize(
    ("alias", "order"), [("atc", "adapt_then_combine"), ("awc", "adapt_with_combine")]
)
def test_the_short_names_of_the_orders_stay(
    alias: str, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert config.load(None, [f"algorithm.order={alias}"]).algorithm.order == order
    assert caplog.messages == []


def _choices(annotation: Any) -> set[Any]:
    if annotation is bool:
        return {True, False}
    inner = get_args(annotation)
    return set().union(*map(_choices, inner)) if inner else {annotation}


def test_every_new_name_exists_and_no_old_one() -> None:
    sections = schema.Config.model_fields
    for section, keys in deprecated.KEYS.items():
        fields = sections[section].annotation.model_fields  # type: ignore[union-attr]
        assert set(keys.values()) <= set(fields), section
        assert not set(keys) & set(fields), section
    for section, values in deprecated.VALUES.items():
        fields = sections[section].annotation.model_fields  # type: ignore[union-attr]
        for key, new in values.items():
            choices = _choices(fields[key].annotation)
            assert set(new.values()) <= choices, key
            assert not set(new) & choices, key


def test_sections_know_their_names() -> None:
    for name, field in schema.Config.model_fields.items():
        assert field.annotation.section() == name  # type: ignore[union-attr]


def test_the_printed_configuration_has_new_names_only() -> None:
    text = "\n".join(config.describe(config.load(None, ["algorithm.tries=7"])))
    assert "max_attempts = 7" in text
    printed = _sections_of(text)
    for section, keys in deprecated.KEYS.items():
        assert not set(keys) & printed[section]


def _sections_of(text: str) -> dict[str, set[str]]:
    keys: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
            keys[section] = set()
        elif "=" in line:
            keys[section].add(line.removeprefix("# ").split()[0])
    return keys
