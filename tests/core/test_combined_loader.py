"""Several loaders as one: CombinedLoader by itself, and wherever a Trainer takes loaders, on one rank and on two."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.data import RankLoaders
from lightlite.errors import MisconfigurationException
from lightlite.utilities.combined_loader import MODES, CombinedLoader, is_nest

from .models import TRAINING_ALONE, NumberData, assert_same_bits, quiet_trainer, weights

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [({"a": 0, "b": 10}, 0, 0), ({"a": 1, "b": 11}, 1, 0)]),
        (
            "max_size_cycle",
            [({"a": 0, "b": 10}, 0, 0), ({"a": 1, "b": 11}, 1, 0), ({"a": 0, "b": 12}, 2, 0)],
        ),
        ("max_size", [({"a": 0, "b": 10}, 0, 0), ({"a": 1, "b": 11}, 1, 0), ({"a": None, "b": 12}, 2, 0)]),
        ("sequential", [(0, 0, 0), (1, 1, 0), (10, 0, 1), (11, 1, 1), (12, 2, 1)]),
    ],
)
def test_each_mode_yields_batch_index_and_loader(mode: str, expected: list[Any]) -> None:
    loader = CombinedLoader({"a": range(2), "b": range(10, 13)}, mode)
    assert list(loader) == expected
    assert list(loader) == expected, "a second pass is like the first"
    assert (len(loader), loader.mode) == (len(expected), mode)


@pytest.mark.parametrize(
    ("mode", "length"), [("min_size", 1), ("max_size", 2), ("max_size_cycle", 2), ("sequential", 3)]
)
def test_limits_hold_for_length_and_batches(mode: str, length: int) -> None:
    loader = CombinedLoader([range(5), range(4)], mode)
    loader.limits = [2, 1]
    assert len(loader) == len(list(loader)) == length
    loader.limits = 9
    assert loader.limits == [9, 9]
    assert len(loader) == {"min_size": 4, "sequential": 9}.get(mode, 5)


def test_nests_of_any_depth_keep_their_types() -> None:
    nest = OrderedDict(a=[range(2), (range(2),)], b=Pair(range(2), {"c": range(7, 9)}), d=[7, 8])
    loader = CombinedLoader(nest)
    assert loader.iterables is nest
    assert loader.flattened == [range(2), range(2), range(2), range(7, 9), [7, 8]]
    (batch, _, _), _ = loader
    assert batch == OrderedDict(a=[0, (0,)], b=Pair(0, {"c": 7}), d=7)
    assert (type(batch), type(batch["b"])) == (OrderedDict, Pair)


def test_the_iterables_can_be_replaced() -> None:
    loader = CombinedLoader({"a": range(2), "b": (range(3),)})
    loader.flattened = [[5, 6], [7]]
    assert loader.iterables == {"a": [5, 6], "b": ([7],)}
    assert list(loader) == [({"a": 5, "b": (7,)}, 0, 0)]


def test_samplers_come_nested_as_the_loaders_are() -> None:
    loader = DataLoader(NumberData(2))
    combined = CombinedLoader({"a": loader, "b": range(2)})
    assert combined.sampler == {"a": loader.sampler, "b": None}
    assert combined.batch_sampler == {"a": loader.batch_sampler, "b": None}


def test_it_can_be_sent_to_other_processes_while_it_is_iterated() -> None:
    loader = CombinedLoader([DataLoader(NumberData(2)), range(2)])
    assert next(iter(loader))[1] == 0
    assert [index for _, index, _ in pickle.loads(pickle.dumps(loader))] == [0, 1]


def test_reset_ends_workers_and_forgets_the_place() -> None:
    part = DataLoader(NumberData(4), num_workers=1, persistent_workers=True)
    loader = CombinedLoader([part])
    next(iter(loader))
    workers = part._iterator._workers
    loader.reset()
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(RuntimeError, match=r"call iter\(\) first"):
        next(loader)


class Stream(IterableDataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(self.samples)))


def test_wrong_use_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"mode='max'\): allowed are 'min_size', 'max_size_cycle', 'max_size', 'seq"):
        CombinedLoader([range(2)], "max")
    loader = CombinedLoader([range(2), range(3)])
    with pytest.raises(ValueError, match="set to 1 iterables; it has 2"):
        loader.flattened = [range(2)]
    with pytest.raises(ValueError, match="set to 3 numbers; give 2"):
        loader.limits = [1, 2, 3]
    with pytest.raises(TypeError, match="has no length: one of its iterables has none"):
        len(CombinedLoader([range(2), Stream(3)], "max_size"))
    with pytest.raises(ValueError, match=r"iterable 0 of CombinedLoader.*yields nothing"):
        list(CombinedLoader([[], [1]], "max_size_cycle"))


def test_lists_of_data_are_loaders_and_lists_of_loaders_are_nests() -> None:
    tensor = torch.ones(2)
    loaders: list[Any] = [
        [range(2)],
        [DataLoader([1])],
        ({"a": [range(2)]},),
        {"a": [tensor]},
        Pair(range(2), [range(3)]),
    ]
    assert [is_nest(loader) for loader in loaders] == [True] * 5
    batches: list[Any] = [[tensor], [(tensor, tensor)], [{"x": tensor}], [1, 2], ["a"], [], range(3), DataLoader([1])]
    assert [is_nest(loader) for loader in batches] == [False] * 8


# In a Trainer.


def numbers(samples: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(NumberData(samples), batch_size=batch_size, **options)


def shown(batch: Any) -> Any:
    """A nest of tensors as one of lists."""
    if isinstance(batch, dict):
        return {key: shown(part) for key, part in batch.items()}
    return batch.tolist() if isinstance(batch, Tensor) else batch


class Noting(pl.LightningModule):
    """Trains one number by any nest of numbers, with noise that a resumed run has to repeat; notes what it is given."""

    def __init__(self, noise: float = 0.5) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.noise = nn.Dropout(noise)
        self.trained: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append(shown(batch))
        parts = [part for part in (batch.values() if isinstance(batch, dict) else [batch]) if part is not None]
        return self.noise(self.layer(torch.cat(parts).unsqueeze(1) / 10)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        values = [part for part in batch.values() if part is not None]
        self.log("sum", torch.cat(values).sum(), batch_size=1, reduce_fx="sum")
        self.log("odd", (sum(part.sum() for part in values) * (batch_idx + 1)).sqrt(), batch_size=1, reduce_fx="sum")
        self.log("count", 1.0, batch_size=1, reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


EXPECTED = {
    "min_size": [([0, 1], [0, 1, 2]), ([2], [3, 4, 5])],
    "max_size_cycle": [([0, 1], [0, 1, 2]), ([2], [3, 4, 5]), ([0, 1], [6])],
    "max_size": [([0, 1], [0, 1, 2]), ([2], [3, 4, 5]), (None, [6])],
}


@pytest.mark.parametrize("mode", MODES)
def test_training_takes_every_mode(tmp_path: Path, mode: str) -> None:
    loaders = {"a": numbers(3, 2), "b": numbers(7, 3)}
    module, trainer = Noting(), quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, CombinedLoader(loaders, mode))
    expected: list[Any] = [{"a": a, "b": b} for a, b in EXPECTED.get(mode, ())]
    if mode == "sequential":
        expected = [batch[0].tolist() for batch in CombinedLoader(loaders, mode)]
    assert module.trained == expected * 2
    assert trainer.num_training_batches == len(expected)
    assert trainer.global_step == 2 * len(expected)


def test_a_nest_is_trained_on_until_the_longest_loader_is_over(tmp_path: Path) -> None:
    module, trainer = Noting(), quiet_trainer(tmp_path)
    trainer.fit(module, {"a": numbers(3, 2), "b": numbers(7, 3)})
    assert module.trained == [{"a": a, "b": b} for a, b in EXPECTED["max_size_cycle"]]


def test_limits_and_estimates_hold_for_several_loaders(tmp_path: Path) -> None:
    module, trainer = Noting(), quiet_trainer(tmp_path, limit_train_batches=0.5, max_epochs=3)
    trainer.fit(module, {"a": numbers(4, 2), "b": numbers(8, 2)})
    assert (trainer.num_training_batches, trainer.estimated_stepping_batches, trainer.global_step) == (2, 6, 6)
    assert len(module.trained) == 6


def test_a_stream_beside_a_loader_is_as_long_as_the_shortest(tmp_path: Path) -> None:
    module, trainer = Noting(), quiet_trainer(tmp_path)
    trainer.fit(module, CombinedLoader({"a": numbers(4, 2), "b": DataLoader(Stream(90), batch_size=2)}, "min_size"))
    assert (trainer.num_training_batches, len(module.trained)) == (2, 2)


def test_overfit_batches_takes_the_shuffling_out_of_every_loader(tmp_path: Path) -> None:
    module, trainer = Noting(), quiet_trainer(tmp_path, overfit_batches=1)
    with pytest.warns(UserWarning, match="in the dataset's order, and so not those of RandomSampler; give"):
        trainer.fit(module, CombinedLoader({"a": numbers(9, 3, shuffle=True), "b": numbers(9, 3, shuffle=True)}))
    assert module.trained == [{"a": [0, 1, 2], "b": [0, 1, 2]}]


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_on_the_global_batches_of_one(tmp_path: Path, mode: str) -> None:
    class Writing(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            with (tmp_path / f"{self.trainer.world_size}-{self.global_rank}").open("a") as file:
                file.write(repr(self.trained[-1]) + "\n")
            return loss

    def seen(world: int) -> list[list[Any]]:
        files = [tmp_path / f"{world}-{rank}" for rank in range(world)]
        return [[eval(line) for line in file.read_text().splitlines()] for file in files]

    for world in (1, 2):
        torch.manual_seed(5)
        sizes = [size // world for size in (2, 4)]
        loaders = {"a": numbers(6, sizes[0], shuffle=True), "b": numbers(20, sizes[1], shuffle=True)}
        trainer = quiet_trainer(tmp_path, devices=world, max_epochs=2)
        trainer.fit(Writing(noise=0), CombinedLoader(loaders, mode))

    def whole(first: Any, second: Any) -> Any:
        if isinstance(first, dict):
            return {key: whole(first[key], second[key]) for key in first}
        return None if first is None else first + second

    (alone,), together = seen(1), seen(2)
    assert [whole(first, second) for first, second in zip(*together, strict=True)] == alone
    assert len(alone) == 2 * {"min_size": 3, "sequential": 8}.get(mode, 5)


class Jittering(NumberData):
    """Draws from the global generator for each sample, as augmentation does without workers."""

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + torch.rand(()) / 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [2, 7])
def test_a_run_resumed_within_an_epoch_goes_on_bit_for_bit(tmp_path: Path, mode: str, step: int) -> None:
    def run(seed: int, ckpt_path: Path | None = None) -> Noting:
        torch.manual_seed(1)
        module = Noting()
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        loaders = {
            "a": DataLoader(Jittering(6), batch_size=2, shuffle=True),
            "b": DataLoader(Jittering(16), batch_size=2, shuffle=True, generator=generator),
        }
        keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[keeper], enable_checkpointing=True)
        trainer.fit(module, CombinedLoader(loaders, mode), ckpt_path=ckpt_path)
        return module

    whole = run(seed=2)
    resumed = run(seed=3, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.trained == whole.trained[step:]
    assert_same_bits(weights(resumed), weights(whole))


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
@pytest.mark.parametrize("limit", [1.0, 6])
def test_validation_on_combined_batches_gives_the_same_numbers_on_two_ranks(
    tmp_path: Path, mode: str, limit: float
) -> None:
    scores = []
    for world in (1, 2):
        own, other = (torch.Generator().manual_seed(seed) for seed in (4, 5))
        loaders = {"a": numbers(5, 2, shuffle=True, generator=own), "b": numbers(17, 2, shuffle=True, generator=other)}
        trainer = quiet_trainer(tmp_path, devices=world, limit_val_batches=limit)
        (values,) = trainer.validate(Noting(), CombinedLoader(loaders, mode), verbose=False)
        scores.append(values)
    assert scores[1] == pytest.approx(scores[0])
    assert scores[0]["count"] == min({"min_size": 3}.get(mode, 9), 9 if limit == 1.0 else limit)


@pytest.mark.parametrize("limit", [1.0, 6])
def test_cycling_loaders_shuffled_by_the_global_generator_are_evaluated_alike_on_two_ranks(
    tmp_path: Path, limit: float
) -> None:
    seen = []
    for world in (1, 2):
        torch.manual_seed(3)
        loaders = {
            "a": numbers(5, 2, shuffle=True),
            "b": numbers(17, 2, shuffle=True),
            "c": DataLoader(SizedStream(5), batch_size=2),
            "d": numbers(4, 2, sampler=RandomSampler(NumberData(4), replacement=True)),
        }
        trainer = quiet_trainer(tmp_path, devices=world, limit_predict_batches=limit)
        predictions = trainer.predict(Noting(), CombinedLoader(loaders, "max_size_cycle"))
        seen.append(([shown(batch) for batch in predictions], torch.rand(()).item()))
    assert len(seen[0][0]) == (9 if limit == 1.0 else 6)
    assert seen[1] == seen[0]


def test_streams_cycle_beside_a_longer_loader_on_two_ranks(tmp_path: Path) -> None:
    scores = []
    for world in (1, 2):
        loaders = {"a": DataLoader(SizedStream(5), batch_size=2), "b": numbers(17, 2)}
        trainer = quiet_trainer(tmp_path, devices=world)
        scores += trainer.validate(Noting(), CombinedLoader(loaders, "max_size_cycle"), verbose=False)
    assert scores[1] == pytest.approx(scores[0])
    assert scores[0]["sum"] == 3 * sum(range(5)) + sum(range(17))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.samples


@pytest.mark.parametrize("world", [1, 2])
def test_nests_of_evaluation_loaders_come_one_after_the_other(tmp_path: Path, world: int) -> None:
    nest = {"x": [numbers(3, 2), numbers(2, 2)], "y": numbers(1, 1)}
    trainer = quiet_trainer(tmp_path, devices=world)
    for loaders in (nest, CombinedLoader(nest, "sequential")):
        predictions = trainer.predict(Noting(), loaders)
        assert shown_lists(predictions) == [[[0, 1], [2]], [[0, 1]], [[0]]]
    assert trainer.num_predict_batches == [2, 1, 1]


@pytest.mark.parametrize("world", [1, 2])
def test_predictions_of_combined_batches_come_whole_and_in_order(tmp_path: Path, world: int) -> None:
    loaders = CombinedLoader({"a": numbers(3, 2), "b": numbers(7, 3)}, "max_size")
    predictions = quiet_trainer(tmp_path, devices=world).predict(Noting(), loaders)
    assert [shown(batch) for batch in predictions] == [{"a": a, "b": b} for a, b in EXPECTED["max_size"]]


def shown_lists(predictions: Any) -> Any:
    return [[shown(batch) for batch in loader] for loader in predictions]


def test_the_given_nest_can_be_reached() -> None:
    nest = {"a": numbers(2, 1), "b": [numbers(2, 1)]}
    loader = RankLoaders(CombinedLoader(nest), training=True)
    assert loader.source.iterables is nest
    assert loader.loader["b"][0].dataset is nest["b"][0].dataset


def test_what_is_no_loader_in_a_nest_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match="number 1 of what was given as the train loader is 3 of type int"
    ):
        quiet_trainer(tmp_path).fit(Noting(), {"a": numbers(2, 1), "b": 3})
    with pytest.raises(MisconfigurationException, match=r"the train loader is {}, in which there is none"):
        quiet_trainer(tmp_path).fit(Noting(), {})


def test_cycling_through_an_evaluation_of_unknown_length_is_refused_on_several_ranks(tmp_path: Path) -> None:
    loaders = CombinedLoader({"a": DataLoader(Stream(5)), "b": numbers(9, 1)}, "max_size_cycle")
    (scores,) = quiet_trainer(tmp_path).validate(Noting(), loaders, verbose=False)
    assert scores["count"] == 9
    with pytest.raises(MisconfigurationException, match="needs loaders that have a length; give them __len__"):
        quiet_trainer(tmp_path, devices=2).validate(Noting(), loaders, verbose=False)
