"""What a trainer knows and shows: its settings, its place, its state, its metrics."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightlite import config
from lightlite.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from lightlite.datamodule import LightningDataModule
from lightlite.hooks import is_overridden
from lightlite.interfaces import Accelerator, Precision, Strategy
from lightlite.loggers import Logger
from lightlite.loops.session import DataSource
from lightlite.module import LightningModule
from lightlite.optim import LightningOptimizer, LRSchedulerConfig
from lightlite.profilers import Profiler
from lightlite.progress import FitProgress, RunningStage, TrainerState, TrainerStatus
from lightlite.results import Recorder


class TrainerFacts:
    """The attributes and documented properties of a Trainer; names are Lightning 2.x's where it has them."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    limit_train_batches: int | float
    limit_val_batches: int | float
    limit_test_batches: int | float
    limit_predict_batches: int | float
    overfit_batches: int | float
    val_check_interval: int | float
    val_check_time: timedelta | None
    val_check_batch: int | float | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | float
    log_every_n_steps: int
    fast_dev_run: int | bool
    accumulate_grad_batches: int
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: str | None
    inference_mode: bool
    use_distributed_sampler: bool
    reload_dataloaders_every_n_epochs: int
    enable_autolog_hparams: bool
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    deterministic: bool | str | None
    benchmark: bool | None

    hardware: config.Hardware
    profiler: Profiler
    state: TrainerState
    progress: FitProgress
    recorder: Recorder
    callbacks: list[Callback]
    loggers: list[Logger]
    should_stop: bool
    ckpt_path: str | None
    running_device: torch.device | None
    strategy_is_set_up: bool
    num_training_batches: int | float
    num_val_batches: list[int | float]
    num_test_batches: list[int | float]
    num_predict_batches: list[int | float]
    lightning_module: LightningModule
    wrapped_optimizers: list[LightningOptimizer]
    lr_scheduler_configs: list[LRSchedulerConfig]
    _root: str
    _source: DataSource

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self.hardware.accelerator

    @property
    def strategy(self) -> Strategy:
        """How the ranks work together."""
        return self.hardware.strategy

    @property
    def precision_plugin(self) -> Precision:
        """The format of numbers."""
        return self.hardware.precision

    @property
    def precision(self) -> str:
        """Its name, such as "32-true"."""
        return self.hardware.precision.precision

    @property
    def scaler(self) -> Any:
        """The gradient scaler, or None."""
        return self.hardware.precision.scaler

    @property
    def model(self) -> Any:
        """The module."""
        return self.lightning_module

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The data module of the last call, if any."""
        return None if self._source is None else self._source.datamodule

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the fit."""
        return [wrapped.optimizer for wrapped in self.wrapped_optimizers]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.hardware.ranks.world_size

    @property
    def global_rank(self) -> int:
        """This process's rank in the run."""
        return self.strategy.global_rank if self.strategy_is_set_up else self.hardware.ranks.rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine."""
        return self.strategy.local_rank if self.strategy_is_set_up else self.hardware.ranks.local_rank

    @property
    def node_rank(self) -> int:
        """Which machine this is."""
        return self.hardware.ranks.node_rank

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self.hardware.num_nodes

    @property
    def num_devices(self) -> int:
        """Number of devices on this machine."""
        return len(self.hardware.devices)

    @property
    def device_ids(self) -> list[int]:
        """Indices of this machine's devices."""
        return self.hardware.device_ids

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int] | None:
        """Arguments for a `DistributedSampler` of the user's own; None with one rank."""
        return {"num_replicas": self.world_size, "rank": self.global_rank} if self.world_size > 1 else None

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.global_rank == 0

    @property
    def current_epoch(self) -> int:
        """Index of the epoch in progress; after a fit, the number of epochs."""
        return self.progress.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, by all optimizers together."""
        return self.progress.optimizer_steps

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """How many batches of each validation loader the sanity check takes."""
        return [min(self.num_sanity_val_steps, count) for count in self.num_val_batches]

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch just trained on was the last of its epoch."""
        return self.progress.last_batch

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The latest of everything logged, by key, as tensors."""
        return self.recorder.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The latest of what is for the loggers, by key."""
        return self.recorder.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The latest of what was logged with prog_bar=True, by key."""
        return self.recorder.progress_bar_metrics

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    @property
    def log_dir(self) -> str | None:
        """Where the first logger writes; the root folder without one. The same on every rank."""
        if not self.loggers:
            return self.default_root_dir
        logger = self.loggers[0]
        return logger.log_dir if logger.log_dir is not None else logger.save_dir

    @property
    def default_root_dir(self) -> str:
        """Where logs and checkpoints go by default."""
        return self._root

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """The callbacks that write checkpoints."""
        return [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first of them, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """The EarlyStopping callbacks."""
        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first of them, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar, or None."""
        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates."""
        module = self.lightning_module
        return bool(
            self.limit_val_batches
            and module is not None
            and self._source is not None
            and is_overridden("validation_step", module, LightningModule)
            and self._source.defines("val", module)
        )

    @property
    def training(self) -> bool:
        """Whether a batch is being trained on, or an epoch of training is in progress."""
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Whether a validation is in progress."""
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether a test is in progress."""
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Whether predictions are in progress."""
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        """Whether the sanity check is in progress."""
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Whether batches are being scored."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last call was ended by an exception."""
        return self.state.status is TrainerStatus.INTERRUPTED
