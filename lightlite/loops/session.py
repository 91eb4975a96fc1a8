"""What surrounds every loop: a rank takes its place, sets up, runs, and puts things back whatever happens."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightlite import distributed
from lightlite.callbacks.callback import Callback
from lightlite.checkpoint import Restorer
from lightlite.datamodule import LightningDataModule
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.hooks import DataHooks, HookTable, is_overridden
from lightlite.importing import import_what_optimizers_need
from lightlite.loggers import WandbLogger
from lightlite.loops.preemption import Preemption
from lightlite.module import LightningModule
from lightlite.optim import LightningOptimizer, check_monitors, configure, follow_parameters
from lightlite.profilers import PassThroughProfiler
from lightlite.progress import STAGES, TrainerFn, TrainerStatus
from lightlite.utilities.rank_zero import rank_zero_warn
from lightlite.utilities.seed import capture_rng, restore_rng

if TYPE_CHECKING:
    from lightlite.trainer import Trainer


log = logging.getLogger(__name__)


@dataclass
class DataSource:
    """Where loaders come from: what the call was given, else the data module's hooks, else the module's.

    Attributes:
        train: Loaders given to the call, by stage; None where none were.
        val: The same for validation.
        test: The same for test.
        predict: The same for prediction.
        datamodule: The data module, if any.
    """

    train: Any = None
    val: Any = None
    test: Any = None
    predict: Any = None
    datamodule: LightningDataModule | None = None

    def defines(self, prefix: str, module: LightningModule) -> bool:
        """Whether there is a loader for "train", "val", "test" or "predict"."""
        if getattr(self, prefix) is not None:
            return True
        owners = (self.datamodule, module)
        return any(o is not None and is_overridden(f"{prefix}_dataloader", o, DataHooks) for o in owners)

    def request(self, prefix: str, module: LightningModule) -> Any:
        """The loader, or loaders, for "train", "val", "test" or "predict".

        Raises:
            MisconfigurationException: Where there are none.
        """
        given = getattr(self, prefix)
        if given is not None:
            return given
        name = f"{prefix}_dataloader"
        for owner in (self.datamodule, module):
            if owner is not None and is_overridden(name, owner, DataHooks):
                return getattr(owner, name)()
        raise MisconfigurationException(
            f"there is no loader to {prefix if prefix != 'val' else 'validate'} with: pass one to the call, or "
            f"define {name}() in {type(module).__name__} or in a LightningDataModule"
        )


@contextmanager
def session(
    trainer: Trainer,
    ranks: Ranks,
    fn: TrainerFn,
    module: LightningModule,
    source: DataSource,
    ckpt_path: str | None,
    for_trial: bool = False,
) -> Iterator[None]:
    """The life of one call on one rank. The body runs the loop.

    Args:
        trainer: The trainer.
        ranks: This process's place.
        fn: Which entry point was called.
        module: The user's module.
        source: Where loaders come from.
        ckpt_path: A checkpoint to restore from, or None.
        for_trial: Whether all that happens is set up and taken down: no fit begins or ends, so that no hook says so.
    """
    trainer.state.fn, trainer.state.status, trainer.state.stage = fn, TrainerStatus.RUNNING, STAGES[fn]
    trainer.begin(module, source)
    try:
        if fn is TrainerFn.FITTING:
            import_what_optimizers_need()  # rank 0 has the time now, while the others are starting
        trainer.connect(ranks)
        listens = fn is TrainerFn.FITTING and not for_trial
        trainer.preemption = Preemption(trainer)
        with _own_random_state(), trainer.preemption.listening() if listens else nullcontext():
            _set_up(trainer, module, source, fn, ckpt_path, for_trial)
            yield
            _conclude(trainer, module, fn, for_trial)
        trainer.state.status = TrainerStatus.FINISHED
    except BaseException as error:
        _advise(trainer, error)
        _on_exception(trainer, trainer.cause_of(error))
        raise
    finally:
        trainer.end()


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Random numbers of their own for ranks above zero, such as dropout's; afterwards all ranks are alike again."""
    if distributed.world_size() == 1:
        yield
        return
    rank = distributed.rank()
    state = distributed.broadcast_object(capture_rng() if rank == 0 else None)
    if rank > 0:
        digest = hashlib.sha256(state["torch"].numpy().tobytes() + rank.to_bytes(4, "little")).digest()
        restore_rng(state)
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
    yield
    restore_rng(distributed.broadcast_object(capture_rng() if rank == 0 else None))


def _set_up(
    trainer: Trainer,
    module: LightningModule,
    source: DataSource,
    fn: TrainerFn,
    ckpt_path: str | None,
    for_trial: bool,
) -> None:
    trainer.attach_module_callbacks(module)
    _set_up_profiler(trainer, module, fn)
    hooks = trainer.hooks = HookTable(trainer, module, trainer.callbacks, Callback, LightningModule)
    datamodule = source.datamodule
    _prepare_data(trainer, module, datamodule)
    if not for_trial:
        _begin_experiments(trainer)
    if datamodule is not None:
        _recorded(trainer, datamodule, "setup")(fn)
    for call in (*hooks.of_callbacks("setup"), *hooks.of_module("setup")):
        call(fn)
    with trainer.strategy.configuring(module):
        _recorded(trainer, module, "configure_model")()
    trainer.recorder.forget()
    restorer = Restorer(trainer, module, datamodule, ckpt_path)
    restorer.restore_module()
    trainer.precision_plugin.convert_module(module)
    if trainer.sync_batchnorm and trainer.world_size > 1:
        trainer.strategy.synchronize_batchnorm(module)
    training = fn is TrainerFn.FITTING
    trainer.training_step = trainer.strategy.setup(module, training)
    if training:
        _set_up_optimizers(trainer, module)
        trainer.hooks = HookTable(trainer, module, trainer.callbacks, Callback, LightningModule)
    if training and not for_trial:
        trainer.hooks.call("on_fit_start")
    if not for_trial:
        trainer.log_hyperparameters()
    if training:
        trainer.progress.abandon_epoch()
        trainer.resumed_window, trainer.resumed_results, trainer.resumed_random_states = {}, {}, None
        restorer.restore_training()
    module.zero_grad()
    trainer.strategy.barrier("run")


def _set_up_profiler(trainer: Trainer, module: LightningModule, fn: TrainerFn) -> None:
    profiler = trainer.profiler
    if isinstance(profiler, PassThroughProfiler):
        return
    # Over all machines, so that no two ranks write to one file.
    rank = trainer.global_rank if trainer.world_size > 1 else None
    profiler.setup(stage=fn.value, local_rank=rank, log_dir=trainer.log_dir)
    profiler._lightning_module = module


def _recorded(trainer: Trainer, owner: LightningModule | LightningDataModule, name: str) -> Callable[..., Any]:
    """A hook that is called outside of the table, as an action of the profiler."""
    kind = "LightningModule" if isinstance(owner, LightningModule) else "LightningDataModule"
    return trainer.profiler.wrap(f"[{kind}]{type(owner).__name__}.{name}", getattr(owner, name))


def _begin_experiments(trainer: Trainer) -> None:
    """Have the loggers' runs begin before a hook may look for them; W&B's first, which then sees TensorBoard's."""
    for logger in sorted(trainer.loggers, key=lambda logger: not isinstance(logger, WandbLogger)):
        _ = logger.experiment


def _prepare_data(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None) -> None:
    for owner in (datamodule, module):
        if owner is not None and is_overridden("prepare_data", owner, DataHooks):
            first = trainer.local_rank == 0 if owner.prepare_data_per_node else trainer.global_rank == 0
            if first:
                _recorded(trainer, owner, "prepare_data")()
            trainer.strategy.barrier("prepare_data")


def _set_up_optimizers(trainer: Trainer, module: LightningModule) -> None:
    optimizers, schedulers = configure(_recorded(trainer, module, "configure_optimizers")())
    if not optimizers:
        rank_zero_warn(f"{type(module).__name__}.configure_optimizers returned no optimizer: nothing is trained")
    if module.automatic_optimization and len(optimizers) > 1:
        raise MisconfigurationException(
            f"{type(module).__name__}.configure_optimizers returned {len(optimizers)} optimizers, which automatic "
            "optimization cannot tell when to step; set self.automatic_optimization = False in __init__ and step "
            "them in training_step"
        )
    if module.automatic_optimization:
        check_monitors(schedulers)
    trainer.lr_scheduler_configs = schedulers
    trainer.wrapped_optimizers = [LightningOptimizer(optimizer) for optimizer in optimizers]
    for wrapped in trainer.wrapped_optimizers:
        wrapped.scaler, wrapped.peers = trainer.precision_plugin.scaler, trainer.wrapped_optimizers
        wrapped.no_sync = trainer.strategy.no_sync
        wrapped.toggled = module.toggled_optimizer


def _conclude(trainer: Trainer, module: LightningModule, fn: TrainerFn, for_trial: bool) -> None:
    trainer.strategy.teardown()
    for wrapped in trainer.wrapped_optimizers:
        follow_parameters(wrapped.optimizer)
    if fn is TrainerFn.FITTING and not for_trial:
        trainer.hooks.call("on_fit_end")
    _teardown_hooks(trainer, fn)
    trainer.strategy.checkpoint_io.teardown()
    if not for_trial:
        for logger in trainer.loggers:
            logger.finalize("success")
    trainer.profiler.describe()


def _teardown_hooks(trainer: Trainer, fn: TrainerFn) -> None:
    if trainer.datamodule is not None:
        _recorded(trainer, trainer.datamodule, "teardown")(fn)
    for call in trainer.hooks.resolve("teardown"):
        call(fn)


def _advise(trainer: Trainer, error: BaseException) -> None:
    """Add to an error what the device it comes from has to say about it."""
    advice = trainer.strategy.accelerator.advice(error) if trainer.strategy_is_set_up else ""
    if advice and hasattr(error, "add_note"):
        error.add_note(advice)
    elif advice:
        log.error("%s: %s", error, advice)


def _on_exception(trainer: Trainer, error: BaseException) -> None:
    """Tell callbacks and loggers. What they raise in turn must not hide the error itself."""
    trainer.state.status = TrainerStatus.INTERRUPTED
    calls: list[Callable[[], Any]] = []
    if trainer.hooks:
        calls += [functools.partial(call, error) for call in trainer.hooks.of_callbacks("on_exception")]
    if trainer.datamodule is not None:
        calls.append(functools.partial(trainer.datamodule.on_exception, error))
    calls += [functools.partial(logger.finalize, "failed") for logger in trainer.loggers]
    calls += [trainer.profiler.describe, trainer.strategy.checkpoint_io.teardown]
    if trainer.strategy_is_set_up:
        calls.append(trainer.strategy.teardown)
    with distributed.alone():
        for call in calls:
            try:
                call()
            except Exception as further:
                log.warning("while a %s was handled, this was raised as well: %r", type(error).__name__, further)
