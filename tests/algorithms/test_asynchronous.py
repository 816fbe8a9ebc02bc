"""Which algorithms never wait, by their class; that they do not is in `test_no_deadlock.py`."""

from __future__ import annotations

from mpi_dasgd.algorithms import AsynchronousAlgorithm
from mpi_dasgd.algorithms.catalogue import algorithm_classes

WAITS_AFTER_A_RESTART = {"dasgd"}


def test_the_class_is_asynchronous_where_the_catalogue_says_never() -> None:
    for algorithm_cls in algorithm_classes():
        never_waits = algorithm_cls.description.waits == "never"
        if algorithm_cls.name not in WAITS_AFTER_A_RESTART:
            assert issubclass(algorithm_cls, AsynchronousAlgorithm) == never_waits, algorithm_cls


def test_the_step_of_an_asynchronous_algorithm_is_that_of_the_base_class() -> None:
    for algorithm_cls in algorithm_classes():
        if issubclass(algorithm_cls, AsynchronousAlgorithm):
            assert algorithm_cls.step is AsynchronousAlgorithm.step, algorithm_cls
