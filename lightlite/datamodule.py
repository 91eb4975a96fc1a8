"""Data that comes as one object: loaders, and what makes them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from typing_extensions import Self

from lightlite.hooks import CheckpointHooks, DataHooks
from lightlite.hparams import HyperparametersMixin
from lightlite.restore import datamodule_from_checkpoint
from lightlite.utilities.combined_loader import CombinedLoader, is_nest, sized_len

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from lightlite.trainer import Trainer


class LightningDataModule(DataHooks, CheckpointHooks, HyperparametersMixin):
    """Loaders for training, validation, test and prediction, with the steps that prepare them.

    Override `prepare_data` (one process of each machine), `setup` (every rank), and `train_dataloader`,
    `val_dataloader`, `test_dataloader`, `predict_dataloader`. Semantics are those of Lightning 2.x.
    """

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    name: str | None = None
    """Anything; lightlite does not look at it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.trainer: Trainer | None = None
        self.prepare_data_per_node = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}

    def __str__(self) -> str:
        """Sizes of the datasets of each stage's loaders, for stages that are set up."""
        stages = {"Train": "train", "Validation": "val", "Test": "test", "Predict": "predict"}
        return os.linesep.join(f"{{{title} dataloader: {self._sizes(stage)}}}" for title, stage in stages.items())

    def _sizes(self, stage: str) -> str:
        try:
            loaders = getattr(self, f"{stage}_dataloader")()
        except Exception:  # whatever a hook raises whose setup() has not been called
            return "None"
        several = is_nest(loaders)
        flat = CombinedLoader(loaders).flattened if several else [loaders]
        lengths = [sized_len(getattr(loader, "dataset", None)) for loader in flat]
        sizes = [f"size={'NA' if length is None else length}" for length in lengths]
        return " ; ".join(f"{number}. {size}" for number, size in enumerate(sizes, 1)) if several else sizes[0]

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
            batch_size: Of every loader; an argument of the class's `__init__` too, where it takes one of that name.
            num_workers: The same.
            datamodule_kwargs: For the class's `__init__`.
        """
        from torch.utils.data import DataLoader, IterableDataset

        def loaders(datasets: Any, shuffle: bool = False) -> Any:
            if isinstance(datasets, Mapping):
                return {key: loaders(dataset, shuffle) for key, dataset in datasets.items()}
            if isinstance(datasets, (list, tuple)):
                return [loaders(dataset, shuffle) for dataset in datasets]
            shuffle = shuffle and not isinstance(datasets, IterableDataset)
            return DataLoader(datasets, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)

        taken = inspect.signature(cls.__init__).parameters
        anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        sizes = {"batch_size": batch_size, "num_workers": num_workers}
        datamodule_kwargs |= {name: value for name, value in sizes.items() if anything or name in taken}
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
