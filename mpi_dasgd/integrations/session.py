"""One training by a framework: attached, evaluated as the mean model, ended on all ranks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from mpi_dasgd import launch
from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.integrations.collectives import collectives
from mpi_dasgd.training.attach import attach

__all__ = ["Session"]

_log = logging.getLogger("mpi_dasgd")

_END = 0  # what a rank votes for, or the reason of a pause
_REASONS = ("ends", "evaluates", "saves", "evaluates and saves")


class Session:
    """A framework's training as a decentralized one. Construction is collective.

    A rank that stops before its last step ends the training of all. The ranks vote where they meet:
    a pause takes place only if none of them has come to its end instead.

    Args:
        model, optimizer: what the framework trains.
        settings: arguments of `mpi_dasgd.attach`.

    Attributes:
        training: what `mpi_dasgd.attach` returned.
        is_paused: whether the model holds the mean of all ranks' models for now.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ) -> None:
        self._collectives = together = collectives()
        self.training = attach(model, optimizer, environment=together.world, **settings)
        with together.world.collective_errors():
            if not self.training.computes_gradients:
                raise UserError(
                    f"algorithm: {self.training.algorithm.name!r} has a server that does not "
                    "train, but frameworks train on every rank; set algorithm.server_trains=true"
                )
        together.watch(self.training.endpoint)
        self._mean = contextlib.ExitStack()
        self.is_paused = False
        self._has_announced = False
        self._has_ended = False  # whether the last vote is over
        launch.ready()

    def must_stop(self) -> bool:
        """Return whether another rank has stopped early. Not collective: call it in each step."""
        return self._has_ended or self._collectives.is_notified()

    def announce_early_end(self) -> None:
        """Let the other ranks stop soon: this one makes no further steps. Not collective."""
        if not self._has_announced and not self._has_ended:
            self._has_announced = True
            self._collectives.notify()

    def pause(self, evaluates: bool, saves: bool) -> bool:
        """Let the model hold the mean of all ranks' models until `go_on`. Collective.

        Args:
            evaluates, saves: what it is for; the same on all ranks.

        Returns:
            Whether it does: False if a rank has ended its training instead, or is lost.

        Raises:
            UserError: the ranks do not pause for the same.
        """
        if not self.is_paused and not self._has_ended:
            self._mean.enter_context(self.training.mean_model())
            # Ranks that have ended take part in it, so that all come to this vote.
            reasons = self._close_vote(self._begin_vote(evaluates + 2 * saves))
            self.is_paused = not self._has_ended
            if self._has_ended:
                self._mean.close()
            elif len(set(reasons)) > 1:
                done = ", ".join(f"rank {rank} {_REASONS[r]}" for rank, r in enumerate(reasons))
                raise UserError(
                    f"the ranks must evaluate and save at the same steps, but {done}; decide about "
                    "it alike on all ranks"
                )
        return self.is_paused

    def go_on(self) -> None:
        """Let the model be this rank's own again."""
        if self.is_paused:
            self.is_paused = False
            self._mean.close()

    def end(self, *, is_early: bool = False, final: torch.nn.Module | None = None) -> None:
        """End the training: the model becomes the mean of all ranks' models. Collective.

        Args:
            is_early: whether this rank could have made further steps; all ranks stop then.
            final: model whose present weights are to stay, instead of the mean.
        """
        weights = None
        if final is not None:
            weights = {name: value.clone() for name, value in final.state_dict().items()}
        self.go_on()
        if is_early:
            self.announce_early_end()
        answers = None if self._has_ended else self._begin_vote(_END)
        self.training.finish()  # others may have steps to make: do not wait for their votes before
        if answers is not None:
            self._close_vote(answers)
        if final is None:
            self.training.average()
        self._collectives.watch(None)
        self.training.close()
        self.training.detach()
        if final is not None and weights is not None:
            final.load_state_dict(weights)

    def fail(self) -> None:
        """Tell the other ranks that this one fails."""
        self._collectives.watch(None)
        self.training.fail()

    def _begin_vote(self, reason: int) -> Callable[[], list[int]]:
        return self._collectives.begin_vote(2 * reason + self._has_announced)

    def _close_vote(self, answers: Callable[[], list[int]]) -> list[int]:
        """Return what the ranks vote for; the first that ends, or is lost, makes it the last."""
        try:
            votes = answers()
        except PeerLost as error:
            _log.warning("%s: training ends", error)
            self._has_ended = True
            return []
        reasons = [vote // 2 for vote in votes]
        if _END in reasons:
            self._has_ended = True
            self._collectives.take_notices([r for r, vote in enumerate(votes) if vote % 2])
        return reasons
