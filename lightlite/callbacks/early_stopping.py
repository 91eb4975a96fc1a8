"""Stops a fit whose monitored value gets no better."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

log = logging.getLogger(__name__)


class EarlyStoppingReason(Enum):
    """Why a fit was stopped."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Watches a logged value, and stops the fit when it has got no better for a while.

    Args:
        monitor: The logged value.
        min_delta: By how much it has to improve to count as better.
        patience: After how many looks without improvement to stop. One look is one validation, or one epoch; see
            `check_on_train_epoch_end`.
        verbose: Whether to tell of each improvement, and why the fit was stopped.
        mode: "min" where a lower value is better, "max" where a higher one is.
        strict: Whether it is an error when the value was not logged; it is passed over otherwise.
        check_finite: Whether to stop when the value is NaN or infinite.
        stopping_threshold: Stop as soon as the value is better than this.
        divergence_threshold: Stop as soon as the value is worse than this.
        check_on_train_epoch_end: Whether to look when training ends an epoch, or when validation does. None: when
            training does if there is exactly one validation an epoch, or none at all.
        log_rank_zero_only: Whether only rank zero tells; otherwise each rank does, by its number.

    Attributes:
        best_score: The best value so far.
        wait_count: How many looks ago that was.
        stopped_epoch: The epoch the fit was stopped in; 0 where it was not.
        stopping_reason: Why.
        stopping_reason_message: Why, in words.

    Raises:
        MisconfigurationException: For a `mode` that does not exist.
        RuntimeError: With `strict`, when the value is not among the logged ones.
    """

    mode_dict = {"min": torch.lt, "max": torch.gt}
    order_dict = {"min": "<", "max": ">"}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in self.mode_dict:
            raise MisconfigurationException(f"EarlyStopping(mode={mode!r}): mode is 'min' or 'max'")
        self.monitor = monitor
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self.best_score = torch.tensor(torch.inf if mode == "min" else -torch.inf)

    @property
    def state_key(self) -> str:
        """Tells callbacks of different monitors apart."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """Compares: is the first value better than the second?"""
        return self.mode_dict[self.mode]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a fit that had been stopped before it was cut off, and goes on from its last checkpoint by itself.

        One that is given the checkpoint's path trains on.
        """
        if trainer.goes_on and trainer.ckpt_path and self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            rank_zero_info(
                f"the fit that {trainer.ckpt_path} is of was stopped: {self.stopping_reason_message} To train on, fit "
                "with that path as ckpt_path"
            )
            return
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if it is the training epoch's end that counts."""
        if self._looks_on_train_epoch_end(trainer):
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if it is the validation's end that counts."""
        if not self._looks_on_train_epoch_end(trainer):
            self._look(trainer)

    def _looks_on_train_epoch_end(self, trainer: Trainer) -> bool:
        if self._check_on_train_epoch_end is not None:
            return self._check_on_train_epoch_end
        if not trainer.enable_validation:
            return True
        return bool(trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0)

    def _look(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        current = self._monitored(trainer.callback_metrics)
        if current is None:
            return
        should_stop, reason = self._evaluate_stopping_criteria(current)
        should_stop = trainer.strategy.reduce_boolean_decision(should_stop, all=False)
        if should_stop:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
        if reason and self.verbose and not (self.log_rank_zero_only and trainer.global_rank):
            log.info(f"[rank: {trainer.global_rank}] {reason}" if trainer.world_size > 1 else reason)

    def _monitored(self, metrics: Mapping[str, Tensor]) -> Tensor | None:
        value = metrics.get(self.monitor)
        if value is not None:
            return value.detach().squeeze()
        message = (
            f"EarlyStopping(monitor={self.monitor!r}) finds no such value among the logged ones: "
            f"{', '.join(sorted(metrics)) or 'there are none'}. Call self.log({self.monitor!r}, ...) in the module, "
            "monitor one of these, or give strict=False"
        )
        if self.strict:
            raise RuntimeError(message)
        if self.verbose:
            rank_zero_warn(message, category=RuntimeWarning)
        return None

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        name, order = self.monitor, self.order_dict[self.mode]
        if self.check_finite and not torch.isfinite(current):
            reason = f"{name} = {current} is not finite; the best value was {self.best_score:.3f}. The fit stops."
            return self._stop(EarlyStoppingReason.NON_FINITE_METRIC, reason)
        if self.stopping_threshold is not None and self.monitor_op(current, self.stopping_threshold):
            reason = f"{name} = {current} {order} {self.stopping_threshold}, the stopping threshold. The fit stops."
            return self._stop(EarlyStoppingReason.STOPPING_THRESHOLD, reason)
        if self.divergence_threshold is not None and self.monitor_op(-current, -self.divergence_threshold):
            reason = (
                f"{name} = {current} is beyond {self.divergence_threshold}, the divergence threshold. The fit stops."
            )
            return self._stop(EarlyStoppingReason.DIVERGENCE_THRESHOLD, reason)
        if self.monitor_op(current - self.min_delta, self.best_score.to(current.device)):
            gain = abs(self.best_score.to(current.device) - current)
            by = f" by {gain:.3f} >= min_delta = {abs(self.min_delta)}" if torch.isfinite(gain) else ""
            self.best_score, self.wait_count = current, 0
            return False, f"{name} improved{by}. The best value is {current:.3f} now."
        self.wait_count += 1
        if self.wait_count < self.patience:
            return False, None
        reason = (
            f"{name} was no better {self.wait_count} times; the best value was {self.best_score:.3f}. The fit stops."
        )
        return self._stop(EarlyStoppingReason.PATIENCE_EXHAUSTED, reason)

    def _stop(self, reason: EarlyStoppingReason, words: str) -> tuple[bool, str]:
        self.stopping_reason = reason
        return True, words

    def state_dict(self) -> dict[str, Any]:
        """What was best, and how long ago."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = state_dict["best_score"]
        self.patience = state_dict["patience"]
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
