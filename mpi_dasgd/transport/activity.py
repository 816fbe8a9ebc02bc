"""Activities: what a rank does at present, for the ranks that wait for it to read and to name."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Activity", "ReportedActivity"]


class Activity(IntEnum):
    """What a rank does; it is reported only when others may wait for long."""

    OWN_CODE = 0
    """Anything but the following: the program's own code, or a call that returns soon."""
    STEP = 1
    """A step, or `serve`, that has waited for other ranks for more than a second."""
    ELSEWHERE = 2
    """The end of another training by the same process: it answers others meanwhile."""
    COLLECTIVE = 3
    """A collective call in mid-run: `average`, `paused`."""
    SHADOWING = 4
    """The end of training: takes part in the steps of others, without gradients."""
    FINISHING = 5
    """The end of training: absorbs what others still send."""
    CLOSING = 6
    """`close`, after the end of training."""

    @property
    def has_left(self) -> bool:
        """Whether the rank makes no steps of its own any more."""
        return self >= Activity.SHADOWING


_TEXTS = {
    Activity.OWN_CODE: "is in the program's own code after its step {step}",
    Activity.STEP: "waits in its step {step}",
    Activity.ELSEWHERE: "waits in the end of another model's training after its step {step}",
    Activity.COLLECTIVE: "waits in a collective call (average, paused) after its step {step}",
    Activity.SHADOWING: "waits in finish or close after its step {step}",
    Activity.FINISHING: "waits in finish or close after its step {step}",
    Activity.CLOSING: "waits in close after its step {step}",
}


class ReportedActivity(NamedTuple):
    """What a rank has reported of itself.

    Attributes:
        activity: what it does.
        step: its newest step of its own when it began to.
    """

    activity: Activity = Activity.OWN_CODE
    step: int = 0

    def describe(self, step: int) -> str:
        """Return a predicate for messages, such as "waits in its step 7".

        Args:
            step: newest step of the rank that is known; the reported one if that is newer.
        """
        return _TEXTS[self.activity].format(step=max(step, self.step))

    def pack(self) -> int:
        """Return the control word of it."""
        return self.step << 8 | self.activity

    @classmethod
    def unpack(cls, word: int) -> ReportedActivity:
        """Return what `pack` has made a word of."""
        return cls(Activity(word & 0xFF), word >> 8)
