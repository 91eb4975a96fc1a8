"""Finds the largest batch size that fits in memory, by trying; arguments and procedure are those of Lightning 2.x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightlite.callbacks.callback import Callback
from lightlite.data import combined
from lightlite.errors import MisconfigurationException
from lightlite.progress import STAGES, TrainerFn
from lightlite.utilities.combined_loader import CombinedLoader, combined_length, sized_len
from lightlite.utilities.memory import garbage_collection_cuda, is_oom_error
from lightlite.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

MODES = ("power", "binsearch")


class BatchSizeFinder(Callback):
    """Finds the largest batch size with which a few steps do not run out of memory, and goes on with it.

    The module, its hparams or the data module keep the size in an attribute, and their loaders are made with it. The
    search is made at the start of fit, validate, test or predict; for other times call `scale_batch_size` from another
    hook. Module, optimizers, schedulers and random generators are as before afterwards.

    Args:
        mode: "power" to double the size until memory runs out, and halve it then; "binsearch" to go on with a binary
            search between the last size that fitted and the first that did not.
        steps_per_trial: Batches to run with each size.
        init_val: The size to begin with.
        max_trials: How many sizes to try.
        batch_arg_name: Where the size is kept.
        margin: With "binsearch", the share that is taken off what was found, for safety.
        max_val: The largest size to consider.

    Attributes:
        optimal_batch_size: What was found; `init_val` before the search, None where `fast_dev_run` leaves it out.

    Raises:
        ValueError: For another mode.
        MisconfigurationException: For numbers that cannot be.
    """

    SUPPORTED_MODES = MODES

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        self._mode = mode.lower()
        if self._mode not in MODES:
            raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, MODES))}")
        if not 0 <= margin < 1:
            raise MisconfigurationException(f"margin={margin}; give a share from 0 up to, and without, 1")
        counts = {
            "steps_per_trial": steps_per_trial,
            "init_val": init_val,
            "max_trials": max_trials,
            "max_val": max_val,
        }
        for name, count in counts.items():
            if count < 1:
                raise MisconfigurationException(f"{name}={count}; give a number of at least 1")
        self._steps_per_trial, self._init_val, self._max_trials = steps_per_trial, init_val, max_trials
        self._batch_arg_name, self._margin, self._max_val = batch_arg_name, margin, max_val
        self.optimal_batch_size: int | None = init_val

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a batch size to search for.

        Raises:
            MisconfigurationException: With several ranks, without the attribute, or with loaders made already.
        """
        name = self._batch_arg_name
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"a batch size cannot be searched for with {trainer.world_size} ranks; search on one device"
            )
        if not lightning_hasattr(pl_module, name):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no {name!r}, nor have its hparams or the data module; set "
                f"self.{name} and make the loaders with it, or say what it is called by batch_arg_name=…"
            )
        prefix = _prefix(trainer)
        if getattr(trainer._source, prefix) is not None:
            raise MisconfigurationException(
                f"a batch size cannot be searched for, because the {prefix} loaders are made already; define "
                f"{prefix}_dataloader() in {type(pl_module).__name__} or in a LightningDataModule, which makes them "
                f"with self.{name}"
            )
        if hasattr(pl_module, name) and name in pl_module.hparams:
            rank_zero_warn(
                f"the module has both {name!r} and hparams[{name!r}]; both are set to the batch size that is found"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        self.scale_batch_size(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, in `Trainer.validate`."""
        if trainer.state.fn is TrainerFn.VALIDATING:
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        self.scale_batch_size(trainer, pl_module)

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> int | None:
        """Search, set the attribute to what was found, and keep it as `optimal_batch_size`.

        Raises:
            MisconfigurationException: Where the evaluation has several loaders.
        """
        if trainer.fast_dev_run:
            rank_zero_warn("the search for a batch size is left out: fast_dev_run is on")
            self.optimal_batch_size = None
            return None
        before = lightning_getattr(pl_module, self._batch_arg_name)
        samples = _samples(trainer, pl_module)
        begin = before if before >= samples else min(self._init_val, self._max_val)
        try:
            with trainer.rehearsal(**self._settings(trainer)) as attempt:
                found = self._search(self._trying(pl_module, attempt), begin, min(samples, self._max_val))
                lightning_setattr(pl_module, self._batch_arg_name, found)
        except BaseException:
            lightning_setattr(pl_module, self._batch_arg_name, before)
            raise
        rank_zero_info(f"the batch size is set to {found}")
        self.optimal_batch_size = found
        return found

    def _settings(self, trainer: Trainer) -> dict[str, Any]:
        """What the trainer is told for the trials."""
        steps = self._steps_per_trial
        if trainer.state.fn is not TrainerFn.FITTING:
            return {f"limit_{_prefix(trainer)}_batches": steps}
        return {
            "max_steps": trainer.global_step + steps,
            "min_steps": None,
            "min_epochs": None,
            "limit_train_batches": 1.0,
            "limit_val_batches": steps,
        }

    def _trying(self, module: LightningModule, attempt: Callable[[], None]) -> Callable[[int], bool]:
        def fits(size: int) -> bool:
            lightning_setattr(module, self._batch_arg_name, size)
            try:
                attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_oom_error(error):
                    raise
                if size == 1:
                    raise MisconfigurationException(
                        f"{self._steps_per_trial} batches run out of memory even with {self._batch_arg_name}=1"
                    ) from error
                fitted = False
            else:
                fitted = True
            # Out of the handler, which holds on to the tensors of all frames that failed.
            garbage_collection_cuda()
            rank_zero_info(f"batch size {size} {'fits' if fitted else 'runs out of memory'}")
            return fitted

        return fits

    def _search(self, fits: Callable[[int], bool], size: int, enough: int | float) -> int:
        """The largest size that fits, as far as the mode looks; more than `enough` need not be tried."""
        largest, too_large = 0, 0
        successes = 0
        while not largest or not too_large:
            if fits(size):
                largest, successes = size, successes + 1
                if size >= enough or successes >= self._max_trials:
                    break
                size = min(size * 2, self._max_val)
            else:
                too_large, size = size, size // 2
        while self._mode == "binsearch" and too_large - largest > 1 and successes < self._max_trials:
            size = (largest + too_large) // 2
            if fits(size):
                largest, successes = size, successes + 1
            else:
                too_large = size
        return largest if self._mode == "power" else max(1, int(largest * (1 - self._margin)))


def _prefix(trainer: Trainer) -> str:
    """The word in the names of the loaders that are looked at: "train", "val", "test" or "predict"."""
    assert trainer.state.fn is not None
    return STAGES[trainer.state.fn].dataloader_prefix


def _samples(trainer: Trainer, module: LightningModule) -> int | float:
    """How many samples an epoch has; infinite where that is unknown.

    Raises:
        MisconfigurationException: Where an evaluation has several loaders.
    """
    prefix = _prefix(trainer)
    loaders = combined(trainer._source.request(prefix, module), "max_size_cycle", f"the {prefix} loader")
    parts = loaders.flattened if isinstance(loaders, CombinedLoader) else [loaders]
    if len(parts) > 1 and prefix != "train":
        raise MisconfigurationException(
            f"{prefix}_dataloader returned {len(parts)} loaders; a batch size can be searched for with one"
        )
    lengths = [length for part in parts if (length := sized_len(getattr(part, "dataset", None))) is not None]
    mode = loaders.mode if isinstance(loaders, CombinedLoader) else "max_size"
    return combined_length(mode, lengths) if lengths else math.inf
