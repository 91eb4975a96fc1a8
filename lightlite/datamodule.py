"""Data that comes as one object: loaders, and what makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from typing_extensions import Self

from lightlite.hooks import CheckpointHooks, DataHooks
from lightlite.hparams import HyperparametersMixin
from lightlite.restore import datamodule_from_checkpoint

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from lightlite.trainer import Trainer


class LightningDataModule(DataHooks, CheckpointHooks, HyperparametersMixin):
    """Loaders for training, validation, test and prediction, with the steps that prepare them.

    Override `prepare_data` (one process of each machine), `setup` (every rank), and `train_dataloader`,
    `val_dataloader`, `test_dataloader`, `predict_dataloader`. Semantics are those of Lightning 2.x.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.prepare_data_per_node = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}

    @property
    def name(self) -> str:
        """The class's name, for messages."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should keep of this object; plain data and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called on every rank where a call of the Trainer ends by an exception."""

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        val_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        test_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        predict_dataset: Dataset[Any] | Iterable[Dataset[Any]] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """Make one from datasets.

        Args:
            train_dataset: Dataset, or a sequence or mapping of them; shuffled, unless iterable-style.
            val_dataset: Dataset, or a sequence of them.
            test_dataset: Dataset, or a sequence of them.
            predict_dataset: Dataset, or a sequence of them.
            batch_size: Of every loader.
            num_workers: Of every loader.
            datamodule_kwargs: For the class's `__init__`.
        """
        from torch.utils.data import DataLoader, IterableDataset

        def loader(dataset: Any, shuffle: bool) -> Any:
            shuffle = shuffle and not isinstance(dataset, IterableDataset)
            return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)

        def loaders(datasets: Any, shuffle: bool = False) -> Any:
            if isinstance(datasets, Mapping):
                return {key: loader(dataset, shuffle) for key, dataset in datasets.items()}
            if isinstance(datasets, Sequence) and not hasattr(datasets, "__add__"):
                return [loader(dataset, shuffle) for dataset in datasets]
            if isinstance(datasets, (list, tuple)):
                return [loader(dataset, shuffle) for dataset in datasets]
            return loader(datasets, shuffle)

        datamodule = cls(**datamodule_kwargs)
        if train_dataset is not None:
            datamodule.train_dataloader = lambda: loaders(train_dataset, shuffle=True)  # type: ignore[method-assign]
        if val_dataset is not None:
            datamodule.val_dataloader = lambda: loaders(val_dataset)  # type: ignore[method-assign]
        if test_dataset is not None:
            datamodule.test_dataloader = lambda: loaders(test_dataset)  # type: ignore[method-assign]
        if predict_dataset is not None:
            datamodule.predict_dataloader = lambda: loaders(predict_dataset)  # type: ignore[method-assign]
        return datamodule

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make one from the hyper-parameters and the state that a checkpoint holds.

        Args:
            checkpoint_path: Path, URL or open file.
            map_location: As for `torch.load`.
            hparams_file: YAML file whose hyper-parameters are taken instead of the checkpoint's.
            weights_only: Accepted for compatibility; nothing in a file is ever executed.
            kwargs: For `__init__`, over the stored hyper-parameters.

        Raises:
            CheckpointError: For a file that is missing or is no sound checkpoint.
        """
        return datamodule_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, kwargs)
