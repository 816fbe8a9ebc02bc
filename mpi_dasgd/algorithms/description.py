"""What an algorithm says about itself: a row of the catalogue, and what drivers must know of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Capabilities", "Description"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """Row of an algorithm in the catalogue, in words and formulas.

    The formulas of `traffic` and `memory` are evaluated by `catalogue.evaluate`. M is the size of a
    model in the codec, P that of a model in its own type, n the number of ranks, H the number of
    local steps, r the number of neighbours. The usual case comes first; others follow after a
    semicolon, each with a name and a colon.

    Attributes:
        paper: authors, year and arXiv number; empty for an algorithm that is not in the catalogue.
        exchanges: what crosses the wire.
        traffic: bytes that a rank sends and reads per step, a formula.
        memory: bytes that a rank holds beside model, gradient and optimizer state, a formula.
        waits: whether ranks wait, and for what; begins with "never" if they do not.
        effective_step: by how many eta/n one gradient moves the mean of the models.
    """

    paper: str = ""
    exchanges: str = "messages of its own"
    traffic: str = ""
    memory: str = ""
    waits: str = ""
    effective_step: str = "1"

    @property
    def never_waits(self) -> bool:
        """Whether no rank waits for another one."""
        return self.waits.startswith("never")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What drivers and meters must know of an algorithm.

    Attributes:
        synchronous: whether all ranks make the same number of steps, in lockstep.
        one_model: whether all ranks have the same model after every step.
        preserves_mean: whether exchanges conserve the sum of all `Algorithm.mass` and of the
            messages in flight.
        applies_step_rule: whether the algorithm applies `algorithm.delay_adaptive_rule` itself;
            otherwise the driver does, by the gradient counts of all ranks.
        uses_publication: whether it needs slots for publications.
        uses_inbox: whether it needs slots for inboxes.
        exchanges_gradients: whether it reads `LocalOptimizer.gradient`, which must be dense then.
        minimum_ranks: least number of ranks that it works with.
        replicated: whether all ranks hold one model, so that one that differs goes on to differ.
        runs_on_device: whether it works with vectors in the memory of a GPU; else with copies of
            them in host memory.
    """

    synchronous: bool = False
    one_model: bool = False
    preserves_mean: bool = True
    applies_step_rule: bool = False
    uses_publication: bool = True
    uses_inbox: bool = True
    exchanges_gradients: bool = False
    minimum_ranks: int = 1
    replicated: bool = False
    runs_on_device: bool = False
