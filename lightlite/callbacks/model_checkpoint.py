"""Writes checkpoints as training goes on, and keeps the best of them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightlite.callbacks.callback import StepOutput
from lightlite.callbacks.checkpoint import Checkpoint
from lightlite.errors import MisconfigurationException
from lightlite.saving import AsyncCheckpointIO
from lightlite.utilities import files
from lightlite.utilities.rank_zero import WarningCache, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

_FIELD = re.compile(r"\{([^{}:]*)(:[^{}]*)?\}")


class ModelCheckpoint(Checkpoint):
    """Saves a checkpoint at intervals, and keeps the best by a logged value.

    At each interval the state is saved if it is among the best `save_top_k`, and then, with `save_last`, as the
    newest one too. What was best outlives a restart, as long as the files are there.

    Args:
        dirpath: The folder. By default `<save_dir>/<name>/version_N/checkpoints` of the first logger, or
            `<default_root_dir>/checkpoints` without one.
        filename: The file's name without its end; logged values may stand in it, as in
            "{epoch}-{val_loss:.2f}". By default "{epoch}-{step}".
        monitor: The logged value that tells good from bad. None keeps the newest.
        verbose: Whether to tell of each decision.
        save_last: True: at each interval and when training ends, the state is saved as `last.ckpt` as well.
            "link": `last.ckpt` is a symbolic link where that state was just saved under another name.
        save_top_k: How many of the best to keep; 0 for none, -1 for all.
        save_on_exception: Whether to save when the fit ends by an exception.
        save_weights_only: Whether to leave out what only a resumed fit needs.
        mode: "min" where a lower value is better, "max" where a higher one is.
        auto_insert_metric_name: Whether "{epoch}" becomes "epoch=3", or only "3".
        every_n_train_steps: Save each time that `trainer.global_step` is a multiple of this; 0 for never.
        train_time_interval: Save once that much time has passed since the last time.
        every_n_epochs: Save after each so many epochs; 0 for never. The default, 1, where none of the three
            intervals is given; they exclude one another.
        save_on_train_epoch_end: Whether epochs are saved when training ends them, or when validation does. None:
            when training does if there is exactly one validation an epoch, or none at all.
        enable_version_counter: Whether a file that exists already makes the name end in "-v1", "-v2", …; it is
            overwritten otherwise.
        async_save: Whether training goes on while files are written, as with `Trainer(plugins=AsyncCheckpointIO())`.

    Attributes:
        best_model_path: The best checkpoint's file, or "".
        best_model_score: Its monitored value.
        best_k_models: The monitored value of each file that is kept.
        kth_best_model_path: The worst of those.
        kth_value: Its monitored value.
        last_model_path: The newest checkpoint's file, with `save_last`, or "".
        current_score: The monitored value at the last time one was saved.

    Raises:
        MisconfigurationException: For arguments that exclude one another, and when the monitored value is not
            among the logged ones after validation has run.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        async_save: bool = False,
    ) -> None:
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self.filename = filename
        if dirpath is not None and not files.is_remote(dirpath):
            dirpath = os.path.realpath(os.path.expanduser(dirpath))
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        default_interval = every_n_train_steps is None and every_n_epochs is None and train_time_interval is None
        self._every_n_epochs = 1 if default_interval else every_n_epochs or 0
        self._every_n_train_steps = every_n_train_steps or 0
        self._train_time_interval = train_time_interval
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self._async_save = async_save
        self._check_arguments()

        self.best_k_models: dict[str, Tensor] = {}
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.current_score: Tensor | None = None
        self.kth_best_model_path = ""
        self.kth_value = self._worst
        self.last_model_path = ""
        self._last_global_step_saved = 0
        self._last_checkpoint_saved = ""
        self._newest_step = -1
        self._leaving: list[str] = []
        self._resumed: dict[str, Any] = {}
        self._goes_on = False
        self._last_time_checked = 0.0
        self._awaits_validation = False
        self._validated = False
        self._restored = False
        self._warnings = WarningCache()

    def _check_arguments(self) -> None:
        if self.mode not in ("min", "max"):
            raise MisconfigurationException(f"ModelCheckpoint(mode={self.mode!r}): mode is 'min' or 'max'")
        if self.save_top_k < -1:
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={self.save_top_k}): give a number of files to keep, 0 for none, -1 for all"
            )
        if self.monitor is None and self.save_top_k not in (-1, 0, 1):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={self.save_top_k}) without a monitor cannot tell which {self.save_top_k} "
                "are the best: give monitor='val_loss', say, or save_top_k 1 (the newest), -1 (all) or 0 (none)"
            )
        if self.save_last not in (None, True, False, "link"):
            raise MisconfigurationException(f"ModelCheckpoint(save_last={self.save_last!r}): True, False or 'link'")
        intervals = {
            "every_n_train_steps": self._every_n_train_steps,
            "every_n_epochs": self._every_n_epochs,
            "train_time_interval": self._train_time_interval,
        }
        for name, value in intervals.items():
            if isinstance(value, int) and value < 0:
                raise MisconfigurationException(f"ModelCheckpoint({name}={value}): give 1 or more, or 0 for never")
        given = [f"{name}={value}" for name, value in intervals.items() if value or isinstance(value, timedelta)]
        if len(given) > 1:
            raise MisconfigurationException(
                f"ModelCheckpoint({', '.join(given)}): give one of these intervals, and another ModelCheckpoint for "
                "another interval"
            )

    @property
    def state_key(self) -> str:
        """Tells callbacks of different monitors and intervals apart."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
        )

    @property
    def every_n_epochs(self) -> int:
        """After how many epochs to save; 0 where another interval holds."""
        return self._every_n_epochs

    @property
    def _worst(self) -> Tensor:
        return torch.tensor(torch.inf if self.mode == "min" else -torch.inf)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle on the folder, the same on every rank."""
        if self._async_save and not isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            trainer.strategy.checkpoint_io = AsyncCheckpointIO(trainer.strategy.checkpoint_io)
        dirpath = trainer.strategy.broadcast(self._choose_folder(trainer) if trainer.is_global_zero else "")
        if self.save_last == "link" and files.is_remote(dirpath):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_last='link') makes a symbolic link, which {dirpath!r} cannot hold; "
                "give save_last=True, or a dirpath on this machine"
            )
        self.dirpath = dirpath
        if stage == "fit" and trainer.is_global_zero and self.save_top_k != 0 and trainer.ckpt_path is None:
            self._warn_of_strange_files(dirpath)

    def _choose_folder(self, trainer: Trainer) -> str:
        if self.dirpath is not None:
            return self.dirpath
        if not trainer.loggers:
            return os.path.join(trainer.default_root_dir, "checkpoints")
        logger = trainer.loggers[0]
        root = logger.save_dir if logger.save_dir is not None else trainer.default_root_dir
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(root, str(logger.name), version, "checkpoints")

    def _warn_of_strange_files(self, dirpath: str) -> None:
        own = {os.path.basename(path) for path in (*self.best_k_models, self.best_model_path, self.last_model_path)}
        strange = [name for name in files.names_in(dirpath) if name.endswith(self.FILE_EXTENSION) and name not in own]
        if strange:
            rank_zero_warn(f"the checkpoint folder {dirpath} has {len(strange)} of another run already: {strange[0]}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what a checkpoint left."""
        if self._restored:
            # Which files are left was looked up by each rank for itself.
            self.__dict__.update(trainer.strategy.broadcast(self.state_dict()))
            self._restored = False
        self._goes_on, self._leaving = bool(self._resumed), []
        self.__dict__.update(self._resumed)
        self._resumed = {}
        if trainer.goes_on:
            self._remove_leaving(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin counting time."""
        self._last_time_checked = time.monotonic()
        if not self._goes_on:
            self._last_global_step_saved = trainer.global_step
            self._awaits_validation = self._validated = False

    def catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what was due when the checkpoint was taken from which the fit goes on, and was not done by then."""
        if not self._goes_on:
            return
        if trainer.progress.epoch_done:
            ModelCheckpoint.on_train_epoch_end(self, trainer, pl_module)
        elif trainer.progress.validated:
            ModelCheckpoint.on_validation_end(self, trainer, pl_module)
        else:
            last = trainer.progress.batches_in_epoch - 1
            ModelCheckpoint.on_train_batch_end(self, trainer, pl_module, None, None, last)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Save where an interval of steps or time is over."""
        if self._every_n_train_steps:
            if trainer.global_step % self._every_n_train_steps or self._must_not_save(trainer):
                return
        elif self._train_time_interval is None or not self._time_is_up(trainer):
            return
        if self._must_not_save(trainer):
            return
        if self.monitor is not None and self._better_after_validation(trainer, self.monitor, batch_idx):
            self._awaits_validation = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where an interval is over, and validation has brought the monitored value."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = True
        due, self._awaits_validation = self._awaits_validation, False
        if not due:
            due = self._epochs_are_over(trainer) and not self._should_save_on_train_epoch_end(trainer)
        if due and not self._must_not_save(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where an interval of epochs is over."""
        due = self._epochs_are_over(trainer) and self._should_save_on_train_epoch_end(trainer)
        if due and not self._must_not_save(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See to it that "last" is the state that training ended with."""
        if self.save_last and not trainer.fast_dev_run and self._newest_step != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._remove_leaving(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, with `save_on_exception`."""
        if not self.save_on_exception or self._must_not_save(trainer):
            return
        # Other ranks may be gone: nothing is agreed on with them here.
        candidates = self._monitor_candidates(trainer)
        filepath = self._free_name(trainer, candidates, None, replaces="")
        if self.save_last:
            self.last_model_path = self._free_name(trainer, candidates, self.CHECKPOINT_NAME_LAST, self.last_model_path)
            self._save_checkpoint(trainer, self.last_model_path)
        self._save_checkpoint(trainer, filepath)
        rank_zero_info(f"saved {filepath} because of {type(exception).__name__}: {exception}")

    def _must_not_save(self, trainer: Trainer) -> bool:
        return bool(
            trainer.fast_dev_run
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self._last_global_step_saved == trainer.global_step
        )

    def _time_is_up(self, trainer: Trainer) -> bool:
        assert self._train_time_interval is not None
        now = time.monotonic()
        up = trainer.strategy.broadcast(now - self._last_time_checked >= self._train_time_interval.total_seconds())
        if up:
            self._last_time_checked = now
        return bool(up)

    def _epochs_are_over(self, trainer: Trainer) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        if self._save_on_train_epoch_end is not None:
            return self._save_on_train_epoch_end
        if not trainer.enable_validation:
            return True
        return bool(trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0)

    def _better_after_validation(self, trainer: Trainer, monitor: str, batch_idx: int) -> bool:
        """Whether the monitored value comes, or comes anew, by a validation that has still to run."""
        if not trainer.enable_validation:
            return False
        if monitor not in self._monitor_candidates(trainer):
            return True
        every = trainer.check_val_every_n_epoch
        if every is None or (trainer.current_epoch + 1) % every:
            return False
        between = getattr(trainer, "val_check_batch", None)
        if isinstance(between, int):
            return (batch_idx + 1) % between == 0
        return bool(trainer.is_last_batch)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """All logged values, the epoch and the step."""
        candidates: dict[str, Tensor] = dict(trainer.callback_metrics)
        for name, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            logged = candidates.get(name)
            candidates[name] = torch.tensor(value) if logged is None else logged.int()
        return candidates

    def _save(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        if self.save_last:
            self._save_last_checkpoint(trainer, candidates)
        # Only now, so that at no moment the newest or the best state is missing.
        self._remove_leaving(trainer)

    def _remove_leaving(self, trainer: Trainer) -> None:
        for path in self._leaving:
            self._remove_checkpoint(trainer, path)
        self._leaving = []

    def _save_topk_checkpoint(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        """Save if it is among the best, and note which files are not any more."""
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            previous = self.best_model_path
            self.best_model_path = self._choose_name(trainer, candidates, replaces=previous)
            if self.save_top_k == 1:
                self._note_leaving(trainer, previous, self.best_model_path)
            self._save_checkpoint(trainer, self.best_model_path)
            return
        if self.monitor not in candidates:
            self._complain_of_missing(candidates)
            return
        current = candidates[self.monitor].detach().cpu()
        if self.check_monitor_top_k(trainer, current):
            self._update_best_and_save(current, trainer, candidates)
        elif self.verbose:
            rank_zero_info(f"{_where(candidates)}: {self.monitor!r} was not in top {self.save_top_k}")

    def _complain_of_missing(self, candidates: Mapping[str, Tensor]) -> None:
        message = (
            f"ModelCheckpoint(monitor={self.monitor!r}) finds no such value among the logged ones: "
            f"{', '.join(sorted(candidates))}. Call self.log({self.monitor!r}, ...) in the module, or "
            "monitor one of these"
        )
        # Within the first epoch, what belongs to the end of a training epoch cannot be there yet.
        if self._validated and (self._every_n_epochs or candidates["epoch"] > 0):
            raise MisconfigurationException(message)
        self._warnings.warn(f"{message}. Nothing is saved until it is there.")

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether `current` is among the best `save_top_k` so far; the same answer on every rank."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        better = torch.lt if self.mode == "min" else torch.gt
        decision = bool(better(current.cpu(), self.best_k_models[self.kth_best_model_path].cpu()))
        return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        evicted = ""
        if len(self.best_k_models) == self.save_top_k:
            evicted = self.kth_best_model_path
            del self.best_k_models[evicted]
        if torch.isnan(current):
            current = self._worst
        filepath = self._choose_name(trainer, candidates, replaces=evicted)
        self.current_score = current
        self.best_k_models[filepath] = current
        self._rank_models()
        if self.verbose:
            rank_zero_info(
                f"{_where(candidates)}: {self.monitor!r} reached {current:0.5f} (best {self.best_model_score:0.5f}), "
                f"saving model to {filepath!r} as top {len(self.best_k_models)}"
            )
        self._note_leaving(trainer, evicted, filepath)
        self._save_checkpoint(trainer, filepath)

    def _rank_models(self) -> None:
        """Find the best and the worst of those kept."""
        if not self.best_k_models:
            return
        highest, lowest = (pick(self.best_k_models, key=self._score_of) for pick in (max, min))
        best, worst = (lowest, highest) if self.mode == "min" else (highest, lowest)
        self.best_model_path, self.best_model_score = best, self.best_k_models[best]
        if len(self.best_k_models) == self.save_top_k or self.save_top_k == -1:
            self.kth_best_model_path, self.kth_value = worst, self.best_k_models[worst]

    def _score_of(self, path: str) -> float:
        return float(self.best_k_models[path])

    def _save_last_checkpoint(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        """Save or link the newest state, and note the file that was the newest before, if it had another name."""
        previous = self.last_model_path
        filepath = self._choose_name(trainer, candidates, replaces=previous, name=self.CHECKPOINT_NAME_LAST)
        self.last_model_path = filepath
        self._note_leaving(trainer, previous, filepath)
        saved_just_now = self._last_checkpoint_saved and self._last_global_step_saved == trainer.global_step
        if self.save_last == "link" and saved_just_now and self._last_checkpoint_saved != filepath:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, filepath)
            self._newest_step = trainer.global_step
        else:
            self._save_checkpoint(trainer, filepath, newest=True)

    def _save_checkpoint(self, trainer: Trainer, filepath: str, newest: bool = False) -> None:
        before = {name: self.__dict__[name] for name in _SAVED}
        # Before it is, so that a fit that goes on from the file knows that it is there.
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        if newest:
            self._newest_step = trainer.global_step
        try:
            trainer.save_checkpoint(filepath, self.save_weights_only)
        except BaseException:
            self.__dict__.update(before)
            raise
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            trainer.strategy.checkpoint_io.then(functools.partial(_link, filepath, linkpath))
        trainer.strategy.barrier("ModelCheckpoint.link")

    def _note_leaving(self, trainer: Trainer, previous: str, current: str) -> None:
        if self._should_remove(trainer, previous, current):
            self._leaving.append(previous)

    def _should_remove(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Whether a file was written by this run, and is neither needed nor what the run was resumed from."""
        if not previous or previous == current or self.dirpath is None:
            return False
        if files.is_remote(self.dirpath):
            return True
        absolute = os.path.abspath(previous)
        if trainer.ckpt_path is not None and os.path.abspath(trainer.ckpt_path) == absolute:
            return False
        return absolute.startswith(os.path.join(os.path.abspath(self.dirpath), ""))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            trainer.strategy.checkpoint_io.remove_checkpoint(filepath)

    def _choose_name(
        self, trainer: Trainer, candidates: dict[str, Tensor], replaces: str, name: str | None = None
    ) -> str:
        """Rank zero's choice of a free file name, on every rank; `replaces` counts as free."""
        chosen = self._free_name(trainer, candidates, name, replaces) if trainer.is_global_zero else ""
        return str(trainer.strategy.broadcast(chosen))

    def _free_name(self, trainer: Trainer, candidates: dict[str, Tensor], name: str | None, replaces: str) -> str:
        def is_taken(path: str) -> bool:
            if path == replaces or not (files.exists(path) or trainer.strategy.checkpoint_io.is_pending(path)):
                return False
            # What this run itself wrote later on, before it was cut off, is written anew.
            run, step = trainer.strategy.checkpoint_io.origin(path) if trainer.goes_on else ("", -1)
            return run != trainer.run_id or step < trainer.global_step

        filepath = self.format_checkpoint_name(candidates, name)
        version = self.STARTING_VERSION
        while self._enable_version_counter and is_taken(filepath):
            filepath = self.format_checkpoint_name(candidates, name, ver=version)
            version += 1
        return filepath

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Tensor],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """The file's path for these values.

        Args:
            metrics: What the names in braces stand for; 0 where one is missing.
            filename: Instead of the callback's own.
            ver: A number for the end of the name.
            prefix: Something for its beginning.

        Returns:
            For example "folder/epoch=1-val_loss=0.12-v2.ckpt"; without the folder while none is known.
        """

        def value_of(field: re.Match[str]) -> str:
            name, spec = field[1], (field[2] or ":")[1:]
            value = metrics.get(name, 0)
            shown = format(value.item() if isinstance(value, Tensor) else value, spec)
            return f"{name}{self.CHECKPOINT_EQUALS_CHAR}{shown}" if self.auto_insert_metric_name else shown

        join = self.CHECKPOINT_JOIN_CHAR
        name = _FIELD.sub(value_of, filename or self.filename or f"{{epoch}}{join}{{step}}")
        parts = [prefix, name, None if ver is None else f"v{ver}"]
        file = join.join(part for part in parts if part) + self.FILE_EXTENSION
        return os.path.join(self.dirpath, file) if self.dirpath else file

    def find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """The files in this callback's folder that some run has written as its newest state."""
        folder = self._choose_folder(trainer)
        name = re.escape(_FIELD.sub("\0", self.CHECKPOINT_NAME_LAST)).replace("\0", ".*")
        pattern = re.compile(rf"{name}({self.CHECKPOINT_JOIN_CHAR}v\d+)?{re.escape(self.FILE_EXTENSION)}")
        found = {os.path.join(folder, file) for file in files.names_in(folder) if pattern.fullmatch(file)}
        return found | ({self.last_model_path} if files.exists(self.last_model_path) else set())

    def find_checkpoints(self, trainer: Trainer) -> set[str]:
        """All checkpoints in this callback's folder."""
        folder = self._choose_folder(trainer)
        return {os.path.join(folder, file) for file in files.names_in(folder) if file.endswith(self.FILE_EXTENSION)}

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Whether rank zero sees that file; the same answer on every rank."""
        return bool(trainer.strategy.broadcast(files.exists(filepath)))

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write `best_k_models` as YAML.

        Args:
            filepath: By default `best_k_models.yaml` in the callback's folder.
        """
        import yaml

        path = os.path.join(self.dirpath or "", "best_k_models.yaml") if filepath is None else os.fspath(filepath)
        files.write_text(path, yaml.safe_dump({name: score.item() for name, score in self.best_k_models.items()}))

    def state_dict(self) -> dict[str, Any]:
        """What is best, what is newest, and where."""
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": self.best_k_models,
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning's checkpoints have no place for: what was saved, and what is left to do."""
        checkpoint["lightlite"].setdefault("saved", {})[self.state_key] = {
            name: list(value) if isinstance(value := self.__dict__[name], list) else value for name in (*_SAVED, *_DUE)
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have it taken up when training starts."""
        fitting = trainer.state.fn == "fit"
        self._resumed = checkpoint.get("lightlite", {}).get("saved", {}).get(self.state_key, {}) if fitting else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what was best, as far as its files are still where they were or are in the folder of this run."""
        old_folder = state_dict.get("dirpath")
        self.current_score = state_dict.get("current_score")
        kept: dict[str, Tensor] = state_dict.get("best_k_models", {})
        found = {path: self._find(path, old_folder) for path in kept}
        self.best_k_models = {found[path]: score for path, score in kept.items() if found[path]}
        self.best_model_path = self._find(state_dict.get("best_model_path", ""), old_folder)
        self.best_model_score = state_dict.get("best_model_score") if self.best_model_path else None
        self._rank_models()
        self.last_model_path = self._find(state_dict.get("last_model_path", ""), old_folder)
        self._restored = True
        gone = [path for path, now in found.items() if not now]
        if gone:
            rank_zero_warn(f"checkpoints that were among the best are gone: {', '.join(gone)}")

    def _find(self, path: str, old_folder: str | None) -> str:
        """Where a file of an earlier run is now: moved along with the folder, where it was, or "" for nowhere."""
        if not path:
            return ""
        if self.dirpath and old_folder and self.dirpath != old_folder and path.startswith(old_folder):
            moved = os.path.join(self.dirpath, os.path.relpath(path, old_folder))
            if files.exists(moved):
                return moved
        return path if files.exists(path) else ""


_SAVED = ("_last_global_step_saved", "_last_checkpoint_saved", "_newest_step")
_DUE = ("_leaving", "_awaits_validation", "_validated")


def _link(filepath: str, linkpath: str) -> None:
    """Let `linkpath` be a symbolic link to a file, at no moment missing."""
    fresh = f"{linkpath}.tmp{os.getpid()}"
    try:
        os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), fresh)
    except OSError:  # a file system without symbolic links
        shutil.copy(filepath, fresh)
    os.replace(fresh, linkpath)


def _where(candidates: Mapping[str, Tensor]) -> str:
    return f"Epoch {int(candidates['epoch'])}, global step {int(candidates['step'])}"
