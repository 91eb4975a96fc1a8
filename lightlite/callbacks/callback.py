"""The base class of what people plug into a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from lightlite.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

StepOutput: TypeAlias = "Tensor | Mapping[str, Any] | None"


class Callback:
    """Code that runs at the hooks of a run, beside the module's own.

    Override the hooks you need; one that nobody overrides costs nothing. Names and order are those of PyTorch
    Lightning 2.x. What has to outlive a restart goes through `state_dict` and `load_state_dict`.
    """

    _logs_to: LightningModule | None = None
    """The module of the run in progress; the trainer sets it, and takes it away afterwards."""

    @property
    def state_key(self) -> str:
        """Under what name a checkpoint keeps this callback's state.

        Override it where a run has several callbacks of one class: `self._generate_state_key(argument=…)`.
        """
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        """The class's name and `kwargs`, as one string."""
        return f"{type(self).__qualname__}{kwargs!r}"

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value from a hook, as `LightningModule.log` does, with the same arguments."""
        self._logging_module().log(name, value, *args, **kwargs)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log several values from a hook, as `LightningModule.log_dict` does, with the same arguments."""
        self._logging_module().log_dict(dictionary, *args, **kwargs)

    def _logging_module(self) -> LightningModule:
        if self._logs_to is None:
            raise MisconfigurationException(
                f"{type(self).__name__}.log was called while no Trainer runs it; call it from a hook of a "
                "callback that was passed as Trainer(callbacks=[...])"
            )
        return self._logs_to

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep of this callback: plain data and tensors."""
        return {}

    def _change_saved_weights(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of weights only is about to be written: change those that the module is to have."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A fit, validate, test or predict begins on this rank; `stage` is one of those words."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit, validate, test or predict has ended, failed or been interrupted."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The fit begins: the model is on its device."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The fit has ended."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The few validation batches before the first epoch begin."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The few validation batches before the first epoch have ended."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training begins, after the sanity check."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training has ended."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training epoch begins."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training epoch has ended. What the module logs in its own hook is in `trainer.callback_metrics`."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A training batch begins."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """A training batch has ended; `outputs` is what `training_step` returned, its tensors detached."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation run begins."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation run has ended."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass over the validation loaders begins."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass over the validation loaders has ended."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch begins."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation batch has ended; `outputs` is what `validation_step` returned."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A test run begins."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A test run has ended."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass over the test loaders begins."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass over the test loaders has ended."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test batch begins."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A test batch has ended; `outputs` is what `test_step` returned."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A prediction run begins."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A prediction run has ended."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass over the prediction loaders begins."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass over the prediction loaders has ended."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A prediction batch begins."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A prediction batch has ended; `outputs` is what `predict_step` returned."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run ends by `exception`, KeyboardInterrupt included."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """`loss.backward()` comes next; `loss` is divided by the number of accumulated batches already."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`loss.backward()` has been; gradients are not unscaled yet."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """`optimizer.step()` comes next; gradients are unscaled, and not clipped yet."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """`optimizer.zero_grad()` comes next."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written: put in what you need, or change what is there."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has been read: take what you need."""
