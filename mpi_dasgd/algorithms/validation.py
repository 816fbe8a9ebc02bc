"""Validation of the section ``algorithm``: keys that the chosen algorithm would ignore."""

from __future__ import annotations

from collections.abc import Sequence

from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.errors import UserError

__all__ = ["refuse_ignored_keys"]


def refuse_ignored_keys(
    algorithm: str, config_keys: Sequence[str], settings: AlgorithmConfig
) -> None:
    """Refuse values of keys that an algorithm would ignore.

    Args:
        algorithm: name and variant of the algorithm, for the message.
        config_keys: keys that it uses beside `name`, `variant` and those of the delay-adaptive
            rule.
        settings: section ``algorithm`` of the configuration.

    Raises:
        UserError: a key that the algorithm does not use has another value than its default.
    """
    recognized = {"name", "variant", "delay_adaptive_rule", *config_keys}
    if settings.delay_adaptive_rule != "constant":
        recognized.add("delay_threshold")
    if settings.delay_adaptive_rule == "capped":
        recognized.add("delay_cap")
    for key, field in type(settings).model_fields.items():
        value = getattr(settings, key)
        if key not in recognized and value != field.default:
            raise UserError(
                f"algorithm.{key}: {algorithm!r} as it is configured has no use for it, "
                f"got {value!r}: leave it unset ({field.description})"
            )
