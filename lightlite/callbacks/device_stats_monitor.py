"""Logs how busy the device is, and how full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightlite.callbacks.callback import Callback, StepOutput
from lightlite.errors import MisconfigurationException
from lightlite.registry import AcceleratorRegistry

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class DeviceStatsMonitor(Callback):
    """Logs the figures of rank zero's device, before and after batches, at the trainer's log points.

    They are named "DeviceStatsMonitor.on_train_batch_start/<figure>" and the like; which there are, and in which unit,
    `Accelerator.get_device_stats` says. In an evaluation every `log_every_n_steps`-th batch of a rank is a log point.

    Args:
        cpu_stats: True for the CPU's figures, named "cpu_…", beside those of another device; False for none even where
            the CPU is the device; None for the device's own.

    Raises:
        MisconfigurationException: For a trainer without a logger.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats
        self._evaluated = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that there is a logger."""
        if stage == "fit" and not trainer.loggers:
            raise MisconfigurationException(
                "DeviceStatsMonitor has nowhere to log to: the Trainer has no logger; give one, as in "
                "Trainer(logger=CSVLogger('logs')), or leave the callback out"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log, at a log point."""
        self._log(trainer, "on_train_batch_start", trainer.progress.batches_that_stepped + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Log, at a log point."""
        self._log(trainer, "on_train_batch_end", trainer.progress.batches_that_stepped + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count batches anew."""
        self._evaluated = 0

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log, at a log point."""
        self._evaluated += 1
        self._log(trainer, "on_validation_batch_start", self._evaluated)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log, at a log point."""
        self._log(trainer, "on_validation_batch_end", self._evaluated)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count batches anew."""
        self._evaluated = 0

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log, at a log point."""
        self._evaluated += 1
        self._log(trainer, "on_test_batch_start", self._evaluated)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log, at a log point."""
        self._log(trainer, "on_test_batch_end", self._evaluated)

    def _log(self, trainer: Trainer, hook: str, batch: int) -> None:
        every = trainer.log_every_n_steps
        due = every and (batch % every == 0 or trainer.should_stop)
        if not due or not trainer.is_global_zero or trainer.sanity_checking:
            return
        figures = self._figures(trainer)
        for logger in trainer.loggers if figures else ():
            prefix = f"{type(self).__qualname__}.{hook}{logger.group_separator}"
            named = {f"{prefix}{name}": value for name, value in figures.items()}
            logger.log_metrics(named, step=trainer.progress.batches_that_stepped)

    def _figures(self, trainer: Trainer) -> dict[str, float]:
        device = trainer.strategy.root_device
        on_cpu = device.type == "cpu"
        if on_cpu and self._cpu_stats is False:
            return {}
        figures = dict(trainer.accelerator.get_device_stats(device))
        if self._cpu_stats and not on_cpu:
            of_cpu = AcceleratorRegistry.create("cpu").get_device_stats(device)
            figures |= {f"cpu_{name}": value for name, value in of_cpu.items()}
        return figures
