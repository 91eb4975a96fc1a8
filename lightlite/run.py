"""What the loops ask of a trainer in the course of one call, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightlite import config
from lightlite.callbacks import Callback, Checkpoint, GradientAccumulationScheduler
from lightlite.data import RankLoader, RankLoaders, combined, limit_of, one_by_one, rank_loader, sequential, undropped
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.facts import TrainerFacts
from lightlite.hooks import HookTable, is_overridden
from lightlite.interfaces import Launcher
from lightlite.loops.session import DataSource
from lightlite.loops.trial import rehearsal
from lightlite.module import LightningModule
from lightlite.optim import settle
from lightlite.progress import RunningStage, TrainerFn
from lightlite.results import Recorder
from lightlite.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightlite.loops.evaluate import PredictionLoop, _BatchLoop
    from lightlite.loops.fit import FitLoop
    from lightlite.loops.preemption import Preemption
    from lightlite.trainer import Trainer

SESSION = (
    "hooks",
    "training_step",
    "wrapped_optimizers",
    "lr_scheduler_configs",
    "fit_loop",
    "predict_loop",
    "evaluation_loop",
    "lightning_module",
    "_source",
    "_launcher",
    "open_loaders",
    "preemption",
    "_loader",
    "_evaluated",
)
"""What belongs to one process and one call, and is not sent to other ranks."""


class Run(TrainerFacts):
    """A Trainer's part in a run: taking a place, loading data, logging, and what steps need."""

    hooks: HookTable
    fit_loop: FitLoop
    predict_loop: PredictionLoop
    evaluation_loop: _BatchLoop | None
    training_step: Callable[..., Any] | None
    epoch_random_state: dict[str, Any] | None
    resumed_random_states: dict[str, Any] | None
    run_id: str
    goes_on: bool
    resumed_window: dict[str, Any]
    resumed_results: dict[str, Any]
    _own_callbacks: list[Callback]
    open_loaders: list[RankLoader | RankLoaders]
    preemption: Preemption
    closing_epoch: bool
    """Set by a callback that needs one more epoch after training, in which nothing is trained; see `FitLoop.done`."""
    _loader: RankLoader | RankLoaders | None
    _launcher: Launcher | None
    _evaluated: dict[str, Any] | None

    def __getstate__(self) -> dict[str, Any]:
        own = dict.fromkeys(SESSION)
        own.update(wrapped_optimizers=[], lr_scheduler_configs=[])
        return {**self.__dict__, **own, "recorder": Recorder()}

    def begin(self, module: LightningModule, source: DataSource) -> None:
        """A call begins on this rank."""
        self.lightning_module, self._source = module, source
        self.recorder.module = module
        self.__dict__.update(hooks=None, _loader=None, open_loaders=[], evaluation_loop=None)
        self.closing_epoch = False
        config.set_algorithms(self.hardware.accelerator, self.deterministic, self.benchmark)
        trainer = cast("Trainer", self)
        module.attach(trainer, None if self.barebones else self.recorder)
        if source.datamodule is not None:
            source.datamodule.trainer = trainer
        self._anomaly = torch.is_anomaly_enabled()
        torch.autograd.set_detect_anomaly(self.detect_anomaly or self._anomaly)

    def connect(self, ranks: Ranks) -> None:
        """Take this rank's place."""
        self.running_device = self.hardware.connect(ranks)
        self.strategy_is_set_up = True
        for logger in self.loggers:
            logger.share(self.strategy.broadcast)

    def cause_of(self, error: BaseException) -> BaseException:
        """What the caller is to learn of where `error` was raised here; see `Launcher.cause_of`."""
        return error if self._launcher is None else self._launcher.cause_of(error)

    def end(self) -> None:
        """The call is over on this rank, well or not."""
        self.running_device = None
        self.strategy.checkpoint_io.on_failure = None
        self.hardware.disconnect()
        self.strategy_is_set_up = False
        self.state.stage = None
        self.recorder.active = self.recorder.hook = self.recorder.batch = None
        self.training_step = None
        for loader in self.open_loaders:
            loader.close()
        self.open_loaders = []
        for callback in self.callbacks:
            callback._logs_to = None
        torch.autograd.set_detect_anomaly(self._anomaly)

    def attach_module_callbacks(self, module: LightningModule) -> None:
        """Add what `configure_callbacks` returns, in place of callbacks of the same type."""
        wanted = module.configure_callbacks()
        wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
        kinds = {type(callback) for callback in wanted}
        kept = [callback for callback in self._own_callbacks if type(callback) not in kinds]
        others = [
            callback
            for callback in self.callbacks
            if callback not in self._own_callbacks and type(callback) not in kinds
        ]
        self.callbacks = in_order([*kept, *others, *wanted])
        for callback in self.callbacks:
            callback._logs_to = module

    def load(self, stage: RunningStage) -> list[Any]:
        """The loaders of an evaluation, in order."""
        prefix = stage.dataloader_prefix
        with self.profiler.profile(f"{prefix}_dataloader"):
            loaders = self._source.request(prefix, self.lightning_module)
        self._evaluated = {**(self._evaluated or {}), prefix: getattr(loaders, "iterables", loaders)}
        loaders = one_by_one(combined(loaders, "sequential", f"the {prefix} loader"))
        if prefix == "predict":
            loaders = [undropped(loader) for loader in loaders]
        if self.overfit_batches and self.state.fn is TrainerFn.FITTING:
            loaders = [sequential(loader) for loader in loaders]
        return loaders

    def load_training(self) -> RankLoader | RankLoaders:
        """What this rank iterates in training."""
        with self.profiler.profile("train_dataloader"):
            loaders = self._source.request("train", self.lightning_module)
        loaders = combined(loaders, "max_size_cycle", "the train loader")
        if self.overfit_batches:
            loaders = sequential(loaders)
        self._loader = rank_loader(
            loaders, training=True, deal=self.use_distributed_sampler, pin=self.strategy.accelerator.pin_memory
        )
        self.open_loaders.append(self._loader)
        return self._loader

    def loader_state(self) -> dict[str, Any] | None:
        """State of the generators that the training loader owns."""
        return None if self._loader is None else self._loader.state_dict()

    def has_validation(self, module: LightningModule) -> bool:
        """Whether there is both a validation_step and something to validate on."""
        step = is_overridden("validation_step", module, LightningModule)
        loader = self._source is not None and self._source.defines("val", module)
        if loader and not step:
            rank_zero_warn(
                f"there is a val loader, but {type(module).__name__} has no validation_step: nothing is validated"
            )
        if step and not loader:
            rank_zero_warn(
                f"{type(module).__name__} has a validation_step, but there is no val loader: nothing is validated"
            )
        return step and loader

    def note_batches(self, stage: RunningStage, counts: Sequence[int | None]) -> None:
        """Make the numbers of batches known under `num_<stage>_batches`."""
        setattr(
            self,
            f"num_{stage.dataloader_prefix}_batches",
            [float("inf") if count is None else count for count in counts],
        )

    def rehearsal(
        self, callbacks: Sequence[Callback] = (), **settings: Any
    ) -> AbstractContextManager[Callable[[], None]]:
        """A context in which the present call may be tried, and after which all is as before; see `loops.trial`."""
        return rehearsal(cast("Trainer", self), callbacks, **settings)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Hand values to the loggers, on rank zero.

        Args:
            metrics: Value by key; a key "step" gives the step instead of being logged.
            step: The x-axis; by default the number of batches after which the optimizer stepped.
        """
        if not metrics:
            return
        values = dict(metrics)
        if step is None and "step" in values:
            step = int(values.pop("step"))
        self.recorder.logged.update({key: torch.tensor(value) for key, value in values.items()})
        if step is None:  # another x-axis would put epochs at steps of another meaning
            step = self.progress.batches_that_stepped
            values.setdefault("epoch", self.current_epoch)
        if self.is_global_zero:
            for logger in self.loggers:
                logger.log_metrics(metrics=values, step=step)
                if not logger.saves_by_itself:
                    logger.save()

    def log_hyperparameters(self) -> None:
        """Hand the hyper-parameters of the module and the data module to the loggers."""
        if not self.loggers or not self.enable_autolog_hparams or not self.is_global_zero:
            return
        owners = [owner for owner in (self.lightning_module, self.datamodule) if owner is not None]
        hparams: dict[str, Any] = {}
        for owner in owners:
            if owner._log_hyperparams:
                hparams.update(owner.hparams_initial)
        for logger in self.loggers:
            if hparams:
                logger.log_hyperparams(hparams)
            logger.log_graph(self.lightning_module)
            logger.save()

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """See `LightningModule.manual_backward`."""
        scaler = self.precision_plugin.scaler
        if scaler is not None:
            settle(scaler, self.wrapped_optimizers)
        for hook in self.hooks.resolve("on_before_backward"):
            hook(loss)
        with self.profiler.profile("backward"):
            self.lightning_module.backward(loss if scaler is None else scaler.scale(loss), *args, **kwargs)
        self.strategy.sync_gradients(self.lightning_module.parameters())
        for optimizer in self.wrapped_optimizers:
            optimizer.gradients_wait = True
        for hook in self.hooks.resolve("on_after_backward"):
            hook()

    def clip_gradients(self, optimizer: Any, value: float | None, algorithm: str | None) -> None:
        """See `LightningModule.clip_gradients`."""
        value = self.gradient_clip_val if value is None else value
        algorithm = (algorithm or self.gradient_clip_algorithm or "norm").lower()
        config.check_clipping(value, algorithm)
        if not value:
            return
        for wrapped in self.wrapped_optimizers:
            if wrapped.optimizer is getattr(optimizer, "optimizer", optimizer):
                wrapped.unscale()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.strategy.clip_gradients(parameters, value, algorithm)

    @property
    def train_dataloader(self) -> Any:
        """The training loader of the fit, or None."""
        return None if self._loader is None else self._loader.loader

    @property
    def val_dataloaders(self) -> Any:
        """What was last given, or asked of the module or data module, to validate on, in fit too; None before that."""
        return (self._evaluated or {}).get("val")

    @property
    def test_dataloaders(self) -> Any:
        """The same of test."""
        return (self._evaluated or {}).get("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The same of prediction."""
        return (self._evaluated or {}).get("predict")

    @property
    def estimated_stepping_batches(self) -> int | float:
        """How many optimizer steps the fit will take, for schedulers; infinite without a limit."""
        if self.max_epochs == -1:
            return float("inf") if self.max_steps == -1 else self.max_steps
        loader = self.load_training() if self._loader is None else self._loader
        count = limit_of(self.limit_train_batches, loader.length, "limit_train_batches")
        if count is None:
            return self.max_steps if self.max_steps != -1 else float("inf")
        steps = sum(-(-count // factor) for factor in self._accumulation(max(self.max_epochs or 0, 1)))
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    def _accumulation(self, epochs: int) -> list[int]:
        """Over how many batches each of the first epochs accumulates gradients."""
        schedule = next((one for one in self.callbacks if isinstance(one, GradientAccumulationScheduler)), None)
        if schedule is None:
            return [self.accumulate_grad_batches] * epochs
        return [schedule.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]


def in_order(callbacks: list[Callback]) -> list[Callback]:
    """The callbacks in their order, but those that write checkpoints after all others.

    Raises:
        MisconfigurationException: For two whose states a checkpoint could not tell apart.
    """
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        if (
            is_overridden("state_dict", callback, Callback)
            and seen.setdefault(callback.state_key, callback) != callback
        ):
            raise MisconfigurationException(
                f"there are two callbacks with the state_key {callback.state_key!r}, so that a checkpoint could not "
                "tell their states apart; give them different arguments of those it names, or override state_key"
            )
    return sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))
