"""Several ranks, started from the script: the same batches, numbers, predictions and errors as with one process."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, WeightedRandomSampler

import lightlite as pl
from lightlite.callbacks import EarlyStopping, ModelCheckpoint
from lightlite.errors import MetricError, MisconfigurationException

from .models import (
    FEATURES,
    TRAINING_ALONE,
    ListLogger,
    Net,
    NumberData,
    RankError,
    quiet_trainer,
    regression_data,
    regression_loader,
    weights,
)

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


def trainer_of(ranks: int, folder: Path, **settings: Any) -> pl.Trainer:
    return quiet_trainer(folder, devices=ranks, **settings)


def indexed_data(samples: int) -> Dataset[Any]:
    """Triples of index, x and y."""

    class Indexed(Dataset[Any]):
        pairs = regression_data(samples)

        def __len__(self) -> int:
            return samples

        def __getitem__(self, index: int) -> Any:
            return (index, *self.pairs[index])

    return Indexed()


def watched_net(folder: Path, *, manual: bool = False) -> pl.LightningModule:
    """A net that writes the indices of each batch to `folder`, in a file per rank, and logs its loss."""

    class Watched(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            index, x, y = batch
            with (folder / f"rank{self.global_rank}").open("a") as file:
                file.write(json.dumps(index.tolist()) + "\n")
            loss = nn.functional.mse_loss(self.net(x), y)
            self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(index))
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Watched()


class Run:
    """A fit on some ranks: its global batches (indices, sorted), loss curve, and final state."""

    def __init__(self, folder: Path, ranks: int, loader: Any, manual: bool = False, **settings: Any) -> None:
        folder = folder / f"on{ranks}"
        folder.mkdir()
        torch.manual_seed(11)
        self.module = watched_net(folder, manual=manual)
        logger = ListLogger()
        self.trainer = trainer_of(ranks, folder, **{"max_epochs": 2, "logger": logger, **settings})
        self.trainer.fit(self.module, loader)
        self.per_rank = [
            [json.loads(line) for line in (folder / f"rank{rank}").read_text().splitlines()] for rank in range(ranks)
        ]
        self.global_batches = [sorted(itertools.chain(*parts)) for parts in zip(*self.per_rank, strict=True)]
        self.losses = logger.history("loss_step")
        self.weights = weights(self.module)


def assert_same_training(actual: Run, expected: Run) -> None:
    assert actual.global_batches == expected.global_batches
    assert [step for step, _ in actual.losses] == [step for step, _ in expected.losses]
    assert [loss for _, loss in actual.losses] == pytest.approx([loss for _, loss in expected.losses], abs=1e-4)
    for name, value in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], value, rtol=0, atol=1e-5)


def in_order(batch_size: int, samples: int = 20) -> Any:
    return DataLoader(indexed_data(samples), batch_size=batch_size)


def shuffled(batch_size: int, samples: int = 20) -> Any:
    return DataLoader(indexed_data(samples), batch_size=batch_size, shuffle=True)


def shuffled_with_generator(batch_size: int, samples: int = 20) -> Any:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(indexed_data(samples), batch_size=batch_size, shuffle=True, generator=generator)


def weighted(batch_size: int, samples: int = 20) -> Any:
    sampler = WeightedRandomSampler(
        torch.linspace(0.1, 1, samples), samples, generator=torch.Generator().manual_seed(3)
    )
    return DataLoader(indexed_data(samples), batch_size=batch_size, sampler=sampler)


def from_batch_sampler(batch_size: int, samples: int = 20) -> Any:
    class Backwards(Sampler[Any]):
        def __iter__(self) -> Any:
            indices = list(reversed(range(samples)))
            for start in range(0, samples, batch_size):
                yield indices[start : start + batch_size]

        def __len__(self) -> int:
            return -(-samples // batch_size)

    return DataLoader(indexed_data(samples), batch_sampler=Backwards())


def dropping_last(batch_size: int) -> Any:
    return DataLoader(indexed_data(19), batch_size=batch_size, shuffle=True, drop_last=True)


def incomplete(batch_size: int) -> Any:
    return shuffled(batch_size, samples=22)


@pytest.mark.parametrize(
    "make_loader",
    [in_order, shuffled, shuffled_with_generator, weighted, from_batch_sampler, dropping_last, incomplete],
    ids=lambda function: function.__name__,
)
def test_two_ranks_train_like_one_with_twice_the_batch(tmp_path: Path, make_loader: Callable[[int], Any]) -> None:
    one, two = Run(tmp_path, 1, make_loader(4)), Run(tmp_path, 2, make_loader(2))
    assert len(one.global_batches) == 2 * (19 // 4 if make_loader is dropping_last else len(make_loader(4)))
    assert_same_training(two, one)


def test_three_ranks_train_like_one_with_thrice_the_batch(tmp_path: Path) -> None:
    assert_same_training(Run(tmp_path, 3, shuffled(2, 24)), Run(tmp_path, 1, shuffled(6, 24)))


def test_two_ranks_with_loader_workers(tmp_path: Path) -> None:
    def with_worker(batch_size: int) -> Any:
        return DataLoader(indexed_data(12), batch_size=batch_size, shuffle=True, num_workers=1)

    assert_same_training(Run(tmp_path, 2, with_worker(2), max_epochs=1), Run(tmp_path, 1, with_worker(4), max_epochs=1))


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.3}, {"manual": True}])
def test_accumulation_clipping_and_manual_optimization_on_two_ranks(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_same_training(Run(tmp_path, 2, shuffled(2), **settings), Run(tmp_path, 1, shuffled(4), **settings))


def test_an_incomplete_global_batch_is_completed_to_a_multiple_of_the_ranks_only(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, in_order(2, samples=9), max_epochs=1)
    assert run.per_rank == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [0]]]


def test_fewer_samples_than_ranks_still_train(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, in_order(2, samples=1), max_epochs=1)
    assert run.per_rank == [[[0]], [[0]], [[0]]]


def test_an_iterable_dataset_is_trained_on_once(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        data = indexed_data(12)

        def __iter__(self) -> Any:
            return (self.data[index] for index in range(12))

    one = Run(tmp_path, 1, DataLoader(Stream(), batch_size=4), max_epochs=1)
    two = Run(tmp_path, 2, DataLoader(Stream(), batch_size=2), max_epochs=1)
    assert_same_training(two, one)


def scoring_module() -> Any:
    """Logs counts, means, extremes and a custom reduction of batches of numbers."""

    class Scores(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("count", float(len(batch)), reduce_fx="sum")
            self.log("mean", batch.mean())
            self.log("lowest", batch.min(), reduce_fx="min")
            self.log("highest", batch.max(), reduce_fx="max")
            self.log("last_batch", float(batch_idx), reduce_fx="max")
            self.log("integer_mean", batch_idx)

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {
                "values": batch * self.weight,
                "batch_idx": batch_idx,
                "loader": dataloader_idx,
                "text": str(batch_idx),
            }

        test_step = validation_step

    return Scores()


def numbers(samples: int, **options: Any) -> Any:
    return DataLoader(NumberData(samples), **{"batch_size": 3, **options})


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_gives_the_numbers_of_one_process(tmp_path: Path, ranks: int) -> None:
    one, many = trainer_of(1, tmp_path), trainer_of(ranks, tmp_path)
    for samples in (1, 2, 3, 4, 7, 9, 10, 31):
        for run in ("validate", "test"):
            (expected,) = getattr(one, run)(scoring_module(), numbers(samples), verbose=False)
            (actual,) = getattr(many, run)(scoring_module(), numbers(samples), verbose=False)
            assert actual.keys() == expected.keys()
            assert actual["count"] == expected["count"] == samples
            assert actual == pytest.approx(expected, abs=1e-6)
            assert actual["mean"] == pytest.approx((samples - 1) / 2, abs=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_of_several_loaders_gives_the_numbers_of_one_process(tmp_path: Path, ranks: int) -> None:
    loaders = [numbers(1), numbers(8), numbers(5, shuffle=True)]
    expected = trainer_of(1, tmp_path).validate(scoring_module(), loaders, verbose=False)
    actual = trainer_of(ranks, tmp_path).validate(scoring_module(), loaders, verbose=False)
    assert [metrics.keys() for metrics in actual] == [metrics.keys() for metrics in expected]
    for one, many in zip(expected, actual, strict=True):
        assert many == pytest.approx(one, abs=1e-6)


def assert_same_predictions(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, list):
            assert_same_predictions(one, other)
        else:
            assert torch.equal(one["values"], other["values"])
            assert {**one, "values": None} == {**other, "values": None}


@pytest.mark.parametrize("ranks", [2, 3])
def test_predictions_are_complete_and_in_order(tmp_path: Path, ranks: int) -> None:
    one, many = trainer_of(1, tmp_path), trainer_of(ranks, tmp_path)
    for samples in (1, 2, 4, 7, 20):
        expected = one.predict(scoring_module(), numbers(samples))
        assert_same_predictions(many.predict(scoring_module(), numbers(samples)), expected)
    loaders = [numbers(7), numbers(2), numbers(12)]
    assert_same_predictions(many.predict(scoring_module(), loaders), one.predict(scoring_module(), loaders))
    assert not many.predict(scoring_module(), numbers(7), return_predictions=False)


def test_limits_count_batches_of_one_process_in_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(2, tmp_path, limit_val_batches=3, limit_predict_batches=3)
    (result,) = trainer.validate(scoring_module(), numbers(100), verbose=False)
    assert (result["count"], result["last_batch"]) == (9.0, 2.0)
    assert [output["batch_idx"] for output in trainer.predict(scoring_module(), numbers(100))] == [0, 1, 2]


def test_an_iterable_dataset_is_evaluated_once(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return (torch.tensor(float(index)) for index in range(10))

    one, two = trainer_of(1, tmp_path), trainer_of(2, tmp_path)
    loader = DataLoader(Stream(), batch_size=3)
    (expected,) = one.validate(scoring_module(), loader, verbose=False)
    (actual,) = two.validate(scoring_module(), loader, verbose=False)
    assert actual == pytest.approx(expected, abs=1e-6)
    assert_same_predictions(two.predict(scoring_module(), loader), one.predict(scoring_module(), loader))


def validating_module() -> Any:
    class Validating(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))
            self.log("count", float(len(batch[0])), reduce_fx="sum")

    torch.manual_seed(4)
    return Validating()


def test_validation_within_fit_is_that_of_one_process(tmp_path: Path) -> None:
    results = []
    for ranks, batch_size in ((1, 4), (2, 2)):
        callbacks = [EarlyStopping("val", patience=2), ModelCheckpoint(tmp_path / str(ranks), monitor="val")]
        trainer = trainer_of(ranks, tmp_path, max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(validating_module(), regression_loader(16 // batch_size, batch_size), regression_loader(7, 1))
        results.append((trainer, callbacks))
    (one, on_one), (two, on_two) = results
    assert two.callback_metrics["count"] == one.callback_metrics["count"] == 7
    assert float(two.callback_metrics["val"]) == pytest.approx(float(one.callback_metrics["val"]), abs=1e-5)
    assert Path(on_two[1].best_model_path).name == Path(on_one[1].best_model_path).name
    assert float(on_two[0].best_score) == pytest.approx(float(on_one[0].best_score), abs=1e-5)


def test_afterwards_everything_is_there_in_the_calling_script(tmp_path: Path) -> None:
    class Counts(pl.Callback):
        batches = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.batches += 1

    module, counts = validating_module(), Counts()
    module.note = "before"
    before = weights(module)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val")
    trainer = trainer_of(2, tmp_path, max_epochs=2, callbacks=[counts, checkpoint], enable_checkpointing=True)
    trainer.fit(module, regression_loader(4), regression_loader(2))
    assert counts.batches == 4
    assert not torch.equal(module.layer.weight, before["layer.weight"])
    assert Path(trainer.checkpoint_callback.best_model_path).is_file()
    assert (trainer.current_epoch, trainer.global_step, trainer.world_size) == (2, 4, 2)
    assert (trainer.is_global_zero, trainer.global_rank) == (True, 0)
    assert trainer.callback_metrics.keys() == {"val", "count"}
    assert next(module.parameters()).is_shared() is False
    module(torch.zeros(1, FEATURES)).sum().backward()
    assert trainer.test(dataloaders=regression_loader(1), verbose=False) == [{}]


def test_ranks_know_their_place_and_talk_to_each_other(tmp_path: Path) -> None:
    class Talks(Net):
        def on_train_end(self) -> None:
            mine = torch.tensor([float(self.global_rank)])
            said = {
                "gathered": self.all_gather(mine).flatten().tolist(),
                "sum": float(self.trainer.strategy.reduce(mine, reduce_op="sum")),
                "from_zero": self.trainer.strategy.broadcast(f"rank {self.global_rank}"),
                "zero": self.trainer.is_global_zero,
                "local": self.local_rank,
            }
            (tmp_path / f"said{self.global_rank}").write_text(json.dumps(said))

    trainer_of(2, tmp_path).fit(Talks(), regression_loader(2))
    said = [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
    common = {"gathered": [0.0, 1.0], "sum": 1.0, "from_zero": "rank 0"}
    assert said == [{**common, "zero": True, "local": 0}, {**common, "zero": False, "local": 1}]


@pytest.mark.parametrize(
    "error", [RankError("on rank 1"), ZeroDivisionError("on rank 1")], ids=lambda e: type(e).__name__
)
def test_an_exception_on_another_rank_arrives_with_its_own_type_and_a_new_fit_works(
    tmp_path: Path, error: Exception
) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_rank == 1:
                raise error
            return super().training_step(batch, batch_idx)

    trainer = trainer_of(2, tmp_path)
    with pytest.raises(type(error), match="on rank 1"):
        trainer.fit(Fails(), regression_loader(4))
    trainer.fit(Net(), regression_loader(4))
    assert trainer.global_step == 2


def test_an_exception_on_the_calling_rank_leaves_the_trainer_usable(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_rank == 0:
                raise RankError("on rank 0")
            return super().training_step(batch, batch_idx)

    trainer = trainer_of(2, tmp_path)
    with pytest.raises(RankError, match="on rank 0"):
        trainer.fit(Fails(), regression_loader(4))
    assert len(trainer.predict(Net(), regression_loader(3))) == 3


def test_a_key_that_one_rank_lacks_is_named_with_the_rank(tmp_path: Path) -> None:
    class Lacks(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("both", 1.0)
            if self.global_rank == 0:
                self.log("only_here", 1.0)

    with pytest.raises(MetricError, match=r"(?s)(?=.*only_here)(?=.*rank 1)"):
        trainer_of(2, tmp_path).validate(Lacks(), regression_loader(4), verbose=False)


def test_a_key_logged_by_the_first_rank_only_may_say_so(tmp_path: Path) -> None:
    class OnlyZero(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mine", float(self.global_rank + 1), rank_zero_only=True)

    (result,) = trainer_of(2, tmp_path).validate(OnlyZero(), regression_loader(4), verbose=False)
    assert result == {"mine": 1.0}


def test_a_batch_that_is_skipped_on_one_rank_is_refused_and_hangs_nobody(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if self.global_rank == 1 and batch_idx == 1 else loss

    trainer = trainer_of(2, tmp_path)
    with pytest.raises(MisconfigurationException, match=r"(?s)(?=.*training_step)(?=.*None)(?=.*rank 1)"):
        trainer.fit(Skips(), regression_loader(8))


def test_one_ranks_wish_to_stop_after_an_epoch_stops_all(tmp_path: Path) -> None:
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_rank == 1 and trainer.current_epoch == 1:
                trainer.should_stop = True

    trainer = trainer_of(2, tmp_path, max_epochs=50, callbacks=[Stops()])
    trainer.fit(Net(), regression_loader(4))
    assert trainer.current_epoch == 2


def test_one_ranks_wish_to_stop_within_an_epoch_stops_all_at_the_same_step(tmp_path: Path) -> None:
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_rank == 1 and batch_idx == 1:
                trainer.should_stop = True

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            (tmp_path / f"stopped{trainer.global_rank}").write_text(str(trainer.global_step))

    trainer = trainer_of(2, tmp_path, max_epochs=50, callbacks=[Stops()])
    trainer.fit(Net(), regression_loader(8))
    assert trainer.current_epoch <= 2
    assert (tmp_path / "stopped0").read_text() == (tmp_path / "stopped1").read_text()


def test_a_run_on_two_ranks_resumed_in_an_epoch_ends_like_the_uninterrupted_one(tmp_path: Path) -> None:
    class Drops(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.drop(x))

    ends = []
    for ckpt_path, seed in ((None, 1), (tmp_path / "step=3.ckpt", 2)):
        torch.manual_seed(seed)
        module = Drops()
        keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = trainer_of(2, tmp_path, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(module, DataLoader(regression_data(16), batch_size=2, shuffle=True), ckpt_path=ckpt_path)
        ends.append(weights(module))
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value)


def test_data_is_prepared_once_and_set_up_on_every_rank(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def prepare_data(self) -> None:
            with (tmp_path / "prepared").open("a") as file:
                file.write("x")

        def setup(self, stage: str) -> None:
            assert (tmp_path / "prepared").exists()
            (tmp_path / f"setup-{stage}-{self.trainer.global_rank}").touch()

        def train_dataloader(self) -> Any:
            return regression_loader(4)

    trainer_of(2, tmp_path).fit(Net(), datamodule=Data())
    assert (tmp_path / "prepared").read_text() == "x"
    assert sorted(path.name for path in tmp_path.glob("setup-*")) == ["setup-fit-0", "setup-fit-1"]


def test_the_module_may_be_built_late_on_every_rank_and_ends_up_equal(tmp_path: Path) -> None:
    class Late(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = None

        def configure_model(self) -> None:
            if self.layer is None:
                self.layer = nn.Linear(FEATURES, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

        def on_train_end(self) -> None:
            (tmp_path / f"weight{self.global_rank}").write_text(json.dumps(self.layer.weight.tolist()))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer_of(2, tmp_path).fit(Late(), regression_loader(4))
    assert (tmp_path / "weight0").read_text() == (tmp_path / "weight1").read_text()


def test_loader_workers_of_different_ranks_draw_different_random_numbers(tmp_path: Path) -> None:
    class Noise(Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(1, dtype=torch.float64)

    class Look(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    loader = DataLoader(Noise(), batch_size=1, num_workers=1)
    drawn = torch.cat(trainer_of(2, tmp_path).predict(Look(), loader))
    assert len(drawn.unique()) == 8


def test_persistent_workers_end_with_the_call(tmp_path: Path) -> None:
    loader = DataLoader(regression_loader(4).dataset, num_workers=1, persistent_workers=True)
    trainer = trainer_of(2, tmp_path)
    trainer.fit(Net(), loader)
    began = time.monotonic()
    trainer.predict(Net(), regression_loader(2))
    assert time.monotonic() - began < 4  # each worker that was left over cost five seconds
