"""Values of results as JSON can hold them."""

from __future__ import annotations

import json
import math

import numpy as np

from mpi_dasgd.storage.json_values import json_value


def test_types_of_numpy_become_those_of_python() -> None:
    value = {"a": np.float32(0.5), 3: [np.int64(2), (np.bool_(True), "b", None)]}
    expected = {"a": 0.5, "3": [2, [True, "b", None]]}
    assert json_value(value) == expected
    assert json.dumps(json_value(value)) == json.dumps(expected)


def test_what_json_cannot_hold_is_null() -> None:
    assert json_value([math.inf, -math.inf, math.nan, np.float64("nan")]) == [None] * 4


def test_floats_are_rounded_to_significant_digits() -> None:
    assert json_value([1234567.0, 0.00123456, 1234567], digits=4) == [1235000.0, 0.001235, 1234567]
