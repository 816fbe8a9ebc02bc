"""A finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAILS", "OK", "WARNING", "Check"]

OK, WARNING, FAILS = "ok", "warning", "fails"


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: subject of the check, a few words; unique within one run of the doctor.
        verdict: OK, WARNING (training works, but something is worth changing) or FAILS.
        text: finding in plain words, with the remedy unless the verdict is OK.
        values: data behind the finding, serializable as JSON; keys of quantities end in the unit.
    """

    name: str
    verdict: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)
