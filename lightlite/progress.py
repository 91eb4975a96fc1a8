"""What a trainer is doing, and how far a fit has come."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any


class _Name(str, Enum):
    def __str__(self) -> str:
        return str(self.value)


class TrainerStatus(_Name):
    """Where the present call stands."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether the call is over."""
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class TrainerFn(_Name):
    """Which entry point was called; the `stage` that `setup` hooks are given."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(_Name):
    """Which loop runs now."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether this loop scores batches without training on them."""
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def hook_prefix(self) -> str:
        """The word in hook names: `on_<word>_epoch_start`, `<word>_step`."""
        return {"train": "train", "test": "test", "predict": "predict"}.get(self.value, "validation")

    @property
    def dataloader_prefix(self) -> str:
        """The word in loader names and limits: `<word>_dataloader`, `limit_<word>_batches`."""
        return {"train": "train", "test": "test", "predict": "predict"}.get(self.value, "val")


STAGES = {
    TrainerFn.FITTING: RunningStage.TRAINING,
    TrainerFn.VALIDATING: RunningStage.VALIDATING,
    TrainerFn.TESTING: RunningStage.TESTING,
    TrainerFn.PREDICTING: RunningStage.PREDICTING,
}
"""The loop that an entry point is there for."""


@dataclass
class TrainerState:
    """What a trainer is doing now."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """Whether the last call came to its end."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether no call is running."""
        return self.status.stopped


@dataclass(slots=True)
class FitProgress:
    """How far a fit has come. A checkpoint holds it; a resumed fit goes on from it.

    Attributes:
        epoch: Index of the epoch in progress, or of the next one between epochs.
        epoch_open: Whether that epoch has begun and its batches are not all done with.
        epoch_done: Whether its batches are over and only what follows an epoch is left to do.
        batches_in_epoch: Batches completed in that epoch.
        batches_total: Batches completed in the whole fit.
        batches_that_stepped: Batches after which optimizers stepped: the loggers' x-axis.
        optimizer_steps: Steps taken by all optimizers together: `trainer.global_step`.
        scheduler_steps: Learning-rate updates.
        batches_validated: Validation batches of the whole fit by index of their loader: the loggers' x-axis of what
            validation logs by step.
        pending: Whether something after the last completed batch is left to do: logging, validation.
        logged: Whether the values that fall due after the last completed batch have been handed to the loggers.
        validated: Whether the validation that falls due after the last completed batch has been run.
        last_batch: Whether the batch last begun was the last one of its epoch.
        closing: Whether the epoch last begun only runs forward, after all training: see `FitLoop.done`.
    """

    epoch: int = 0
    epoch_open: bool = False
    epoch_done: bool = False
    batches_in_epoch: int = 0
    batches_total: int = 0
    batches_that_stepped: int = 0
    optimizer_steps: int = 0
    scheduler_steps: int = 0
    batches_validated: dict[int, int] = field(default_factory=dict)
    pending: bool = False
    logged: bool = False
    validated: bool = False
    last_batch: bool = False
    closing: bool = False

    def begin_epoch(self, closing: bool) -> None:
        """A new epoch begins."""
        self.epoch_open, self.epoch_done, self.batches_in_epoch = True, False, 0
        self.pending = self.logged = self.validated = False
        self.closing = closing

    def abandon_epoch(self) -> None:
        """Forget an epoch that an earlier fit broke off: a fit that restores nothing begins it anew."""
        self.epoch_open = self.epoch_done = self.closing = False
        self.pending = self.logged = self.validated = False
        self.batches_in_epoch = 0

    def end_epoch(self) -> None:
        """The epoch is over."""
        self.epoch += 1
        self.epoch_open = self.epoch_done = False

    def state_dict(self) -> dict[str, Any]:
        """The counters as plain data."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned; names it does not know are passed over."""
        for known in fields(self):
            if known.name in state:
                setattr(self, known.name, state[known.name])
