"""Hugging Face `Trainer` as a decentralized training: a callback.

    from mpi_dasgd.integrations.huggingface import DecentralizedCallback

    trainer = Trainer(model, arguments, train_dataset=..., callbacks=[DecentralizedCallback()])

Start it with ``mpi-dasgd launch -n 4 script.py``, mpirun or srun. Importing this module lets
accelerate take the ranks of the job for its processes (`use_mpi_ranks`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.integrations.accelerate import device_of, use_mpi_ranks
from mpi_dasgd.integrations.collectives import collectives
from mpi_dasgd.integrations.session import Session

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"transformers cannot be imported ({error}); pip install 'mpi_dasgd[huggingface]'"
    ) from error

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["DecentralizedCallback"]

use_mpi_ranks()

_REFUSED = {
    "fsdp": "it shards the model over the ranks",
    "deepspeed": "it averages the gradients over the ranks",
    "auto_find_batch_size": "a rank that runs out of memory would start anew, alone",
}
"""Training arguments that start a distributed training of their own, and why not."""


class DecentralizedCallback(TrainerCallback):
    """Makes the training of a `transformers.Trainer` a decentralized one.

    Every rank runs the same script. The data are sharded as accelerate does for its processes;
    rank 0 prints, logs and saves. Whatever is evaluated or saved is the mean of all ranks' models,
    and after ``trainer.train()`` every rank has it.

    Args:
        algorithm: name of the algorithm.
        settings: other arguments of `mpi_dasgd.attach`.

    Attributes:
        training: the `Decentralized` of the training that runs or ran last; None before.
    """

    def __init__(self, algorithm: str = "adpsgd", **settings: Any) -> None:
        self.training: Any = None
        self._settings = {"algorithm": algorithm, **settings}
        self._session: Session | None = None

    def on_init_end(self, args: TrainingArguments, *others: object, **more: object) -> None:
        """Check the arguments of a new `Trainer`."""
        for name, reason in _REFUSED.items():
            if getattr(args, name, None):
                raise UserError(f"TrainingArguments.{name}: {reason}; leave it out")
        if getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False):
            raise UserError(
                "TrainingArguments.include_num_input_tokens_seen: all ranks would wait for each "
                "other in every step to add up; leave it out"
            )
        args.average_tokens_across_devices = False  # the same: a gather in every step

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: torch.nn.Module,
        optimizer: Any,
        train_dataloader: DataLoader,
        **others: object,
    ) -> None:
        """Attach the model and its optimizer. Collective."""
        ranks = collectives().world
        if args.world_size != ranks.size:
            raise UserError(
                f"TrainingArguments: constructed for {args.world_size} processes, but the job has "
                f"{ranks.size} ranks; import mpi_dasgd.integrations.huggingface first"
            )
        settings = dict(self._settings)
        settings.setdefault(
            "samples_per_step", args.train_batch_size * args.gradient_accumulation_steps
        )
        self._session = Session(model, optimizer, settings)
        self.training = self._session.training

    def on_step_begin(self, *arguments: object, **others: object) -> None:
        """Go on with this rank's own model."""
        if self._session is not None:
            self._session.go_on()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """Take the mean model for what is evaluated or saved now. Collective then."""
        if self._session is None:
            return
        if self._session.must_stop():
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False
        else:
            self._pause(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """Take the mean model for what is evaluated or saved now. Collective then."""
        if self._session is None:
            return
        if control.should_training_stop and state.global_step < state.max_steps:
            self._session.announce_early_end()  # the others come here soon
        self._pause(control)

    def _pause(self, control: TrainerControl) -> None:
        assert self._session is not None
        evaluates, saves = control.should_evaluate, control.should_save
        if (evaluates or saves) and not self._session.pause(evaluates, saves):
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """Let all ranks know the best checkpoint, which rank 0 has written by now. Collective."""
        if self._session is not None:
            self._require_mean_model()
            state.best_model_checkpoint = collectives().broadcast(state.best_model_checkpoint)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: torch.nn.Module,
        **others: object,
    ) -> None:
        """End the training: every rank gets the mean model, or the best one. Collective."""
        session, self._session = self._session, None
        if session is not None:
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            session.end(is_early=state.global_step < state.max_steps, final=model if best else None)

    def _require_mean_model(self) -> None:
        if self._session is not None and not self._session.is_paused:
            raise UserError(
                "callbacks: one behind DecentralizedCallback has set control.should_save, and rank "
                "0's own model was saved instead of the mean; put DecentralizedCallback last"
            )


def _bind_devices() -> None:
    """Let `TrainingArguments` give each rank one GPU, instead of all of them to each."""
    original = TrainingArguments.__dict__["_setup_devices"].func

    @functools.wraps(original)
    def setup_devices(self: TrainingArguments) -> torch.device:
        device = original(self)
        if device.type == "cuda":
            device = device_of(collectives().world)
            self._n_gpu = 1
        return device

    replacement = functools.cached_property(setup_devices)
    replacement.__set_name__(TrainingArguments, "_setup_devices")
    TrainingArguments._setup_devices = replacement


_bind_devices()
