"""Keep an average of the weights beside those that are trained, and use it wherever the model is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_swa_avg_fn

from lightlite.callbacks.callback import Callback, StepOutput
from lightlite.errors import MisconfigurationException
from lightlite.utilities.model_helpers import copy_of_tensors, overwrite
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class WeightAveraging(Callback):
    """Averages the weights as `torch.optim.swa_utils.AveragedModel` does: all alike, unless a function is given.

    The average is what is validated, what a checkpoint has as its "state_dict", and what the module has after the fit.
    Before the first update there is no average, and the module's own weights are used. A checkpoint keeps the weights
    that are trained as "current_model_state" and the rest of the average as "averaging_state", in Lightning's layout,
    so that a resumed fit goes on as if it had not been interrupted.

    Override `should_update` to choose when the average is updated; by default, after every optimizer step.

    Args:
        device: Where the average is kept; by default on the module's device.
        use_buffers: Whether to average buffers too, such as the statistics of batch normalization. If not, the average
            has the buffers that the module had at the last update; `torch.optim.swa_utils.update_bn` renews them.
        kwargs: `avg_fn` or `multi_avg_fn` of AveragedModel.

    Raises:
        MisconfigurationException: For other keyword arguments, or both of these.
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        functions = ("avg_fn", "multi_avg_fn")
        unknown = [name for name in kwargs if name not in functions]
        if unknown or len(kwargs) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} was given {', '.join(unknown or kwargs)}; beside its own arguments it takes "
                "one of avg_fn and multi_avg_fn, for torch.optim.swa_utils.AveragedModel"
            )
        self._device = torch.device(device) if isinstance(device, str) else device
        self._use_buffers = use_buffers
        # Of its own, AveragedModel has one for the CPU and, for other devices, one that fails for integer buffers.
        self._kwargs = kwargs or {"avg_fn": get_swa_avg_fn()}
        self._average_model: AveragedModel | None = None
        self._restored: dict[str, Tensor] | None = None
        self._swapped = False
        self._asked_step = self._latest_update_step = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_average_model": None, "_restored": None, "_swapped": False}

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update the average now. Asked after every optimizer step, and after every epoch.

        Args:
            step_idx: Index of the optimizer step just taken, from 0; None after an epoch.
            epoch_idx: Index of the epoch that has ended, from 0; None after a step.
        """
        return step_idx is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average of an earlier fit."""
        if stage == "fit":
            self._average_model = self._restored = None
            self._swapped = False
            self._asked_step = self._latest_update_step = trainer.global_step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average as a copy of the module, which is whole and on its device by now, or go on with one."""
        device = pl_module.device if self._device is None else self._device
        # What is spread over the ranks cannot be copied as a module.
        copied = copy_of_tensors(pl_module) if trainer.strategy.spreads else pl_module
        self._average_model = _Average(copied, device=device, use_buffers=self._use_buffers, **self._kwargs)
        if self._restored is not None:
            strict = bool(pl_module.strict_loading)
            trainer.strategy.load_module_state(self._restored, strict, self._average_model)
            self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, if an optimizer has stepped and `should_update` says so."""
        step = trainer.global_step
        if step == self._asked_step:
            return
        self._asked_step = step
        if self.should_update(step_idx=step - 1):
            self._average().update_parameters(pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the average, if `should_update` says so."""
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._average().update_parameters(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within fit, validate the average."""
        if trainer.state.fn == "fit" and self._begun():
            self._swap(pl_module)
            trainer.strategy.before_evaluation()  # each rank has averaged its own buffers

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the weights that are trained."""
        self._put_back(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put back the weights that are trained, where the fit was interrupted while the average was in their place."""
        self._put_back(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module the average. What was trained is kept, for checkpoints that are written from now on."""
        if self._begun():
            self._swap(pl_module)
        else:
            rank_zero_warn(
                f"{type(self).__name__} never updated its average, as should_update was never true: the module keeps "
                "the weights that were trained"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module the average of a checkpoint after which there was nothing left to train."""
        if not self._begun() or self._swapped:
            return
        if not trainer.strategy.spreads:
            self._swap(pl_module)
            return
        for averaged, current in zip(_tensors(self._average().module), _tensors(pl_module), strict=True):
            overwrite(current, averaged)  # the module is whole by now
        self._swapped = True

    def state_dict(self) -> dict[str, Any]:
        """The step after which the average was updated last."""
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._latest_update_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the average the checkpoint's "state_dict", and keep the weights that are trained beside it."""
        if self._average_model is None:
            return
        module, average = checkpoint["state_dict"], self._average_model.state_dict()
        kept = {name.removeprefix("module."): value for name, value in average.items() if name.startswith("module.")}
        checkpoint["averaging_state"] = {n: value for n, value in average.items() if not n.startswith("module.")}
        if not self._begun():
            kept = module
        trained, averaged = (kept, module) if self._swapped else (module, kept)
        checkpoint["current_model_state"], checkpoint["state_dict"] = trained, averaged

    def _change_saved_weights(self, checkpoint: dict[str, Any]) -> None:
        if self._begun() and not self._swapped:
            checkpoint["state_dict"] = self._average().module.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Within fit, take the weights that are trained, and the average; the average is what else is evaluated."""
        if trainer.state.fn != "fit":
            return
        self._asked_step = checkpoint["global_step"]
        if "current_model_state" in checkpoint and "averaging_state" in checkpoint:
            averaged = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
            self._restored = {**averaged, **checkpoint["averaging_state"]}
            strict = bool(pl_module.strict_loading)
            trainer.strategy.load_module_state(checkpoint["current_model_state"], strict=strict)
        else:
            rank_zero_info(f"the checkpoint was written without {type(self).__name__}: the average begins anew")

    def _average(self) -> AveragedModel:
        if self._average_model is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no average, since its on_fit_start did not run: an override has to call "
                "super().on_fit_start(trainer, pl_module)"
            )
        return self._average_model

    def _begun(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def _put_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self._swapped:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for averaged, current in zip(_tensors(self._average().module), _tensors(pl_module), strict=True):
            kept = averaged.clone()
            averaged.copy_(current)
            current.copy_(kept)
        self._swapped = not self._swapped


class EMAWeightAveraging(WeightAveraging):
    """Keeps an exponential moving average: `decay * average + (1 - decay) * weights` at each update.

    Args:
        device: Where the average is kept; by default on the module's device.
        use_buffers: Whether to average buffers too.
        decay: Share of the average that each update keeps, from 0.0 to 1.0; default 0.999.
        update_every_n_steps: Update after every that many optimizer steps; 0 for not after steps.
        update_starting_at_step: Index of the step from which on to update after steps; None for the first.
        update_starting_at_epoch: Index of the epoch from which on to update after epochs too; None for never.
        kwargs: None are left: the averaging function is the one above.

    Raises:
        MisconfigurationException: For values that are not allowed.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise MisconfigurationException(
                f"EMAWeightAveraging(decay={decay!r}); give the share of the average that an update keeps, from 0.0 to "
                "1.0, such as 0.999"
            )
        if update_every_n_steps < 0:
            raise MisconfigurationException(
                f"EMAWeightAveraging(update_every_n_steps={update_every_n_steps!r}); give an int >= 0, where 0 is for "
                "updates after epochs only"
            )
        if kwargs:
            raise MisconfigurationException(
                f"EMAWeightAveraging was given {', '.join(kwargs)}, but its averaging function is decided on by decay; "
                "use WeightAveraging for another function"
            )
        super().__init__(device, use_buffers, avg_fn=get_ema_avg_fn(decay))
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update the average now; see `WeightAveraging.should_update`."""
        if step_idx is not None:
            every = self.update_every_n_steps
            return every > 0 and step_idx >= (self.update_starting_at_step or 0) and step_idx % every == 0
        first = self.update_starting_at_epoch
        return epoch_idx is not None and first is not None and epoch_idx >= first


class _Average(AveragedModel):
    """An AveragedModel that asks the device once whether there is an average yet, and not at every update."""

    _begun = False

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average; see `AveragedModel`."""
        if not self._begun or self.avg_fn is None:
            super().update_parameters(model)
            self._begun = True
            return
        names = _tensors if self.use_buffers else nn.Module.parameters
        for average, new in zip(names(self.module), names(model), strict=True):
            mean = average.detach()
            mean.copy_(self.avg_fn(mean, new.detach().to(mean.device), self.n_averaged.to(mean.device)))
        if not self.use_buffers:
            for average, new in zip(self.module.buffers(), model.buffers(), strict=True):
                average.detach().copy_(new.detach())
        self.n_averaged += 1


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
