"""Logs the learning rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException
from lightlite.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs each optimizer's learning rate, by parameter group where there are several.

    A rate is called by its scheduler's `name` where `configure_optimizers` gave one, else "lr-" and the optimizer's
    class: "lr-Adam", "lr-Adam-1" for the second of the class, "lr-Adam/pg1" for the first of several groups, or
    "lr-Adam/encoder" for a group with a "name".

    Args:
        logging_interval: "step" logs at the trainer's `log_every_n_steps`, "epoch" as each epoch begins, and None
            at the interval of each one's scheduler; without a scheduler, at both.
        log_momentum: Whether to log the momentum, or the first of the betas, too.
        log_weight_decay: Whether to log the weight decay too.

    Attributes:
        lrs: The rates logged so far, by name.
        last_momentum_values: The last momentum logged, by name.
        last_weight_decay_values: The last weight decay logged, by name.

    Raises:
        MisconfigurationException: For another interval, for a trainer without a logger, and for parameter groups of
            one name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): give 'step', 'epoch' or None"
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a name for every rate."""
        if not trainer.loggers:
            raise MisconfigurationException(
                "LearningRateMonitor has nowhere to log to: the Trainer has no logger; give one, as in "
                "Trainer(logger=CSVLogger('logs')), or leave the callback out"
            )
        has_momentum = all(
            "momentum" in optimizer.defaults or "betas" in optimizer.defaults for optimizer in trainer.optimizers
        )
        if self.log_momentum and not has_momentum:
            rank_zero_warn(
                "LearningRateMonitor(log_momentum=True): an optimizer has no momentum; 0 is logged for it",
                category=RuntimeWarning,
            )
        names = [name for name, _, _ in _groups(trainer)]
        self.lrs = {name: [] for name in names}
        self.last_momentum_values = {f"{name}-momentum": None for name in names}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for name in names}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log, where the interval is "step" and the trainer logs at this one."""
        if self.logging_interval == "epoch":
            return
        step = trainer.progress.batches_that_stepped
        every = trainer.log_every_n_steps
        if every and ((step + 1) % every == 0 or trainer.should_stop):
            self._log(trainer, "step", step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, where the interval is "epoch"."""
        if self.logging_interval != "step":
            self._log(trainer, "epoch", trainer.progress.batches_that_stepped)

    def _log(self, trainer: Trainer, interval: str, step: int) -> None:
        stats: dict[str, float] = {}
        for name, group, of_scheduler in _groups(trainer):
            if self.logging_interval is None and of_scheduler not in (None, interval):
                continue
            stats[name] = float(group["lr"])
            self.lrs.setdefault(name, []).append(stats[name])
            if self.log_momentum:
                momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                stats[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = momentum
            if self.log_weight_decay:
                decay = group.get("weight_decay", 0)
                stats[f"{name}-weight_decay"] = self.last_weight_decay_values[f"{name}-weight_decay"] = decay
        if not stats:
            return
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in stats.items()})
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(stats, step=step)


def _groups(trainer: Trainer) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """Each parameter group with its name and its scheduler's interval, those with schedulers first."""
    seen: list[Optimizer] = []
    of_class: Counter[type] = Counter()
    for config in trainer.lr_scheduler_configs:
        optimizer = config.scheduler.optimizer
        seen.append(optimizer)
        yield from _groups_of(optimizer, config.name, config.interval, of_class)
    for optimizer in trainer.optimizers:
        bare = getattr(optimizer, "optimizer", optimizer)
        if not any(bare is other for other in seen):
            yield from _groups_of(bare, None, None, of_class)


def _groups_of(
    optimizer: Optimizer, given_name: str | None, interval: str | None, of_class: Counter[type]
) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    name = given_name
    if name is None:
        name = f"lr-{type(optimizer).__name__}"
        if of_class[type(optimizer)]:
            name += f"-{of_class[type(optimizer)]}"
        of_class[type(optimizer)] += 1
    several = len(optimizer.param_groups) > 1
    parts = [group.get("name", f"pg{n}" if several else None) for n, group in enumerate(optimizer.param_groups, 1)]
    if len(set(parts)) < len(parts):
        raise MisconfigurationException(
            f"parameter groups of one {type(optimizer).__name__} share a name: {', '.join(map(str, parts))}; "
            "LearningRateMonitor needs different ones"
        )
    for part, group in zip(parts, optimizer.param_groups, strict=True):
        yield f"{name}/{part}" if part else name, group, interval
