"""The hooks a LightningModule has, and how the loops call them.

Which hooks somebody wrote is found out once, before a loop starts; a hook that nobody wrote is an empty
tuple there and costs nothing. Names, arguments and order follow Lightning 2.x.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightlite.utilities.model_helpers import is_overridden as is_overridden

if TYPE_CHECKING:
    from lightlite.trainer import Trainer

Hook = Callable[..., Any]


class ModelHooks:
    """Hooks about the phases of a run. Each does nothing unless overridden, apart from the mode changes."""

    def on_fit_start(self) -> None:
        """Called at the very beginning of fit, on every rank; the module is on its device."""

    def on_fit_end(self) -> None:
        """Called at the very end of fit, on every rank."""

    def on_train_start(self) -> None:
        """Called once before the first epoch, after the sanity check."""

    def on_train_end(self) -> None:
        """Called once after the last epoch."""

    def on_validation_start(self) -> None:
        """Called before a validation."""

    def on_validation_end(self) -> None:
        """Called after a validation."""

    def on_test_start(self) -> None:
        """Called before a test."""

    def on_test_end(self) -> None:
        """Called after a test."""

    def on_predict_start(self) -> None:
        """Called before predicting."""

    def on_predict_end(self) -> None:
        """Called after predicting."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Called before a batch is trained on. Returning -1 skips the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after a batch; `outputs` holds the detached loss under "loss", beside what the step returned."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a validation batch."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a validation batch, with what `validation_step` returned."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a test batch."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a test batch, with what `test_step` returned."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a batch is predicted."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a batch was predicted, with what `predict_step` returned."""

    def on_validation_model_zero_grad(self) -> None:
        """Called before a validation within fit, to free the gradients' memory."""
        self.zero_grad()  # type: ignore[attr-defined]

    def on_validation_model_eval(self) -> None:
        """Put the module into evaluation mode for a validation."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        """Called after a validation. Overridden, it replaces putting back each submodule's former mode."""
        self.train()  # type: ignore[attr-defined]

    def on_test_model_eval(self) -> None:
        """Put the module into evaluation mode for a test."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_model_train(self) -> None:
        """Called after a test. Overridden, it replaces putting back each submodule's former mode."""
        self.train()  # type: ignore[attr-defined]

    def on_predict_model_eval(self) -> None:
        """Put the module into evaluation mode for predicting."""
        self.eval()  # type: ignore[attr-defined]

    def on_predict_model_train(self) -> None:
        """Called after predicting. Overridden, it replaces putting back each submodule's former mode."""
        self.train()  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """Called at the beginning of a training epoch."""

    def on_train_epoch_end(self) -> None:
        """Called at the end of a training epoch, before what it logged on_epoch is reduced."""

    def on_validation_epoch_start(self) -> None:
        """Called at the beginning of a validation."""

    def on_validation_epoch_end(self) -> None:
        """Called after the last batch of a validation."""

    def on_test_epoch_start(self) -> None:
        """Called at the beginning of a test."""

    def on_test_epoch_end(self) -> None:
        """Called after the last batch of a test."""

    def on_predict_epoch_start(self) -> None:
        """Called at the beginning of predicting."""

    def on_predict_epoch_end(self) -> None:
        """Called after the last batch was predicted."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called after `training_step` and before `optimizer.zero_grad()`."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Called before `loss.backward()`; `loss` is divided by the number of accumulated batches already."""

    def on_after_backward(self) -> None:
        """Called after `loss.backward()`, before gradients are clipped."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called before an optimizer steps; gradients are whole and unscaled, and not clipped yet."""

    def configure_model(self) -> None:
        """Create modules here that are large, or that need the device or the ranks to be known."""


class DataHooks:
    """Hooks about data: where it comes from and how a batch gets to the device."""

    def prepare_data(self) -> None:
        """Download or preprocess, on one process of each machine only. Do not set state here."""

    def setup(self, stage: str) -> None:
        """Called on every rank at the beginning of "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Called on every rank at the end of "fit", "validate", "test" or "predict"."""

    def train_dataloader(self) -> Any:
        """The loader, or nest of loaders, to train on."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """The loader or list of loaders to validate on."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """The loader or list of loaders to test on."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """The loader or list of loaders to predict."""
        raise NotImplementedError

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch that is not a nest of tensors; `super()` moves any nest of what has `.to()`."""
        from lightlite.nest import move_to

        return move_to(batch, device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it is moved to the device."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch after it was moved to the device."""
        return batch


class CheckpointHooks:
    """Hooks about what a checkpoint holds."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint before it is written."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from the checkpoint before the state is restored."""


def _numbered(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


class HookTable:
    """The hooks of one run: the callbacks' first, then the module's.

    Args:
        trainer: Handed to the callbacks' hooks; its `recorder` is told which hook is running.
        module: The user's LightningModule.
        callbacks: In calling order.
        callback_base: The class whose methods do nothing.
        module_base: The class whose methods do nothing.
    """

    def __init__(
        self, trainer: Trainer, module: Any, callbacks: Iterable[Any], callback_base: type, module_base: type
    ) -> None:
        self._recorder, self._profiler = trainer.recorder, trainer.profiler
        self._trainer, self._module, self._callbacks = trainer, module, list(callbacks)
        self._callback_base, self._module_base = callback_base, module_base
        of_class: Counter[str] = Counter()
        self._labels = [_numbered(f"[Callback]{type(callback).__qualname__}", of_class) for callback in self._callbacks]

    def of_callbacks(self, name: str, monitoring: bool | None = None) -> tuple[Hook, ...]:
        """What callbacks wrote for `name`; with `monitoring`, only those that (do not) monitor a logged value."""
        return tuple(self._named(name, (function,)) for function in self._callbacks_own(name, monitoring))

    def of_module(self, name: str) -> tuple[Hook, ...]:
        """What the module wrote for `name`: one function or none."""
        return tuple(self._named(name, (function,)) for function in self._modules_own(name))

    def resolve(self, name: str) -> tuple[Hook, ...]:
        """Everything that was written for `name`, in calling order."""
        return self.of_callbacks(name) + self.of_module(name)

    def together(self, name: str) -> Hook | None:
        """Everything that was written for `name` as one function, which returns what the last one does; or None."""
        functions = self._callbacks_own(name) + self._modules_own(name)
        return self._named(name, functions) if functions else None

    def call(self, name: str, *args: Any) -> None:
        """Call everything that was written for `name`: for hooks outside the batch loops."""
        for hook in self.resolve(name):
            hook(*args)

    def _callbacks_own(self, name: str, monitoring: bool | None = None) -> tuple[Hook, ...]:
        return tuple(
            self._profiler.wrap(
                f"{label}.{name}", functools.partial(getattr(callback, name), self._trainer, self._module)
            )
            for callback, label in zip(self._callbacks, self._labels, strict=True)
            if is_overridden(name, callback, self._callback_base)
            and (monitoring is None or monitoring == hasattr(callback, "monitor"))
        )

    def _modules_own(self, name: str) -> tuple[Hook, ...]:
        if not is_overridden(name, self._module, self._module_base):
            return ()
        label = f"[LightningModule]{type(self._module).__name__}.{name}"
        return (self._profiler.wrap(label, getattr(self._module, name)),)

    def _named(self, name: str, functions: tuple[Hook, ...]) -> Hook:
        recorder = self._recorder

        def hook(*args: Any, **kwargs: Any) -> Any:
            outer, recorder.hook = recorder.hook, name
            answer = None
            try:
                for function in functions:
                    answer = function(*args, **kwargs)
            finally:
                recorder.hook = outer
            return answer

        return hook
