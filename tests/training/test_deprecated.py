"""Old names of arguments and attributes still work, with one warning that gives the new one."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import pytest

from mpi_dasgd import Decentralized
from mpi_dasgd.training.deprecated import renamed_arguments, renamed_attribute


class Example:
    @renamed_arguments(old="new")
    def __init__(self, first: int, *, new: int = 0) -> None:
        self.first, self.new = first, new

    before = renamed_attribute("before", "new")


def test_new_names_work_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example = Example(1, new=2)
        assert (example.first, example.new) == (1, 2)


def test_an_old_argument_is_taken_with_one_warning_at_the_caller() -> None:
    with pytest.warns(DeprecationWarning, match="argument old is now called new") as caught:
        example = Example(1, old=2)  # type: ignore[call-arg]
    assert (example.first, example.new) == (1, 2)
    assert [warning.filename for warning in caught] == [__file__]


def test_an_old_attribute_is_read_with_one_warning_at_the_caller() -> None:
    with pytest.warns(DeprecationWarning, match="attribute before is now called new") as caught:
        assert Example(1, new=2).before == 2
    assert [warning.filename for warning in caught] == [__file__]


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(TypeError, match="old is the old name of new"):
        Example(1, old=2, new=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(("old", "new"), [("graph", "topology"), ("samples", "total_samples")])
def test_old_arguments_of_decentralized(old: str, new: str) -> None:
    assert new in inspect.signature(Decentralized).parameters
    assert old not in inspect.signature(Decentralized).parameters
    with (
        pytest.warns(DeprecationWarning, match=f"argument {old} is now called {new}"),
        pytest.raises(TypeError, match="model"),  # missing: it goes no further
    ):
        Decentralized(**{old: 1})  # type: ignore[arg-type]


def test_the_old_attribute_of_decentralized() -> None:
    training = object.__new__(Decentralized)
    vars(training)["algorithm"] = SimpleNamespace(computes_gradients=False)
    with pytest.warns(DeprecationWarning, match="computes is now called computes_gradients"):
        assert training.computes is False
