"""Trainer: turns its arguments into plugins, and its calls into runs on every rank."""

from __future__ import annotations

import functools
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from lightlite import checkpoint, config, distributed, formerly, storage
from lightlite.callbacks import (
    Callback,
    Checkpoint,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightlite.datamodule import LightningDataModule
from lightlite.errors import MisconfigurationException
from lightlite.hooks import is_overridden
from lightlite.interfaces import Accelerator, ClusterEnvironment, Precision, Strategy
from lightlite.loggers import CSVLogger, DummyLogger, Logger
from lightlite.loops.evaluate import run_evaluation, run_predict
from lightlite.loops.fit import run_fit
from lightlite.loops.session import DataSource
from lightlite.loops.trial import run_search
from lightlite.module import LightningModule
from lightlite.optim import LightningOptimizer, LRSchedulerConfig
from lightlite.profilers import Profiler
from lightlite.progress import STAGES, FitProgress, TrainerFn, TrainerState
from lightlite.registry import callbacks_of_packages
from lightlite.results import Recorder
from lightlite.run import SESSION, Run, in_order
from lightlite.utilities import files
from lightlite.utilities.compile import from_compiled
from lightlite.utilities.initialisation import NoInitialisation
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

GOING_ON = ("last", "auto", "hpc")
"""What `ckpt_path` is where a run goes on that had ended before its time."""

PREEMPTED = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


class Trainer(Run):
    """Trains, validates, tests and predicts with a LightningModule, on one device or many.

    Arguments have Lightning 2.x's names, meanings and defaults.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda", "mps", the name of an installed plugin, or an Accelerator. "ddp" is
            short for automatic hardware with the ddp strategy.
        strategy: "auto", "single", "ddp", another registered name, or a Strategy. With several devices "auto" is ddp.
        devices: How many devices, which ("0,2", [0, 2]), or "auto" and -1 for all; on the CPU, how many processes.
        num_nodes: Number of machines; somebody has to start the ranks on each.
        precision: "32-true" (default), "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"; or 16, 32, 64,
            "bf16".
        logger: A Logger, several, True for the default one, False for none.
        callbacks: A Callback or several.
        fast_dev_run: Run that many batches (True: one) of everything, without logging or checkpoints.
        max_epochs: Stop after so many epochs; -1 for no limit. 1000 if neither it nor max_steps nor max_time is given.
        min_epochs: Train at least so many.
        max_steps: Stop after so many optimizer steps; -1 for no limit.
        min_steps: Train at least so many.
        max_time: Stop after a duration: "DD:HH:MM:SS", a timedelta, or a dict of its arguments.
        limit_train_batches: How many (int), or what share (float), of the global batches of an epoch.
        limit_val_batches: The same of each validation loader, over all ranks.
        limit_test_batches: The same of each test loader.
        limit_predict_batches: The same of each prediction loader.
        overfit_batches: Train and validate on so many batches, unshuffled.
        val_check_interval: Validate after a share of an epoch (float), so many batches (int), or a duration.
        check_val_every_n_epoch: Validate every that many epochs; None to count batches across epochs.
        num_sanity_val_steps: Validation batches to try before training (default 2); -1 for all.
        log_every_n_steps: Send step values to the loggers every so many steps (default 50); 0 for never.
        enable_checkpointing: Whether a ModelCheckpoint is there by default.
        enable_progress_bar: Whether a progress bar is there by default.
        enable_model_summary: Whether the model is summarized at the start of fit.
        accumulate_grad_batches: Step the optimizer every so many batches, with the gradient of all of them.
        gradient_clip_val: Clip gradients to this; None for no clipping.
        gradient_clip_algorithm: "norm" (default) or "value".
        deterministic: Use deterministic algorithms only; "warn" to be warned of others.
        benchmark: Whether cuDNN looks for the fastest algorithms; None leaves it as it is.
        inference_mode: Evaluate under `torch.inference_mode` rather than `torch.no_grad`; within fit, validation is
            always under the latter.
        use_distributed_sampler: Whether to deal batches out to ranks; False if the data is split by rank already.
        profiler: What records where the time goes: "simple", "advanced", "pytorch", a Profiler, or None for nothing.
        detect_anomaly: Whether autograd looks for the operation that made a NaN.
        barebones: Switch off everything that costs time: bar, loggers, checkpoints, summary, sanity check.
        plugins: A Precision, ClusterEnvironment, or list of them.
        sync_batchnorm: Whether batch normalization computes its statistics over all ranks.
        reload_dataloaders_every_n_epochs: Ask for the loaders anew every so many epochs.
        default_root_dir: Where logs and checkpoints go; the working directory by default.
        enable_autolog_hparams: Whether hyper-parameters are logged at the start.
        model_registry: Accepted for compatibility.
        timeout: How long a rank may keep the others waiting before the run is ended, as hanging: seconds, a timedelta,
            "DD:HH:MM:SS", or a dict of timedelta's arguments. None (default) leaves it to the strategy: 30 minutes.

    Raises:
        MisconfigurationException: For a wrong argument, saying what was given and what is allowed.
    """

    @formerly.explain_arguments
    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: config.PrecisionName | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: Callback | list[Callback] | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Profiler | str | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Precision | ClusterEnvironment | list[Precision | ClusterEnvironment] | None = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | Path | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        timeout: float | str | timedelta | dict[str, float] | None = None,
    ) -> None:
        if barebones:
            config.check_barebones(
                logger,
                enable_checkpointing,
                enable_progress_bar,
                enable_model_summary,
                fast_dev_run,
                detect_anomaly,
                profiler,
            )
            logger = enable_checkpointing = enable_progress_bar = enable_model_summary = False
            num_sanity_val_steps = log_every_n_steps = 0
        self.limits = config.Limits(
            max_epochs, min_epochs, max_steps, min_steps, limit_train_batches, limit_val_batches, limit_test_batches,
            limit_predict_batches, overfit_batches, val_check_interval, check_val_every_n_epoch, num_sanity_val_steps,
            log_every_n_steps, fast_dev_run,
        )  # fmt: skip
        self.__dict__.update(vars(self.limits))
        config.check_clipping(gradient_clip_val, gradient_clip_algorithm)
        config.check_count(accumulate_grad_batches, "accumulate_grad_batches", least=1)
        config.check_count(reload_dataloaders_every_n_epochs, "reload_dataloaders_every_n_epochs", least=0)
        self.profiler = config.profiler(profiler)
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.inference_mode, self.use_distributed_sampler = inference_mode, use_distributed_sampler
        self.detect_anomaly, self.barebones, self.sync_batchnorm = detect_anomaly, barebones, sync_batchnorm
        self.reload_dataloaders_every_n_epochs = reload_dataloaders_every_n_epochs
        self.enable_autolog_hparams = enable_autolog_hparams
        self._root = os.path.abspath(os.fspath(default_root_dir)) if default_root_dir is not None else os.getcwd()
        self._max_time = None if max_time is None else config.duration(max_time, "max_time")
        self.deterministic, self.benchmark = deterministic, benchmark
        self.hardware = config.choose_hardware(accelerator, strategy, devices, num_nodes, precision, plugins)
        config.set_algorithms(self.hardware.accelerator, deterministic, benchmark)
        if timeout is not None:
            self.hardware.strategy.timeout = config.patience(timeout)
        self._begin_state()
        self._launcher = self.hardware.start_launcher()
        self.loggers = self._loggers(logger)
        self._own_callbacks = self._callbacks(
            callbacks, enable_checkpointing, enable_progress_bar, enable_model_summary
        )
        self.callbacks = list(self._own_callbacks)

    # What follows is set up in this order: state, plugins, loggers, callbacks.

    def _begin_state(self) -> None:
        self.state = TrainerState()
        self.progress = FitProgress()
        self.recorder = Recorder()
        self.should_stop = False
        self.ckpt_path: str | None = None
        self.running_device: torch.device | None = None
        self.strategy_is_set_up = False
        self.val_check_batch: int | float | None = None
        self.num_training_batches: int | float = math.inf
        self.num_val_batches: list[int | float] = []
        self.num_test_batches: list[int | float] = []
        self.num_predict_batches: list[int | float] = []
        self.epoch_random_state: dict[str, Any] | None = None
        self.run_id, self.goes_on = "", False
        self.received_sigterm = False
        self.resumed_window: dict[str, Any] = {}
        self.resumed_results: dict[str, Any] = {}
        self.resumed_random_states: dict[str, Any] | None = None
        for name in SESSION:
            setattr(self, name, None)
        self.wrapped_optimizers: list[LightningOptimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []

    def _loggers(self, given: Any) -> list[Logger]:
        if self.fast_dev_run:
            return [DummyLogger()] if given is not False else []
        if given is False:
            return []
        if given is None or given is True:
            return [default_logger(self._root)]
        return config.as_instances(given, Logger, "logger", "or True or False")  # type: ignore[type-abstract]

    def _callbacks(
        self, given: Any, checkpointing: bool | None, bar: bool | None, summary: bool | None
    ) -> list[Callback]:
        callbacks = [] if given is None else config.as_instances(given, Callback, "callbacks")
        has = functools.partial(_has, callbacks)
        for flag, kind, name in (
            (checkpointing, Checkpoint, "enable_checkpointing"),
            (bar, ProgressBar, "enable_progress_bar"),
            (summary, ModelSummary, "enable_model_summary"),
        ):
            if flag is False and has(kind) and not self.barebones:
                raise MisconfigurationException(
                    f"{name}=False, but callbacks holds a {type(has(kind)).__name__}; leave out one of the two"
                )
        if checkpointing is not False and not has(Checkpoint) and not self.fast_dev_run:
            callbacks.append(ModelCheckpoint())
        if bar is not False and not has(ProgressBar):
            callbacks.append(TQDMProgressBar())
        if summary is not False and not has(ModelSummary):
            callbacks.append(ModelSummary())
        if self._max_time is not None and not has(Timer):
            callbacks.append(Timer(duration=self._max_time))
        for origin, made in callbacks_of_packages():
            callbacks += config.as_instances(made, Callback, origin)
        return in_order(callbacks)

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train a module.

        Args:
            model: The module.
            train_dataloaders: An iterable of batches, a nest of them, or a LightningDataModule. By default the module's
                `train_dataloader`.
            val_dataloaders: An iterable of batches, or several, to validate on.
            datamodule: Where loaders come from instead.
            ckpt_path: Go on from this checkpoint: a path, "last" for the newest, "auto" for the newest if there is one
                yet, "hpc" for what was saved when a signal told a fit to end, "best".
            weights_only: Accepted for compatibility; nothing in a file is ever executed.

        Raises:
            MisconfigurationException: For a module or loaders that cannot be trained with.
            CheckpointError: For a checkpoint that cannot be used.
        """
        module, source = self._prepared_fit(model, train_dataloaders, val_dataloaders, datamodule)
        path = self._choose_checkpoint("fit", ckpt_path, True)
        self.run_id, self.goes_on = uuid.uuid4().hex, ckpt_path in GOING_ON
        self._on_every_rank(run_fit)(self, module, source, path)

    def _prepared_fit(
        self, model: Any, train_dataloaders: Any, val_dataloaders: Any, datamodule: Any
    ) -> tuple[LightningModule, DataSource]:
        module = _unwrapped(model, "fit")
        _require(module, "training_step", "(self, batch, batch_idx) that returns a loss")
        _require(module, "configure_optimizers", "(self) that returns an optimizer")
        source = _source("fit", module, datamodule, train=train_dataloaders, val=val_dataloaders)
        self.max_epochs = config.bound_epochs(self.max_epochs, self.max_steps, self._max_time is not None)
        self.should_stop = self.received_sigterm = False
        return module, source

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Score every sample of the validation data once.

        Args:
            model: The module; by default that of the last call, with its best checkpoint.
            dataloaders: An iterable of batches, several, or a LightningDataModule.
            ckpt_path: Load this checkpoint first: a path, "best" or "last".
            verbose: Whether to print the values as a table.
            datamodule: Where loaders come from instead.
            weights_only: Accepted for compatibility.

        Returns:
            For each loader, the values logged on_epoch, by key; the same on any number of ranks, and on every one.
        """
        return self._evaluate(TrainerFn.VALIDATING, model, dataloaders, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Score every sample of the test data once. Arguments and result are those of `validate`."""
        return self._evaluate(TrainerFn.TESTING, model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predict every batch once.

        Args:
            model: The module; by default that of the last call, with its best checkpoint.
            dataloaders: An iterable of batches, several, or a LightningDataModule.
            datamodule: Where loaders come from instead.
            return_predictions: False to return nothing, where a callback writes the predictions.
            ckpt_path: Load this checkpoint first: a path, "best" or "last".
            weights_only: Accepted for compatibility.

        Returns:
            What `predict_step` returned for each batch, in the loader's order, whole on every rank; a list of such
            lists with several loaders; None with `return_predictions=False`, or without a batch.
        """
        module, path, source = self._prepared(TrainerFn.PREDICTING, model, dataloaders, ckpt_path, datamodule)
        keep = True if return_predictions is None else return_predictions
        return self._on_every_rank(run_predict)(self, module, source, path, keep)

    def _evaluate(
        self, fn: TrainerFn, model: Any, dataloaders: Any, ckpt_path: Any, verbose: bool, datamodule: Any
    ) -> list[dict[str, float]]:
        module, path, source = self._prepared(fn, model, dataloaders, ckpt_path, datamodule)
        _require(module, f"{STAGES[fn].hook_prefix}_step", "(self, batch, batch_idx)")
        metrics: list[dict[str, float]] = self._on_every_rank(run_evaluation)(self, fn, module, source, path, verbose)
        return metrics

    def search(
        self,
        method: str,
        search: Callable[[Trainer, LightningModule], Any],
        model: LightningModule,
        dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
    ) -> Any:
        """Set up what `method` needs, and call `search(trainer, module)` on every rank in its place: for the Tuner.

        Args:
            method: "fit", "validate", "test" or "predict".
            search: What to call; what it returns on rank zero is returned.
            model: The module.
            dataloaders: What the method is given to train on, or to evaluate.
            val_dataloaders: What fit is given to validate on.
            datamodule: Where loaders come from instead.
        """
        fn = TrainerFn(method)
        if fn is TrainerFn.FITTING:
            module, source = self._prepared_fit(model, dataloaders, val_dataloaders, datamodule)
        else:
            module, _, source = self._prepared(fn, model, dataloaders, None, datamodule)
        return self._on_every_rank(run_search)(self, fn, module, source, search)

    def _prepared(
        self, fn: TrainerFn, model: Any, dataloaders: Any, ckpt_path: Any, datamodule: Any
    ) -> tuple[LightningModule, str | None, DataSource]:
        if model is None and self.lightning_module is None:
            raise TypeError(f"Trainer.{fn}() needs a model: there was no earlier call whose module it could take")
        path = self._choose_checkpoint(fn.value, ckpt_path, model is not None)
        module = self.lightning_module if model is None else _unwrapped(model, fn.value)
        prefix = STAGES[fn].dataloader_prefix
        if model is None and dataloaders is None and datamodule is None and self._source is not None:
            datamodule = self._source.datamodule
        return module, path, _source(fn.value, module, datamodule, **{prefix: dataloaders})

    def _on_every_rank(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its first argument, the rank's place, filled in; run on every rank of this script."""
        if self._launcher is None:
            return functools.partial(function, self.hardware.ranks)
        return functools.partial(self._launcher.run, function)

    def _choose_checkpoint(self, fn: str, given: Any, model_given: bool) -> str | None:
        self.strategy.checkpoint_io.wait()
        self.ckpt_path = self._find_checkpoint(fn, given, model_given)
        return self.ckpt_path

    def _find_checkpoint(self, fn: str, given: Any, model_given: bool) -> str | None:
        if given is None:
            if model_given:
                return None
            best = getattr(self.checkpoint_callback, "best_model_path", "")
            if best:
                rank_zero_info(f"Trainer.{fn}: loading the best checkpoint of the fit, {best}")
                return str(best)
            rank_zero_info(f"Trainer.{fn}: there is no checkpoint of a fit; the module's present weights are used")
            return None
        if given == "best":
            best = getattr(self.checkpoint_callback, "best_model_path", "")
            if not best:
                raise MisconfigurationException(
                    f"Trainer.{fn}(ckpt_path='best'): no fit of this Trainer has written a checkpoint; give a "
                    "path, or fit with a ModelCheckpoint first"
                )
            return str(best)
        if given == "hpc":
            preempted = self._preempted_checkpoints()
            if not preempted:
                raise MisconfigurationException(
                    f"Trainer.{fn}(ckpt_path='hpc'): in {self.default_root_dir} there is no hpc_ckpt_*.ckpt, as a fit "
                    "leaves it that a signal told to end; give a path, or 'auto' to start from the beginning then"
                )
            return preempted[-1]
        if given in ("last", "auto"):
            newest = self._newest_checkpoint()
            if newest is None and given == "last":
                rank_zero_warn(
                    f"Trainer.{fn}(ckpt_path='last'): there is no checkpoint yet; starting from the beginning"
                )
            return newest
        if not isinstance(given, (str, os.PathLike)):
            raise MisconfigurationException(
                f"Trainer.{fn}(ckpt_path={given!r}) of type {type(given).__name__}; give a path, 'best', 'last', "
                "'auto', 'hpc' or None"
            )
        path: str = os.fspath(given)
        storage.require(path)
        return path

    def _newest_checkpoint(self) -> str | None:
        """The newest sound checkpoint: of those that were saved as the newest state, else of all beside them."""
        callbacks = [callback for callback in self.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        whole = [callback for callback in callbacks if not callback.save_weights_only]
        for find, among in (
            (ModelCheckpoint.find_last_checkpoints, callbacks),
            (ModelCheckpoint.find_checkpoints, whole),
        ):
            found = {path for callback in among for path in find(callback, self) if storage.exists(path)}
            found |= set(self._preempted_checkpoints())
            for path in sorted(found, key=storage.modified, reverse=True):
                damage = self.strategy.checkpoint_io.damage(path)
                if damage is None:
                    return path
                rank_zero_warn(f"ckpt_path='last' steps over the newest checkpoint, which is no sound one: {damage}")
        return None

    def _preempted_checkpoints(self) -> list[str]:
        """What fits have saved that were told to end, the newest last."""
        folder = self.default_root_dir
        numbered = [(int(found[1]), name) for name in files.names_in(folder) if (found := PREEMPTED.fullmatch(name))]
        return [os.path.join(folder, name) for _, name in sorted(numbered)]

    def save_preempted(self) -> str:
        """Save where a fit is that is told to end, in the place of what an earlier one saved. A collective call."""
        former = self._preempted_checkpoints() if self.is_global_zero else []
        number = 1 + (int(PREEMPTED.fullmatch(os.path.basename(former[-1]))[1]) if former else 0)  # type: ignore[index]
        path: str = distributed.broadcast_object(os.path.join(self.default_root_dir, f"hpc_ckpt_{number}.ckpt"))
        self.save_checkpoint(path)
        self.strategy.checkpoint_io.wait()
        for earlier in former:
            self.strategy.checkpoint_io.remove_checkpoint(earlier)
        return path

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """A block in which new modules are made on this process's device, in the format of the precision.

        Args:
            empty_init: Whether to leave out their initialisation, where weights are loaded afterwards.
        """
        device = self.hardware.devices[self.local_rank]
        unset = NoInitialisation() if empty_init else nullcontext()
        with device, self.precision_plugin.init_context(), unset:
            yield

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint. Every rank has to call it.

        Args:
            filepath: Path or URL.
            weights_only: Leave out what is only needed to go on training.
            storage_options: For a CheckpointIO of `Trainer(plugins=…)` that has some.
        """
        if self.lightning_module is None:
            raise AttributeError(
                "there is nothing to save yet: the Trainer has no module; call fit, validate or test first"
            )
        with self.profiler.profile("save_checkpoint"):
            content = checkpoint.dump(self, bool(weights_only))
            self.strategy.save_checkpoint(content, filepath, storage_options)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero only."""
        if distributed.rank() == 0:
            print(*args, **kwargs)  # noqa: T201

    def close(self) -> None:
        """End the helper processes; a further call starts them anew."""
        if self._launcher is not None:
            self._launcher.close()


def default_logger(root: str) -> Logger:
    """TensorBoard's where it is installed, as in Lightning; else CSV."""
    from importlib.util import find_spec

    from lightlite.loggers import TensorBoardLogger

    return TensorBoardLogger(root) if find_spec("tensorboard") is not None else CSVLogger(root)


def _has(callbacks: list[Callback], kind: type) -> Callback | None:
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _unwrapped(model: Any, fn: str) -> LightningModule:
    compiled = isinstance(getattr(model, "_orig_mod", None), LightningModule)
    module = from_compiled(model) if compiled else model
    if not isinstance(module, LightningModule):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"Trainer.{fn}() was given {given} as model; give an instance of a LightningModule (wrap an "
            "nn.Module in one: see 'From PyTorch to lightlite' in the README)"
        )
    formerly.check_hooks(module, fn)
    return module


def _require(module: LightningModule, name: str, signature: str) -> None:
    if not is_overridden(name, module, LightningModule):
        raise MisconfigurationException(f"{type(module).__name__} has no {name}; define {name}{signature}")


def _source(fn: str, module: LightningModule, datamodule: Any, **loaders: Any) -> DataSource:
    """Where a call's loaders come from; a data module may stand in a loader's place."""
    for name, loader in loaders.items():
        if isinstance(loader, LightningDataModule):
            datamodule, loaders = loader, {**loaders, name: None}
    if datamodule is not None:
        if not isinstance(datamodule, LightningDataModule):
            raise TypeError(f"datamodule={datamodule!r} ({type(datamodule).__name__}); give a LightningDataModule")
        if any(loader is not None for loader in loaders.values()):
            raise MisconfigurationException(f"Trainer.{fn}() was given loaders and a data module; give one of the two")
    source = DataSource(**loaders, datamodule=datamodule)
    needed = "train" if fn == "fit" else next(iter(loaders))
    if not source.defines(needed, module):
        source.request(needed, module)
    return source
