"""Small modules, data and observers that the tests of the core share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightlite as pl
from lightlite.loggers import Logger

FEATURES = 4
TRAINING_ALONE = "ignore:.*has a validation_step, but there is no val loader"
"""The warning that a test of training alone may get, as a filter."""


def quiet_trainer(folder: Path, **overrides: Any) -> pl.Trainer:
    """A Trainer on one CPU process which prints nothing and writes nothing unless asked to."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "logger": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **overrides})


def regression_data(samples: int = 8, features: int = FEATURES) -> TensorDataset:
    """`samples` pairs (x, y), shapes (features,) and (1,), always the same."""
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(samples, features, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(samples, 1, generator=generator))


def regression_loader(batches: int = 4, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    """`batches` batches of `batch_size` samples."""
    return DataLoader(regression_data(batches * batch_size), batch_size=batch_size, **options)


class NumberData(Dataset[Tensor]):
    """Sample i is the float i."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        return torch.tensor(float(index))


class Net(pl.LightningModule):
    """Linear regression with SGD; every step is there, nothing is logged."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ManyLoadersNet(Net):
    """Evaluates and predicts on any number of loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0])


class CountingNet(Net):
    """Remembers the batch indices that each step was given, as (epoch, batch_idx)."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.trained: list[tuple[int, int]] = []
        self.validated: list[tuple[int, int]] = []
        self.tested: list[int] = []
        self.predicted: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.append((self.current_epoch, batch_idx))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.validated.append((self.current_epoch, batch_idx))
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.tested.append(batch_idx)
        return super().test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.predicted.append(batch_idx)
        return super().predict_step(batch, batch_idx)


class ListLogger(Logger):
    """Keeps what it is given: `rows` of (step, metrics), and hyperparameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.hyperparameters: list[Any] = []

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hyperparameters.append(params)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has `name`."""
        return [(step, metrics[name]) for step, metrics in self.rows if name in metrics]

    def names(self) -> set[str]:
        return {name for _, metrics in self.rows for name in metrics}


class LearningRates(pl.Callback):
    """Keeps the learning rate of the first optimizer's first group as each batch starts."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two states have the same names and exactly the same numbers."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs by {(actual[name] - value).abs().max():.3g}"


class RankError(Exception):
    """Raised by a test on one rank."""
