"""Tuner: searches for a learning rate or a batch size before a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightlite.callbacks.batch_size_finder import BatchSizeFinder
from lightlite.callbacks.lr_finder import LearningRateFinder, LRFinder
from lightlite.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightlite.datamodule import LightningDataModule
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

METHODS = ("fit", "validate", "test", "predict")


class Tuner:
    """Searches for settings with a Trainer, which is as it was afterwards, and so are module and random generators.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        method: str = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LRFinder | None:
        """Search for a learning rate; see `LearningRateFinder`.

        Args:
            model: The module.
            train_dataloaders: As for `Trainer.fit`.
            val_dataloaders: As for `Trainer.fit`.
            dataloaders: Accepted for compatibility; None.
            datamodule: As for `Trainer.fit`.
            method: "fit".
            min_lr: The first rate.
            max_lr: The last rate.
            num_training: Number of optimizer steps from the one to the other.
            mode: How the rate rises, "exponential" or "linear".
            early_stop_threshold: End the search when the smoothed loss is more than so many times the lowest so far;
                None to go on to the end.
            update_attr: Whether to set the module's attribute to what was found.
            attr_name: Where the module keeps its learning rate; by default "lr" or else "learning_rate".

        Returns:
            The rates and losses, with `suggestion()` and `plot()`; None with fast_dev_run.

        Raises:
            MisconfigurationException: For settings that cannot be, and a module without exactly one optimizer.
            AttributeError: Where the attribute to update is not there.
        """
        if method != "fit":
            raise MisconfigurationException(f"lr_find(method={method!r}): a learning rate is searched for in 'fit'")
        _check_loaders("lr_find", method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse(LearningRateFinder)
        finder = LearningRateFinder(min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name)
        found: LRFinder | None = self._trainer.search(
            "fit", finder.lr_find, model, train_dataloaders, val_dataloaders, datamodule
        )
        return found

    def scale_batch_size(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        method: str = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Search for the largest batch size that fits in memory; see `BatchSizeFinder`.

        Args:
            model: The module.
            train_dataloaders: A LightningDataModule, or None.
            val_dataloaders: As for `Trainer.fit`.
            dataloaders: A LightningDataModule, for the other methods, or None.
            datamodule: Where loaders come from instead of the module.
            method: With which call: "fit", "validate", "test" or "predict".
            mode: "power" or "binsearch".
            steps_per_trial: Batches to run with each size.
            init_val: The size to begin with.
            max_trials: How many sizes to try.
            batch_arg_name: Where module, hparams or data module keep the size.
            margin: With "binsearch", the share that is taken off what was found, for safety.
            max_val: The largest size to consider.

        Returns:
            The size, to which the attribute is set; None with fast_dev_run.

        Raises:
            MisconfigurationException: With several ranks, without the attribute, or with loaders made already.
        """
        if method not in METHODS:
            raise ValueError(f"scale_batch_size(method={method!r}): allowed are {', '.join(map(repr, METHODS))}")
        _check_loaders("scale_batch_size", method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse(BatchSizeFinder)
        finder = BatchSizeFinder(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)

        def search(trainer: Trainer, module: LightningModule) -> int | None:
            finder.setup(trainer, module, method)
            return finder.scale_batch_size(trainer, module)

        loaders = train_dataloaders if method == "fit" else dataloaders
        found: int | None = self._trainer.search(method, search, model, loaders, val_dataloaders, datamodule)
        return found

    def _refuse(self, kind: type[LearningRateFinder] | type[BatchSizeFinder]) -> None:
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            raise ValueError(
                f"the Trainer has a {kind.__name__} among its callbacks, which searches in its own time; leave it out, "
                "or do without the Tuner"
            )


def _check_loaders(name: str, method: str, train: Any, val: Any, others: Any) -> None:
    if method == "fit" and others is not None:
        raise MisconfigurationException(
            f"{name}(dataloaders=…) is not for method='fit'; give train_dataloaders and val_dataloaders"
        )
    if method != "fit" and (train is not None or val is not None):
        raise MisconfigurationException(
            f"{name}(train_dataloaders=…, val_dataloaders=…) is for method='fit'; give dataloaders for {method!r}"
        )
