"""Stochastic weight averaging: the mean of the weights at the ends of the last epochs."""

from __future__ import annotations

import math
from collections.abc import Callable as Function
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException
from lightlite.utilities.model_helpers import copy_of_tensors, overwrite
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightlite.utilities.types import LRSchedulerConfig

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

AveragingFunction: TypeAlias = Function[[Tensor, Tensor, Tensor], Tensor]


class StochasticWeightAveraging(Callback):
    """Averages the weights that each of the last epochs begins with, at a learning rate of its own (SWA).

    From the first of these epochs on, `torch.optim.swa_utils.SWALR` takes the place of the module's scheduler. When
    training is over, by whatever limit, the module gets the average. Where it has batch normalization, one more epoch
    follows, which trains nothing, to renew its statistics; on several ranks they are the mean over all. Validations
    and checkpoints before that see the weights that are trained, and a fit without that epoch ends after the last of
    them: `trainer.save_checkpoint` saves the average then. `WeightAveraging` validates and saves the average itself.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018.

    Args:
        swa_lrs: Learning rate while averaging; one for each of the optimizer's parameter groups, or one for all.
        swa_epoch_start: The epoch to start with, counted from 1 (int), or after which share of `max_epochs` to (float).
        annealing_epochs: Over how many epochs the learning rate goes over to `swa_lrs`; default 10.
        annealing_strategy: How it does: "cos" (default) or "linear".
        avg_fn: Makes the new average of a parameter, from the average so far, the parameter, and the number of values
            in the average so far; None for the mean.
        device: Where the average is kept; None for the module's device. Default the CPU.

    Raises:
        MisconfigurationException: For values that are not allowed.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AveragingFunction | None = None,
        device: torch.device | str | None = torch.device("cpu"),  # noqa: B008
    ) -> None:
        _check(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy, avg_fn, device)
        self._swa_lrs, self._swa_epoch_start = swa_lrs, swa_epoch_start
        self._annealing_epochs, self._annealing_strategy = annealing_epochs, annealing_strategy
        self._avg_fn = avg_fn or self.avg_fn
        self._device = device
        self._forget()

    def _forget(self) -> None:
        self.n_averaged = torch.tensor(0)
        self.swa_start = 0
        """Index of the first epoch whose weights are averaged, as it is known from `on_fit_start` on."""
        self.momenta: dict[_BatchNorm, float | None] = {}
        self._average_model: nn.Module | None = None
        self._swa_scheduler: SWALR | None = None
        self._latest_update_epoch = -1
        self._given = False
        self._restored: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_average_model": None, "_swa_scheduler": None, "_restored": {}, "momenta": {}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average of an earlier fit."""
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is one optimizer, and go on with the average that a checkpoint held."""
        if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) > 1:
            raise MisconfigurationException(
                f"StochasticWeightAveraging needs one optimizer and at most one learning-rate scheduler, but "
                f"{type(pl_module).__name__}.configure_optimizers returned {len(trainer.optimizers)} and "
                f"{len(trainer.lr_scheduler_configs)}; WeightAveraging takes any number"
            )
        if self._has_statistics(pl_module) and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "StochasticWeightAveraging cannot renew the statistics of batch normalization in manual optimization, "
                "where training_step itself steps the optimizers; WeightAveraging averages them instead"
            )
        self.swa_start = self._first_epoch(trainer.max_epochs)
        self._average_model = copy_of_tensors(pl_module).to(pl_module.device if self._device is None else self._device)
        if not self._restored:
            return
        self.n_averaged = torch.tensor(self._restored["n_averaged"])
        if self._restored["average_model_state"] is not None:
            trainer.strategy.load_module_state(self._restored["average_model_state"], True, self._average_model)
        if self._restored["scheduler_state"] is not None:
            # Now, so that the optimizer's and the scheduler's own state are restored into what they were saved from.
            self._take_over(trainer)
        trainer.closing_epoch = self._averaging() and self._has_statistics(pl_module)

    def _first_epoch(self, max_epochs: int | None) -> int:
        start: int | float = self._swa_epoch_start
        endless = max_epochs is None or max_epochs == -1
        if isinstance(start, float):
            if endless:
                raise MisconfigurationException(
                    f"StochasticWeightAveraging(swa_epoch_start={start}) is a share of max_epochs, which has no limit; "
                    "give an int, or set Trainer(max_epochs=...)"
                )
            start = int((max_epochs or 0) * start)
        if not endless and max_epochs and start > max_epochs:
            rank_zero_warn(
                f"StochasticWeightAveraging(swa_epoch_start={start}) begins after max_epochs={max_epochs}: nothing "
                "will be averaged"
            )
        return max(int(start) - 1, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with renewing statistics, where a checkpoint was taken meanwhile."""
        if trainer.progress.closing and trainer.progress.epoch_open:
            self._average_statistics(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the weights to the average; after all training, begin to renew the statistics of the average."""
        if trainer.progress.closing:
            self._give_average_to(pl_module)
            self._average_statistics(pl_module, from_scratch=True)
            return
        if trainer.current_epoch < self.swa_start:
            return
        if self._swa_scheduler is None:
            self._take_over(trainer)
            if trainer.current_epoch != self.swa_start:
                rank_zero_warn(
                    f"StochasticWeightAveraging begins in epoch {trainer.current_epoch}, though it was to in epoch "
                    f"{self.swa_start}: the checkpoint that the fit goes on from holds no average"
                )
        if trainer.current_epoch > self._latest_update_epoch:
            self._update(pl_module)
            self._latest_update_epoch = trainer.current_epoch
            trainer.closing_epoch = self._has_statistics(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give every rank the statistics of all."""
        self._share_statistics(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give every rank the statistics of all."""
        self._share_statistics(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module the average, unless it has it already, for its statistics."""
        self._reset_momenta()
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module the average of a checkpoint after which there was nothing left to train."""
        if self._averaging() and not self._given:
            self._give_average_to(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave batch normalization as it was."""
        self._reset_momenta()

    def state_dict(self) -> dict[str, Any]:
        """The average, how many weights are in it, and the state of the scheduler."""
        return {
            "n_averaged": int(self.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._swa_scheduler is None else self._swa_scheduler.state_dict(),
            "average_model_state": None if self._average_model is None else self._average_model.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, in `on_fit_start`, where there is a module and an optimizer."""
        self._restored = state_dict
        self._latest_update_epoch = state_dict["latest_update_epoch"]

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """The mean, in which every value counts alike."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    def _averaging(self) -> bool:
        return bool(self.n_averaged > 0)

    @staticmethod
    def _has_statistics(pl_module: LightningModule) -> bool:
        return any(True for _ in _batch_norms(pl_module))

    def _take_over(self, trainer: Trainer) -> None:
        """Put SWALR in the scheduler's place."""
        optimizer, configs = trainer.optimizers[0], trainer.lr_scheduler_configs
        groups = len(optimizer.param_groups)
        rates: Any = self._swa_lrs if isinstance(self._swa_lrs, list) else [self._swa_lrs] * groups
        if len(rates) != groups:
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_lrs={rates}) has {len(rates)} learning rates, but the optimizer has "
                f"{groups} parameter groups; give one for each, or a float for all"
            )
        self._swa_scheduler = SWALR(optimizer, rates, self._annealing_epochs, self._annealing_strategy)
        if configs:
            if configs[0].interval != "epoch" or configs[0].frequency != 1:
                rank_zero_warn(
                    f"StochasticWeightAveraging steps its learning rate once an epoch; the scheduler that it replaces "
                    f"was stepped with interval={configs[0].interval!r}, frequency={configs[0].frequency}"
                )
            rank_zero_info(f"SWALR takes the place of {type(configs[0].scheduler).__name__}")
        configs[:] = [LRSchedulerConfig(self._swa_scheduler)]

    @torch.no_grad()
    def _update(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        for averaged, parameter in zip(self._average_model.parameters(), pl_module.parameters(), strict=True):
            value = parameter.detach().to(averaged.device)
            if self._averaging():
                value = self._avg_fn(averaged.detach(), value, self.n_averaged.to(averaged.device))
            averaged.copy_(value)
        self.n_averaged += 1

    @torch.no_grad()
    def _give_average_to(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        for averaged, parameter in zip(self._average_model.parameters(), pl_module.parameters(), strict=True):
            overwrite(parameter, averaged)
        self._given = True

    def _average_statistics(self, pl_module: LightningModule, from_scratch: bool = False) -> None:
        """Let batch normalization take the mean over all batches to come, as its momentum None does."""
        for norm in _batch_norms(pl_module):
            if from_scratch:
                norm.reset_running_stats()
            self.momenta[norm] = norm.momentum
            norm.momentum = None

    def _share_statistics(self, trainer: Trainer) -> None:
        if trainer.progress.closing and trainer.world_size > 1:
            for norm in self.momenta:
                for statistic in (norm.running_mean, norm.running_var):
                    assert statistic is not None
                    statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))

    def _reset_momenta(self) -> None:
        for norm, momentum in self.momenta.items():
            norm.momentum = momentum
        self.momenta = {}


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch normalizations that keep statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def _check(
    swa_lrs: Any, swa_epoch_start: Any, annealing_epochs: Any, annealing_strategy: Any, avg_fn: Any, device: Any
) -> None:
    def refuse(name: str, given: Any, allowed: str) -> None:
        raise MisconfigurationException(f"StochasticWeightAveraging({name}={given!r}); give {allowed}")

    rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
    if not rates or not all(isinstance(rate, float) and 0 < rate < math.inf for rate in rates):
        refuse("swa_lrs", swa_lrs, "a float above 0.0, or a list of them, one for each parameter group")
    is_share = isinstance(swa_epoch_start, float) and 0 <= swa_epoch_start <= 1
    is_epoch = isinstance(swa_epoch_start, int) and not isinstance(swa_epoch_start, bool) and swa_epoch_start >= 1
    if not is_share and not is_epoch:
        refuse("swa_epoch_start", swa_epoch_start, "an int >= 1, or a float from 0.0 to 1.0, a share of max_epochs")
    if not isinstance(annealing_epochs, int) or annealing_epochs < 0:
        refuse("annealing_epochs", annealing_epochs, "an int >= 0")
    if annealing_strategy not in ("cos", "linear"):
        refuse("annealing_strategy", annealing_strategy, "'cos' or 'linear'")
    if avg_fn is not None and not callable(avg_fn):
        refuse("avg_fn", avg_fn, "a function of (average, parameter, number of values in the average), or None")
    if device is not None and not isinstance(device, (torch.device, str)):
        refuse("device", device, "a torch.device, its name, or None for the module's")
