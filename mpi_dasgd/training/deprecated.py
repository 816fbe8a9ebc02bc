"""Old names of arguments and attributes, taken for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["renamed_arguments", "renamed_attribute"]

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that takes keyword arguments under their old names, too, with a warning.

    Args:
        new_names: new name of each old one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in new_names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{old} is the old name of {new}: give {new} only")
                    warnings.warn(
                        f"the argument {old} is now called {new}", DeprecationWarning, stacklevel=2
                    )
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """Return a property `old` that reads the attribute `new`, with a warning."""

    def read(instance: Any) -> Any:
        warnings.warn(f"the attribute {old} is now called {new}", DeprecationWarning, stacklevel=2)
        return getattr(instance, new)

    return property(read, doc=f"Old name of `{new}`.")
