"""Step rules: how a learning rate adapts to the delay of its gradient."""

from __future__ import annotations

from collections.abc import Callable

from mpi_dasgd.config.schema import AlgorithmConfig

__all__ = ["constant_step", "delay_adaptive", "delay_rule"]


def delay_adaptive(delay: int, threshold: float, cap: float | None = None) -> float:
    """Return the factor on the learning rate of a gradient that is `delay` updates old.

    Theorem 8 of Koloskova, Stich and Jaggi (2022): the rate eta stays for delays up to the
    threshold tau_C (their choice: the number of ranks) and lies in [0, min(eta, 1/(4 L delay)))
    beyond. L is unknown, so two rules are offered:

    - without `cap`, eta / delay, their advice: no new parameter, but the factor drops from 1 to
      1 / (threshold + 1) at once;
    - with `cap`, min(eta, c / delay), where `cap` = c / eta is in updates and the theorem wants
      c <= 1/(4L); `cap` = threshold makes it continuous, `cap` = 0 drops the gradient.

    With data that differ between ranks whose speeds differ too, the rule biases the model towards
    the data of the fast ranks.

    Args:
        delay: updates applied between the read of the model and the use of its gradient, >= 0.
        threshold: largest delay that keeps the full rate, >= 0.
        cap: c / eta, >= 0, or None.
    """
    if delay <= threshold:
        return 1.0
    return min(1.0, (1.0 if cap is None else cap) / delay)


def constant_step(delay: int) -> float:
    """Return 1, whatever the delay of a gradient: its step is that of any other."""
    return 1.0


def delay_rule(config: AlgorithmConfig, default_threshold: int) -> Callable[[int], float]:
    """Return the configured factor on the learning rate as a function of the delay.

    Args:
        config: section ``algorithm``: delay_adaptive_rule, delay_threshold and delay_cap count.
        default_threshold: threshold where the configuration gives none, in gradients.
    """
    threshold = default_threshold if config.delay_threshold is None else config.delay_threshold
    caps = {
        "inverse": None,
        "capped": threshold if config.delay_cap is None else config.delay_cap,
        "drop": 0.0,
    }
    if config.delay_adaptive_rule == "constant":
        return constant_step
    return lambda delay: delay_adaptive(delay, threshold, caps[config.delay_adaptive_rule])
