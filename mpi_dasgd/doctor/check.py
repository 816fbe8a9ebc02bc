"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAILS", "OK", "WARNING", "Check"]

OK, WARNING, FAILS = "ok", "warning", "fails"


@dataclass(frozen=True)
class Check:
    """What was examined, what was found, and what to do about it.

    Attributes:
        name: one or two words.
        verdict: OK, WARNING (training works, but something is worth changing) or FAILS.
        text: the finding in words, with the remedy if it is not OK.
        values: the figures behind it; their names end in the unit.
    """

    name: str
    verdict: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)
