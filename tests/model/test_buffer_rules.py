"""What becomes of elements that differ between ranks."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model import buffer_rules
from mpi_dasgd.model.buffer_rules import (
    checked_rules,
    combine,
    has_nan,
    require_matches,
    require_rule,
    rule_of,
)
from mpi_dasgd.model.tensor_bytes import read_bytes

INF, NAN = float("inf"), float("nan")


def _combined(rule: str, dtype: torch.dtype, *ranks: list[Any]) -> list[Any]:
    tensors = [torch.tensor(values, dtype=dtype) for values in ranks]
    data = combine(rule, dtype, [read_bytes(tensor) for tensor in tensors])
    return torch.from_numpy(data.copy()).view(dtype).tolist() if data.size else []


@pytest.mark.parametrize(
    ("rule", "dtype", "ranks", "expected"),
    [
        ("mean", torch.float32, ([1.0, 2.0], [2.0, 2.0]), [1.5, 2.0]),
        ("mean", torch.float64, ([1.7e308, -1.7e308], [1.5e308, 1.7e308]), [1.6e308, 0.0]),
        ("mean", torch.bfloat16, ([1.0], [2.0], [3.0]), [2.0]),
        ("mean", torch.float8_e4m3fn, ([1.0], [3.0]), [2.0]),
        ("mean", torch.float16, ([65504.0, 1.0], [65504.0, 2.0]), [65504.0, 1.5]),
        ("mean", torch.complex64, ([1 + 1j], [3 - 1j]), [2 + 0j]),
        ("mean", torch.float32, ([-INF, INF], [-INF, 2.0]), [-INF, 2.0]),
        ("mean", torch.float32, ([NAN, 1.0], [4.0, 3.0]), [4.0, 2.0]),
        ("mean", torch.int64, ([2**62 + 1, -1], [2**62 + 3, -2]), [2**62 + 2, -1]),
        ("mean", torch.uint64, ([2**63 + 4], [2**63 + 2]), [2**63 + 3]),
        ("mean", torch.int8, ([127, -128], [125, -126]), [126, -127]),
        ("mean", torch.uint8, ([255], [254], [254]), [254]),
        ("max", torch.int64, ([2**53 + 1], [2**53]), [2**53 + 1]),
        ("max", torch.bool, ([True, False], [False, False]), [True, False]),
        ("max", torch.float32, ([-INF, NAN], [3.0, -2.0]), [3.0, -2.0]),
        ("rank0", torch.float32, ([NAN], [3.0]), [NAN]),
        ("mean", torch.float32, ([], []), []),
    ],
)  # fmt: skip
def test_elements_that_differ_follow_the_rule(
    rule: str, dtype: torch.dtype, ranks: tuple[list[Any], ...], expected: list[Any]
) -> None:
    np.testing.assert_array_equal(_combined(rule, dtype, *ranks), expected)


def test_infinities_of_both_signs_have_no_mean() -> None:
    assert np.isnan(_combined("mean", torch.float32, [INF], [-INF])).all()


def test_equal_bits_stay_whatever_the_rule() -> None:
    quiet = torch.tensor([0x7FC12345, 0xFF800000 - 2**32, 1], dtype=torch.int32).view(torch.float32)
    data = read_bytes(quiet)
    other = data.copy()
    other[8] = 2  # the last element differs
    found = combine("mean", torch.float32, [data, other])
    np.testing.assert_array_equal(found[:8], data[:8])  # the payload of the NaN, and -inf


def test_a_signalling_nan_is_no_maximum() -> None:
    signalling = torch.tensor([0x7FF0_0000_0000_0001] * 2).view(torch.float64)
    ranks = [read_bytes(tensor) for tensor in (torch.tensor([3.0, 1.0]).double(), signalling)]
    ranks.append(read_bytes(torch.tensor([2.0, 2.0]).double()))
    assert combine("max", torch.float64, ranks).view(np.float64).tolist() == [3, 2]


def test_a_long_buffer_is_combined_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_rules, "_BLOCK", 3)
    numbers = list(range(10))
    more = [n + 2 * (n % 4 == 1) for n in numbers]
    means = [n + (n % 4 == 1) for n in numbers]
    assert _combined("mean", torch.float16, numbers, more) == means


def test_nan_is_found_in_what_has_it() -> None:
    assert has_nan(torch.complex64, read_bytes(torch.tensor([1 + 1j, complex(0, NAN)])))
    assert has_nan(torch.float8_e5m2, read_bytes(torch.tensor([NAN]).to(torch.float8_e5m2)))
    assert not has_nan(torch.float32, read_bytes(torch.tensor([INF])))
    assert not has_nan(torch.int32, read_bytes(torch.tensor([-1])))


def test_the_first_pattern_counts_and_the_dtype_else() -> None:
    rules = {"a.*": "keep", "*": "rank0"}
    assert rule_of("a.b", torch.int64, rules) == "keep"
    assert rule_of("b.a", torch.int64, rules) == "rank0"
    defaults = {
        torch.float16: "mean",
        torch.complex64: "mean",
        torch.int8: "max",
        torch.bool: "max",
    }
    assert {dtype: rule_of("a", dtype, {}) for dtype in defaults} == defaults


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*": "average"}, r"buffer_rules: 'average' of '\*' is no rule .*mean, max, rank0, keep"),
        ({"*": "men"}, "did you mean 'mean'"),
        ({3: "mean"}, "of 3 is no rule"),
        ("keep", "expected a mapping .* got str"),
    ],
)
def test_rules_that_are_none_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_rules(rules)


def test_a_name_must_exist_and_a_pattern_should(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="'runing_mean' is no buffer .* mean 'running_mean'"):
        require_matches({"runing_mean": "keep"}, ["running_mean"])
    with caplog.at_level(logging.WARNING):
        require_matches({"*.cache": "keep", "r*": "mean"}, ["running_mean"])
    assert [r.getMessage() for r in caplog.records] == [
        "buffer_rules: '*.cache' matches no buffer of the model"
    ]


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [(torch.complex64, "max"), (torch.bool, "mean"), (torch.bits8, "max"), (torch.int4, "rank0")],
)
def test_a_rule_must_exist_for_the_dtype(dtype: torch.dtype, rule: str) -> None:
    with pytest.raises(UserError, match=rf"no {rule} of {dtype}, which buffer b is.*'b': 'keep'"):
        require_rule("b", dtype, rule)
    require_rule("b", torch.float32, rule)
