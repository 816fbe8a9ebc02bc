"""Values of results as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["json_value"]


def json_value(value: Any, digits: int | None = None) -> Any:
    """Return `value` without types of NumPy, and with None for infinity and NaN.

    Args:
        value: number, string, None, or dicts, lists and tuples of these.
        digits: significant digits to which floats are rounded; None for all.
    """
    if isinstance(value, dict):
        return {str(key): json_value(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, digits) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value
