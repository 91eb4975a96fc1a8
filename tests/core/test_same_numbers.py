"""Several ranks give the numbers, predictions and orders of one process, and say so where they cannot."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

import lightlite as pl
from lightlite.callbacks import BasePredictionWriter
from lightlite.errors import MetricError, MisconfigurationException
from lightlite.plugins.cpu import CPUAccelerator

from .models import TRAINING_ALONE, Net, NumberData, quiet_trainer, regression_data
from .same_numbers import Crew, SumMetric, check_random_cases


@pytest.fixture(scope="module", autouse=True)
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Keeps the helpers warm for all of these tests."""
    with contextlib.closing(Crew(tmp_path_factory.mktemp("crew"))) as crew:
        yield crew


@pytest.mark.filterwarnings("ignore")  # torch's advice on numbers of loader workers
@pytest.mark.parametrize("seed", [1, None], ids=["fixed seed", "printed seed"])
def test_random_cases(crew: Crew, seed: int | None) -> None:
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    sys.stdout.write(f"python -m core.same_numbers --cases 7 --seed {seed}\n")
    check_random_cases(7, seed, crew)


class Identity(pl.LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch


def predicted(trainer: pl.Trainer, loader: Any) -> list[Any]:
    return [batch.tolist() for batch in trainer.predict(Identity(), loader)]


def test_a_limit_leaves_a_loaders_own_generator_where_one_process_does(tmp_path: Path) -> None:
    orders = []
    for ranks in (1, 2):
        generator = torch.Generator().manual_seed(1)
        loader = DataLoader(NumberData(9), batch_size=2, shuffle=True, generator=generator)
        trainer = quiet_trainer(tmp_path, devices=ranks, limit_predict_batches=3)
        orders.append([predicted(trainer, loader), predicted(trainer, loader), generator.get_state().tolist()])
    assert orders[0] == orders[1]


@pytest.mark.filterwarnings(TRAINING_ALONE)
def test_a_limit_leaves_the_generator_in_training_too(tmp_path: Path) -> None:
    weights = []
    for ranks, batch_size in ((1, 4), (2, 2)):
        generator = torch.Generator().manual_seed(1)
        loader = DataLoader(regression_data(20), batch_size=batch_size, shuffle=True, generator=generator)
        torch.manual_seed(3)
        module = Net()
        quiet_trainer(tmp_path, devices=ranks, max_epochs=3, limit_train_batches=3).fit(module, loader)
        weights.append(module.layer.weight.detach().clone())
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


def test_a_sampler_that_draws_otherwise_on_each_rank_is_refused(tmp_path: Path) -> None:
    class Fresh(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(np.random.default_rng().permutation(1000))

        def __len__(self) -> int:
            return 1000

    loader = DataLoader(NumberData(1000), batch_size=10, sampler=Fresh())
    with pytest.raises(MisconfigurationException, match=r"draws other indices on rank 1 than on rank 0: \[\d+, "):
        quiet_trainer(tmp_path, devices=2).predict(Identity(), loader)


def test_batches_come_in_order_from_workers_that_need_not_keep_it(tmp_path: Path) -> None:
    class Slow(NumberData):
        def __getitem__(self, index: int) -> Tensor:
            time.sleep(0.05 * (index % 3 == 0))
            return super().__getitem__(index)

    loader = DataLoader(Slow(12), batch_size=1, num_workers=2, in_order=False)
    assert predicted(quiet_trainer(tmp_path, devices=2), loader) == [[float(index)] for index in range(12)]


def test_persistent_workers_end_with_the_call_on_one_device(tmp_path: Path) -> None:
    loader = DataLoader(NumberData(4), num_workers=1, persistent_workers=True)
    trainer = quiet_trainer(tmp_path)
    assert predicted(trainer, loader) == predicted(trainer, loader) == [[0.0], [1.0], [2.0], [3.0]]
    assert loader._iterator is None


class Shards(IterableDataset[Any]):
    """Each rank's own numbers, again dealt out to its loader workers."""

    def __init__(self, shards: list[list[int]]) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (torch.tensor(float(number)) for number in self.shards[dist.get_rank()][first::step])


class Tally(Identity):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("count", len(batch), reduce_fx="sum")
        self.log("mean", batch.mean())

    test_step = validation_step


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [[[0, 1, 2, 3, 4], [], [5]], [[], [0], []], [[], [], []]], ids=str)
def test_shards_of_any_size_are_scored_once(tmp_path: Path, shards: list[list[int]], workers: int) -> None:
    trainer = quiet_trainer(tmp_path, devices=3, use_distributed_sampler=False)
    loader = DataLoader(Shards(shards), batch_size=2, num_workers=workers)
    samples = sorted(itertools.chain(*shards))
    expected = [{"count": len(samples), "mean": sum(samples) / len(samples)}] if samples else [{}]
    assert trainer.validate(Tally(), loader, verbose=False) == [pytest.approx(metrics) for metrics in expected]
    assert trainer.test(Tally(), loader, verbose=False) == [pytest.approx(metrics) for metrics in expected]
    assert sorted(itertools.chain(*predicted(trainer, loader))) == samples


class Lacks(pl.LightningModule):
    """One rank does not log a key."""

    def __init__(self, lacking: int) -> None:
        super().__init__()
        self.lacking = lacking

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("both", 1.0)
        if self.global_rank != self.lacking:
            self.log("most", 1.0)


class Notes(pl.Callback):
    """Each rank writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        (self.folder / f"rank{trainer.global_rank}").write_text(f"{type(exception).__name__}: {exception}")


@pytest.mark.parametrize("lacking", [0, 2])
def test_every_rank_is_told_at_once_which_rank_lacks_a_key(tmp_path: Path, lacking: int) -> None:
    trainer = quiet_trainer(tmp_path, devices=3, callbacks=[Notes(tmp_path)])
    trainer.validate(Tally(), DataLoader(NumberData(3)), verbose=False)
    having = min({0, 1, 2} - {lacking})
    message = f"rank {lacking} did not log 'most' in validation_step, which rank {having} logged"
    began = time.monotonic()
    with pytest.raises(MetricError, match=message):
        trainer.validate(Lacks(lacking), DataLoader(NumberData(3)), verbose=False)
    assert time.monotonic() - began < 5
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(3)]
    assert all(text.startswith(f"MetricError: {message}") for text in told)


def test_a_rank_without_batches_lacks_no_key(tmp_path: Path) -> None:
    loader = DataLoader(NumberData(2))
    trainer = quiet_trainer(tmp_path, devices=3)
    assert trainer.validate(Lacks(lacking=2), loader, verbose=False) == [{"both": 1.0, "most": 1.0}]


class Measured(Net):
    """Logs a metric, of which a rank without a batch knows from the module only."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        self.metrics = [SumMetric()]
        self.total = self.metrics[0] if registered else None
        self.values: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metrics[0](torch.ones(len(batch)))
        self.log("total", self.metrics[0])

    def on_validation_end(self) -> None:
        self.values.append(float(self.trainer.callback_metrics["total"]))


def test_a_metric_starts_anew_on_ranks_without_batches_too(tmp_path: Path) -> None:
    module = Measured(registered=True)
    loader = DataLoader(regression_data(6), batch_size=2)
    quiet_trainer(tmp_path, devices=2, max_epochs=3).fit(module, loader, DataLoader(NumberData(3), batch_size=3))
    assert module.values == [3.0, 3.0, 3.0]


def test_a_metric_that_ranks_without_batches_cannot_find_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, devices=2)
    with pytest.raises(MisconfigurationException, match=r"'total'.*no attribute of the module.*self\.total = "):
        trainer.validate(Measured(registered=False), DataLoader(NumberData(1)), verbose=False)
    assert trainer.validate(Measured(registered=False), DataLoader(NumberData(2)), verbose=False) == [{"total": 2.0}]


def test_a_custom_reduction_gets_the_values_in_the_order_of_the_batches(tmp_path: Path) -> None:
    class Ordered(pl.LightningModule):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx not in (0, 2, 5):
                self.log("digits", float(batch_idx), reduce_fx=as_digits)

    def as_digits(values: Tensor) -> float:
        return float("".join(str(int(value)) for value in values))

    loader = DataLoader(NumberData(8))
    one = quiet_trainer(tmp_path).validate(Ordered(), loader, verbose=False)
    two = quiet_trainer(tmp_path, devices=2).validate(Ordered(), loader, verbose=False)
    assert one == two == [{"digits": 13467.0}]


class Thing:
    """An output that knows where it is."""

    def __init__(self, where: str) -> None:
        self.where = where

    def to(self, device: torch.device) -> Thing:
        return Thing(device.type)


@pytest.mark.parametrize("keep", ["returned", "written"])
def test_outputs_that_are_kept_leave_the_device_on_a_single_rank_too(tmp_path: Path, keep: str) -> None:
    class Elsewhere(CPUAccelerator):
        def batch_mover(self, device: torch.device) -> Any:
            return lambda batch: batch

    class Predicts(pl.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"thing": Thing("elsewhere")}

    class Writer(BasePredictionWriter):
        def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
            self.places = [output["thing"].where for output in predictions]

    writer = Writer("epoch")
    trainer = quiet_trainer(tmp_path, accelerator=Elsewhere(), callbacks=[writer])
    predictions = trainer.predict(Predicts(), DataLoader(NumberData(2)), return_predictions=keep == "returned")
    assert writer.places == ["cpu", "cpu"]
    if keep == "returned":
        assert [output["thing"].where for output in predictions] == ["cpu", "cpu"]
