"""The delay-adaptive step rule."""

from __future__ import annotations

import pytest

from mpi_dasgd.staleness.step_rule import delay_adaptive


def test_delay_adaptive_divides_by_the_delay() -> None:
    assert [delay_adaptive(d, 16) for d in (0, 1, 16)] == [1.0, 1.0, 1.0]
    assert [delay_adaptive(d, 16) for d in (17, 32)] == pytest.approx([1 / 17, 1 / 32])
    assert delay_adaptive(0, 0) == 1.0
    assert delay_adaptive(1, 0) == 1.0


def test_delay_adaptive_with_a_cap() -> None:
    assert [delay_adaptive(d, 4, cap=8.0) for d in (4, 5, 8, 16)] == [1.0, 1.0, 1.0, 0.5]
    assert delay_adaptive(5, 4, cap=4.0) == pytest.approx(0.8)  # continuous when cap = threshold
    assert delay_adaptive(5, 4, cap=0.0) == 0.0  # drops the gradient
    assert delay_adaptive(4, 4, cap=0.0) == 1.0


def test_delay_adaptive_stays_within_the_theorem() -> None:
    # The rate may not exceed min(eta, 1/(4 L delay)) beyond the threshold.
    eta, smoothness, threshold = 0.02, 3.0, 8
    cap = 1 / (4 * smoothness) / eta
    for delay in range(threshold + 1, 200):
        rate = eta * delay_adaptive(delay, threshold, cap)
        assert rate == pytest.approx(min(eta, 1 / (4 * smoothness * delay)))
        assert eta * delay_adaptive(delay, threshold) <= rate
