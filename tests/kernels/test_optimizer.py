"""The step of a local optimizer: scalars of its groups."""

from __future__ import annotations

from mpi_dasgd.kernels import optimizer


def test_scalars_of_sgd_and_adam() -> None:
    sgd = dict(
        zip(
            optimizer.GROUP.names or (),
            optimizer.sgd_group(0.1, 0.9, 0.25, 0.01, nesterov=True, first=True),
            strict=True,
        )
    )
    expected = optimizer.NESTEROV | optimizer.DECAY | optimizer.MOMENTUM | optimizer.FIRST
    assert sgd["kind"] == optimizer.SGD and sgd["flags"] == expected
    assert (sgd["rate"], sgd["fresh"], sgd["momentum"]) == (-0.1, 0.75, 0.9)
    adam = dict(
        zip(
            optimizer.GROUP.names or (),
            optimizer.adam_group(0.1, (0.5, 0.75), 1e-8, 0.5, 2, decoupled=True),
            strict=True,
        )
    )
    assert adam["kind"] == optimizer.ADAM
    assert adam["flags"] == optimizer.DECAY | optimizer.DECOUPLED
    assert (adam["decay"], adam["rate"]) == (1 - 0.1 * 0.5, -(0.1 / 0.75))
    assert adam["root"] == (1 - 0.75**2) ** 0.5
