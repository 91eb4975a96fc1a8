"""What a checkpoint holds, and how a trainer goes on from one.

The layout is Lightning 2.x's. What Lightning has no place for lies under "lightlite": counters, the random
state of every rank, and the random state from which the epoch's order was drawn, by which the place in the
data is found again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightlite import distributed, storage
from lightlite.datamodule import LightningDataModule
from lightlite.errors import CheckpointError, MismatchedCheckpointError
from lightlite.hooks import CheckpointHooks, is_overridden
from lightlite.module import LightningModule
from lightlite.progress import FitProgress, TrainerFn
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightlite.utilities.seed import capture_rng

if TYPE_CHECKING:
    from lightlite.trainer import Trainer

LAYOUT_VERSION = "2.6.0"
"""The Lightning version whose layout this is."""

FORMAT = 1
"""Version of what lies under "lightlite"; higher where an older lightlite would go on from it wrongly."""


def dump(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """Everything that a checkpoint of this moment holds. A collective call.

    Args:
        trainer: The trainer.
        weights_only: Leave out what is only needed to go on training.
    """
    module, datamodule = trainer.lightning_module, trainer.datamodule
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": LAYOUT_VERSION,
        "state_dict": trainer.strategy.module_state_dict(),
        "loops": _loops(trainer.progress),
        "lightlite": {"format": FORMAT, "run": trainer.run_id},
    }
    if not weights_only:
        checkpoint["callbacks"] = _callback_states(trainer)
        checkpoint["optimizer_states"] = [
            trainer.strategy.optimizer_state_dict(optimizer) for optimizer in trainer.optimizers
        ]
        checkpoint["lr_schedulers"] = [_plain(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        precision = trainer.precision_plugin
        if precision.state_dict():
            checkpoint[type(precision).__qualname__] = precision.state_dict()
        checkpoint["lightlite"] |= {
            "progress": trainer.progress.state_dict(),
            "random": distributed.gather_objects(_random_states(trainer)),
            "window": _windows(trainer),
            "results": distributed.gather_objects(_results(trainer)),
            "strategy": distributed.gather_objects(trainer.strategy.state_dict(trainer.optimizers)),
            "loggers": [logger.position() for logger in trainer.loggers] if trainer.is_global_zero else [],
            "metrics": {} if trainer.sanity_checking else _numbers(trainer.callback_metrics),
        }
    for owner in (module, datamodule):
        if owner is not None and owner.hparams:
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = _plain_hparams(owner)
    if datamodule is not None:
        state = datamodule.state_dict()
        if state:
            checkpoint[type(datamodule).__qualname__] = state
        datamodule.on_save_checkpoint(checkpoint)
    if weights_only:
        for callback in trainer.callbacks:
            callback._change_saved_weights(checkpoint)
    else:
        for hook in trainer.hooks.of_callbacks("on_save_checkpoint"):
            hook(checkpoint)
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _plain_hparams(owner: Any) -> dict[str, Any]:
    """The hyper-parameters that a checkpoint can hold; what it cannot is left out, and named once."""
    kept, left_out = {}, []
    for name, value in owner.hparams.items():
        try:
            kept[name] = storage.plain(value)
        except CheckpointError:
            left_out.append(name)
    if left_out and not owner.__dict__.get("_hparams_named"):
        owner.__dict__["_hparams_named"] = True
        rank_zero_warn(
            f"the hyper-parameters {', '.join(left_out)} of {type(owner).__name__} are objects that could only be read "
            "again by executing code: checkpoints leave them out, so pass them to load_from_checkpoint; "
            f"save_hyperparameters(ignore={left_out}) silences this"
        )
    return kept


def _callback_states(trainer: Trainer) -> dict[str, Any]:
    states = {}
    for callback in trainer.callbacks:
        state = callback.state_dict()
        if state:
            states[callback.state_key] = state
    return states


def random_now(trainer: Trainer) -> dict[str, Any]:
    """The states of this rank's generators, on the CPU and on its device."""
    device = trainer.strategy.root_device
    state = trainer.strategy.accelerator.random_state(device)
    return {"now": capture_rng(), "device": state, "device_type": device.type}


def _random_states(trainer: Trainer) -> dict[str, Any]:
    if trainer.resumed_random_states is not None:  # the pass that is gone on with has not begun yet
        return trainer.resumed_random_states
    fit, outside = trainer.fit_loop, _outside(trainer)
    return {
        **(trainer.epoch_random_state or {}),
        **random_now(trainer),
        "pass": fit.described_pass() if fit else "",
        "begun": fit is not None and fit.has_begun_pass,
        "ahead": fit.random_ahead if fit else None,
        "loader_now": trainer.loader_state(),
        "validation": fit.validation_states() if fit else [],
        **{name: outside[name] for name in ("now", "device", "validation") if outside},
    }


def _windows(trainer: Trainer) -> list[dict[str, Any]]:
    """Each rank's open accumulation window; only one where their gradients are averaged already."""
    window = trainer.resumed_window or (trainer.fit_loop.step.state_dict() if trainer.fit_loop else {})
    if not trainer.strategy.spreads:
        return distributed.gather_objects(window)
    if window and not window["gradients"]:
        raise CheckpointError(
            "a checkpoint cannot be taken in the middle of an accumulation whose gradients are not averaged yet; give "
            "the strategy sync_each_batch=True, or save after an optimizer step"
        )
    return [window]


def _outside(trainer: Trainer) -> dict[str, Any]:
    """What was there before the sanity check or validation that is in progress; empty where there is none."""
    return trainer.fit_loop.outside if trainer.fit_loop and not trainer.progress.validated else {}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _results(trainer: Trainer) -> dict[str, Any]:
    if trainer.fit_loop is None:
        return {}
    # Validation will reset what it logs, and begin again with what it began with.
    validation = trainer.recorder.active
    ending = validation.metrics if validation is not None and not validation.training else []
    begins_anew = [*ending, *_outside(trainer).get("idle", ())]
    return {
        "values": trainer.fit_loop.results.state_dict(trainer.lightning_module, begins_anew),
        "logged": dict(trainer.fit_loop.logged),
    }


def _plain(state: Any) -> Any:
    """A scheduler's state without what cannot be kept; functions of LambdaLR are the user's code, not state."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items() if not callable(value)}
    if isinstance(state, (list, tuple)):
        return type(state)(_plain(value) for value in state if not callable(value))
    return dict(state) if hasattr(state, "elements") else state


def _count(ready: int, done: int | None = None, started: bool = True) -> dict[str, int]:
    done = ready if done is None else done
    middle = {"started": ready, "processed": ready} if started else {}
    return {"ready": ready, **middle, "completed": done}


def _loops(progress: FitProgress) -> dict[str, Any]:
    """The counters in Lightning's layout, so that Lightning goes on from the same place."""
    ready = progress.epoch + (1 if progress.epoch_open else 0)
    epoch = {"ready": ready, "started": ready, "processed": progress.epoch + int(progress.epoch_done)}
    steps = progress.optimizer_steps
    batches = progress.batches_in_epoch
    done = batches - int(progress.pending and not progress.validated)
    batch = {"ready": batches, "started": batches, "processed": batches, "completed": done}
    total = progress.batches_total
    zero = _count(0)
    fit = {
        "state_dict": {},
        "epoch_progress": {
            "total": {**epoch, "completed": progress.epoch},
            "current": {**epoch, "completed": progress.epoch},
        },
        "epoch_loop.state_dict": {"_batches_that_stepped": progress.batches_that_stepped},
        "epoch_loop.batch_progress": {
            "total": {"ready": total, "started": total, "processed": total, "completed": total - (batches - done)},
            "current": batch,
            "is_last_batch": progress.last_batch,
        },
        "epoch_loop.scheduler_progress": {
            "total": _count(progress.scheduler_steps, started=False),
            "current": _count(0, started=False),
        },
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": {"total": _count(steps, started=False), "current": _count(0, started=False)},
                "zero_grad": {
                    "total": {"ready": steps, "started": steps, "completed": steps},
                    "current": {"ready": 0, "started": 0, "completed": 0},
                },
            }
        },
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": {
            "total": _count(steps, started=False),
            "current": _count(0, started=False),
        },
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": {"total": zero, "current": zero, "is_last_batch": progress.validated},
    }
    idle = {"state_dict": {}, "batch_progress": {"total": zero, "current": zero, "is_last_batch": False}}
    predict = {"state_dict": {}, "batch_progress": {"total": zero, "current": zero}}
    return {"fit_loop": fit, "validate_loop": idle, "test_loop": idle, "predict_loop": predict}


SCALERS = ("MixedPrecisionPlugin", "NativeMixedPrecisionPlugin", "native_amp_scaling_state")
"""Where older Lightning versions keep what is under "MixedPrecision" now."""


def _migrate(checkpoint: dict[str, Any]) -> None:
    """Give what Lightning 1.6 to 2.5 has written the names of 2.6, as far as they are looked for."""
    for former in SCALERS:
        if former in checkpoint:
            checkpoint.setdefault("MixedPrecision", checkpoint.pop(former))
    if isinstance(checkpoint.get("callbacks"), dict):
        checkpoint["callbacks"] = {
            re.sub(r", 'save_on_train_epoch_end': (None|True|False)", "", key) if isinstance(key, str) else key: state
            for key, state in checkpoint["callbacks"].items()
        }


def progress_from_lightning(checkpoint: Mapping[str, Any], progress: FitProgress) -> None:
    """Read the counters of a checkpoint that Lightning wrote."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    progress.optimizer_steps = checkpoint["global_step"]
    if loop is None:
        progress.epoch = checkpoint["epoch"]
        return
    epoch, batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    current = batch["current"]
    ended = epoch["processed"] > epoch["completed"]
    progress.epoch = epoch["processed"]
    progress.epoch_open = not ended and epoch["started"] > epoch["processed"]
    progress.batches_total = batch["total"]["processed"]
    progress.batches_that_stepped = loop["epoch_loop.state_dict"].get(
        "_batches_that_stepped", checkpoint["global_step"]
    )
    progress.scheduler_steps = loop["epoch_loop.scheduler_progress"]["total"]["completed"]
    progress.last_batch = batch["is_last_batch"]
    if progress.epoch_open:
        progress.batches_in_epoch = current["processed"]
        progress.pending = True
        progress.logged = progress.validated = current["completed"] == current["processed"]


class Restorer:
    """Puts back what a checkpoint holds, in the two steps between which the module is set up.

    Args:
        trainer: The trainer.
        module: The user's module.
        datamodule: The data module, if any.
        path: The checkpoint; None makes both steps do nothing.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None, path: str | None
    ) -> None:
        self._trainer, self._module, self._datamodule, self._path = trainer, module, datamodule, path
        self._checkpoint: dict[str, Any] | None = None
        if path is not None:
            self._checkpoint = trainer.strategy.load_checkpoint(path)

    def restore_module(self) -> None:
        """Put back the module's weights, the data module and the callbacks.

        Raises:
            CheckpointError: Where the file is no checkpoint of a trainer, or not what the call needs.
        """
        checkpoint, trainer = self._checkpoint, self._trainer
        if checkpoint is None:
            return
        self._check(checkpoint)
        _migrate(checkpoint)
        for owner in (self._datamodule, self._module):
            if owner is not None and is_overridden("on_load_checkpoint", owner, CheckpointHooks):
                owner.on_load_checkpoint(checkpoint)
        trainer.strategy.module = self._module
        strict = bool(self._module.strict_loading)
        with self._fitting(f"{type(self._module).__name__}'s weights"):
            trainer.strategy.load_module_state(checkpoint["state_dict"], strict=strict)
        if self._datamodule is not None:
            state = checkpoint.get(type(self._datamodule).__qualname__)
            if state:
                self._datamodule.load_state_dict(state)
        self._restore_callbacks(checkpoint)
        rank_zero_info(f"restored from {self._path}")

    def _check(self, checkpoint: dict[str, Any]) -> None:
        """See that it is what this call needs, before anything is changed."""
        if "state_dict" not in checkpoint:
            keys = ", ".join(map(str, list(checkpoint)[:5]))
            raise CheckpointError(
                f"{self._path} is no checkpoint of a trainer: it has no 'state_dict', but {keys}, …; for bare "
                "weights use module.load_state_dict(torch.load(path))"
            )
        written = checkpoint.get("lightlite", {}).get("format", FORMAT)
        if written > FORMAT:
            raise CheckpointError(
                f"{self._path} was written by a newer lightlite, in format {written}, and this one knows formats up to "
                f"{FORMAT}: upgrade it with pip install -U lightlite"
            )
        if self._trainer.state.fn is TrainerFn.FITTING and "optimizer_states" not in checkpoint:
            raise CheckpointError(
                f"{self._path} holds weights only, so training cannot go on from it; load the weights with "
                f"{type(self._module).__name__}.load_from_checkpoint, and fit without ckpt_path"
            )

    def _restore_callbacks(self, checkpoint: dict[str, Any]) -> None:
        """Put back what callbacks know; in evaluation all but which checkpoints a fit has written since."""
        trainer, states = self._trainer, checkpoint.get("callbacks") or {}
        fitting = trainer.state.fn is TrainerFn.FITTING
        for hook in trainer.hooks.of_callbacks("on_load_checkpoint"):
            hook(checkpoint)
        known = set()
        for callback in trainer.callbacks:
            key = callback.state_key if callback.state_key in states else type(callback).__qualname__
            known.add(key)
            if key in states and (fitting or callback not in trainer.checkpoint_callbacks):
                callback.load_state_dict(dict(states[key]))
        unused = [key for key in states if key not in known]
        if unused and fitting:
            rank_zero_warn(
                f"{self._path} holds the state of callbacks that this Trainer does not have: {', '.join(unused)}"
            )

    def restore_training(self) -> None:
        """Put back optimizers, schedulers, counters and random states.

        Raises:
            MismatchedCheckpointError: Where the checkpoint holds other optimizers than the module has.
        """
        checkpoint, trainer = self._checkpoint, self._trainer
        if checkpoint is None:
            return
        self._restore_optimizers(checkpoint)
        own = checkpoint.get("lightlite")
        if own is None or "progress" not in own:
            progress_from_lightning(checkpoint, trainer.progress)
        else:
            trainer.run_id = own.get("run", trainer.run_id)
            trainer.progress.load_state_dict(own["progress"])
            trainer.recorder.remember(own["metrics"])
            self._restore_random(own["random"])
            self._restore_window(own["window"])
            results = own.get("results", [])
            if len(results) == trainer.world_size:
                trainer.resumed_results = results[trainer.global_rank]
            self._restore_loggers(own.get("loggers", []))
            self._restore_strategy(own.get("strategy", []))
        self._checkpoint = None

    def _restore_optimizers(self, checkpoint: dict[str, Any]) -> None:
        trainer = self._trainer
        for what, states, mine in (
            ("optimizers", checkpoint["optimizer_states"], trainer.optimizers),
            ("learning-rate schedulers", checkpoint.get("lr_schedulers", []), trainer.lr_scheduler_configs),
        ):
            if len(states) != len(mine):
                raise MismatchedCheckpointError(
                    f"{self._path} holds the state of {len(states)} {what}, but configure_optimizers returned "
                    f"{len(mine)}"
                )
        for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            needed = {name for group in optimizer.param_groups for name in optimizer.defaults if name in group}
            with self._fitting(f"{type(optimizer).__name__}'s state"):
                trainer.strategy.load_optimizer_state(optimizer, state)
            lacking = {name for group in optimizer.param_groups for name in needed - group.keys()}
            if lacking:
                raise MismatchedCheckpointError(
                    f"{self._path} holds the state of another optimizer than {type(optimizer).__name__}: there is no "
                    f"{', '.join(sorted(lacking))} in it; fit with the optimizer that it was saved with, or load the "
                    "weights alone by load_from_checkpoint"
                )
        for config, state in zip(trainer.lr_scheduler_configs, checkpoint.get("lr_schedulers", []), strict=True):
            self._tell_of_another_kind(config.scheduler, state)
            with self._fitting(f"{type(config.scheduler).__name__}'s state"):
                config.scheduler.load_state_dict(state)
        precision = trainer.precision_plugin
        precision.load_state_dict(checkpoint.get(type(precision).__qualname__, {}))

    @contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        """Name the file in what is said of something that does not fit.

        Raises:
            MismatchedCheckpointError: From the error.
        """
        try:
            yield
        except (KeyError, RuntimeError, ValueError) as error:
            raise MismatchedCheckpointError(f"{self._path} does not hold {what}: {error}") from error

    def _tell_of_another_kind(self, scheduler: Any, state: Mapping[str, Any]) -> None:
        kept, own = ({name for name in names if name[0] != "_"} for names in (state, scheduler.state_dict()))
        if kept - own and own - kept:
            rank_zero_warn(
                f"{self._path} holds the state of another scheduler than {type(scheduler).__name__}, with "
                f"{', '.join(sorted(kept - own))}: of {', '.join(sorted(own - kept))} it knows nothing"
            )

    def _restore_window(self, windows: list[dict[str, Any]]) -> None:
        """Gradients of an open accumulation window; with another number of ranks, their mean."""
        trainer = self._trainer
        if len(windows) > 1 and windows[0] and (trainer.strategy.spreads or len(windows) != trainer.world_size):
            gradients = [window["gradients"] for window in windows]
            names = dict.fromkeys(itertools.chain(*gradients))  # a rank may have none of some
            mean = {name: sum(own[name] for own in gradients if name in own) / len(windows) for name in names}
            lacking = windows[0].get("lacking", 0) * trainer.world_size / len(windows)
            windows = [{**windows[0], "gradients": mean, "lacking": lacking}]
        trainer.resumed_window = windows[trainer.global_rank if len(windows) == trainer.world_size else 0]

    def _restore_strategy(self, states: list[dict[str, Any]]) -> None:
        """What each rank alone knew."""
        trainer = self._trainer
        if len(states) == trainer.world_size:
            trainer.strategy.load_state_dict(states[trainer.global_rank], trainer.optimizers)
        elif any(states):
            rank_zero_warn(
                f"{self._path} is of {len(states)} ranks, and there are {trainer.world_size}: what "
                f"{type(trainer.strategy).__name__} kept on each of them, as for a communication hook, begins anew"
            )

    def _restore_loggers(self, positions: list[Any]) -> None:
        """Have loggers forget what was logged after the checkpoint, if they go on with what they logged before it."""
        if self._trainer.is_global_zero and len(positions) == len(self._trainer.loggers):
            for logger, position in zip(self._trainer.loggers, positions, strict=True):
                if position is not None:
                    logger.go_back(position)

    def _restore_random(self, states: list[dict[str, Any]]) -> None:
        """Each rank's own state; with another number of ranks, what they have in common: the order of the data."""
        trainer, rank = self._trainer, self._trainer.global_rank
        if len(states) == trainer.world_size:
            trainer.resumed_random_states = states[rank]
            self._restore_device_random(states[rank])
            return
        now = states[0]["now"] if rank == 0 else capture_rng()
        # A generator of the loader's own stands where seeking leaves it: ranks draw ahead, and one process does not.
        trainer.resumed_random_states = {**states[0], "now": now, "moved": True}

    def _restore_device_random(self, states: dict[str, Any]) -> None:
        """The device's generator, unless the checkpoint was written on another kind of device."""
        strategy = self._trainer.strategy
        device = strategy.root_device
        if states["device"] is not None and states.get("device_type", device.type) == device.type:
            strategy.accelerator.set_random_state(states["device"], device)
