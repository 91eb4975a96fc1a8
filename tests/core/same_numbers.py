"""Whether several ranks give the numbers and predictions of one process, on random loaders.

    python -m core.same_numbers --cases 300 --seed 7       (in tests/)

A case is a number of ranks, one or two loaders, and a limit. Every rank has to return what one process returns with
equal loaders: from validate, test and predict. A case that fails is reduced to a simpler one that fails, and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, WeightedRandomSampler, get_worker_info

import lightlite as pl
from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.loops.evaluate import run_evaluation, run_predict
from lightlite.loops.session import DataSource
from lightlite.progress import TrainerFn

from .models import NumberData, quiet_trainer

MAP_STYLE = ("in order", "shuffled", "own generator", "weighted", "lazy sampler", "batch sampler", "unsized batches")
STREAMS = ("stream", "shuffled stream", "split by worker", "iterable")
SPLIT = "split by rank"


@dataclasses.dataclass(frozen=True)
class Loader:
    """One loader: `samples` numbers 0, 1, …, in batches; `batch_size` None for single samples that are no batch."""

    kind: str
    samples: int
    batch_size: int | None
    drop_last: bool
    workers: int
    persistent: bool

    def make(self) -> Any:
        if not self.samples and self.kind in ("shuffled", "own generator", "weighted"):
            return dataclasses.replace(self, kind="in order").make()  # torch shuffles nothing that is empty
        data, options = NumberData(self.samples), self._options()
        batching = {"batch_size": self.batch_size, "drop_last": self.drop_last}
        generator = torch.Generator().manual_seed(self.samples)
        if self.kind == "in order":
            return DataLoader(data, **batching, **options)
        if self.kind == "shuffled":
            return DataLoader(data, shuffle=True, **batching, **options)
        if self.kind == "own generator":
            return DataLoader(data, shuffle=True, generator=generator, **batching, **options)
        if self.kind == "weighted":
            weights = torch.linspace(0.1, 1, self.samples)
            sampler = WeightedRandomSampler(weights, self.samples, generator=generator)
            return DataLoader(data, sampler=sampler, **batching, **options)
        if self.kind == "lazy sampler":
            return DataLoader(data, sampler=LazySampler(self.samples), **batching, **options)
        if self.kind in ("batch sampler", "unsized batches"):
            batches = RaggedBatches if self.kind == "batch sampler" else UnsizedBatches
            return DataLoader(data, batch_sampler=batches(self.samples), **options)
        if self.kind == "iterable":
            return Batches(self.samples, self.batch_size or 1)
        stream = Stream(self.samples, self.kind, self.batch_size is None)
        return DataLoader(stream, **batching, **options)

    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.workers, "persistent_workers": self.persistent and self.workers > 0}


@dataclasses.dataclass(frozen=True)
class Case:
    ranks: int
    loaders: tuple[Loader, ...]
    limit: int | float | None

    @property
    def split(self) -> bool:
        return any(loader.kind == SPLIT for loader in self.loaders)


class LazySampler(Sampler[int]):
    """Draws from three random generators, each index when it is asked for."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.samples):
            drawn = random.randrange(997) + int(np.random.randint(997)) + int(torch.randint(997, ()))
            yield drawn % self.samples

    def __len__(self) -> int:
        return self.samples


class UnsizedBatches:
    """Batches of one, two, three, … samples, in random order."""

    def __init__(self, samples: int) -> None:
        starts = [0]
        while starts[-1] < samples:
            starts.append(starts[-1] + len(starts))
        self.cuts = [list(range(start, min(start + size, samples))) for size, start in enumerate(starts[:-1], 1)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(random.sample(self.cuts, len(self.cuts)))


class RaggedBatches(UnsizedBatches):
    def __len__(self) -> int:
        return len(self.cuts)


class Stream(IterableDataset[Any]):
    """The numbers, perhaps shuffled, perhaps only those of this worker or of this rank."""

    def __init__(self, samples: int, kind: str, single: bool) -> None:
        self.samples, self.kind, self.single = samples, kind, single

    def __iter__(self) -> Iterator[Any]:
        numbers = list(range(self.samples))
        worker = get_worker_info()
        if self.kind == SPLIT and dist.is_initialized():
            numbers = numbers[dist.get_rank() :: dist.get_world_size()]
        if self.kind in ("split by worker", SPLIT) and worker is not None:
            numbers = numbers[worker.id :: worker.num_workers]
        if self.kind == "shuffled stream":
            random.shuffle(numbers)
        for number in numbers:
            if self.kind == "shuffled stream":
                number = (number + int(torch.randint(5, ()))) % self.samples
            yield torch.tensor(float(number))


class Batches:
    """No DataLoader: just something to iterate, that draws random numbers on its way."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.samples, self.batch_size):
            yield torch.arange(start, min(start + self.batch_size, self.samples)) + torch.rand(())


class SumMetric(nn.Module):
    """A metric with torchmetrics' face: `update`, `compute` over all ranks, which keeps its result, and `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def forward(self, values: Tensor) -> Tensor:
        self.total += float(values.sum())
        self._computed = None
        self._forward_cache = values.sum()
        return self._forward_cache

    def update(self, values: Tensor) -> None:
        self.forward(values)

    def compute(self) -> Tensor:
        if self._computed is None:
            self._computed = distributed.all_reduce(torch.tensor(self.total, dtype=torch.float64), "sum")
        return self._computed

    def reset(self) -> None:
        self.total, self._computed, self._forward_cache = 0.0, None, None


def last_of(values: Tensor) -> Tensor:
    return values[-1]


class Scores(pl.LightningModule):
    """Logs a number in each way there is, and predicts a nest. It counts what each rank has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.metric = SumMetric()
        self.seen = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen += batch.numel()
        self.log("count", batch.numel(), reduce_fx="sum")
        self.log("mean", batch.mean() * self.scale)
        self.log("given weight", batch.double().square().mean(), batch_size=batch.numel())
        self.log("uneven weight", batch.max(), batch_size=batch_idx % 3)
        self.log("lowest", batch.min(), reduce_fx="min")
        self.log("highest", batch.max(), reduce_fx=torch.max)
        self.log("last batch", batch_idx, reduce_fx=last_of)
        self.log("both", batch.sum(), on_step=True, on_epoch=True, reduce_fx="sum", prog_bar=True)
        self.metric(batch)
        if dataloader_idx == 0:
            self.log("metric", self.metric, add_dataloader_idx=False)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.log("at the end", 0.25)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {
            "values": batch * self.scale,
            "place": (batch_idx, dataloader_idx),
            "nest": [str(batch_idx), None, {"rows": batch.numel()}],
        }


def everything(ranks: Ranks, trainer: pl.Trainer, loaders: list[Any]) -> list[dict[str, Any]]:
    """What validate, test and predict return on every rank, by rank."""
    joined = ranks.world_size > 1 and distributed.join(ranks, "gloo")
    module = Scores()
    results: dict[str, Any] = {}
    given = dict(enumerate(loaders)) if len(loaders) > 1 else loaders[0]
    for fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
        sow()
        source = DataSource(val=given, test=given)
        results[fn.value] = run_evaluation(ranks, trainer, fn, module, source, None, False)
        results[f"{fn.value} seen"], module.seen = module.seen, 0
    sow()
    results["predict"] = run_predict(ranks, trainer, module, DataSource(predict=given), None, True)
    gathered = distributed.gather_objects(results)
    if joined:
        distributed.leave()
    return gathered


def sow() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


class Crew:
    """Runs cases on warm helpers, for as many numbers of ranks as are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keepers: dict[int, pl.Trainer] = {}

    def run(self, case: Case, ranks: int) -> list[dict[str, Any]]:
        limits = {f"limit_{stage}_batches": case.limit for stage in ("val", "test", "predict")}
        trainer = quiet_trainer(self.folder, devices=ranks, use_distributed_sampler=not case.split, **limits)
        self.keepers.setdefault(ranks, trainer)
        loaders = [loader.make() for loader in case.loaders]
        run = trainer._on_every_rank(everything)
        return run(trainer, loaders)

    def close(self) -> None:
        for trainer in self.keepers.values():
            trainer.close()


def check(case: Case, crew: Crew) -> None:
    """Assert that every rank of a case returns what one process returns."""
    (expected,) = crew.run(case, 1)
    on_ranks = crew.run(case, case.ranks)
    for stage in ("validate", "test"):
        assert sum(result[f"{stage} seen"] for result in on_ranks) == expected[f"{stage} seen"], f"{stage}: counts"
    for rank, actual in enumerate(on_ranks):
        for stage in ("validate", "test"):
            assert len(actual[stage]) == len(expected[stage])
            for index, (mine, right) in enumerate(zip(actual[stage], expected[stage], strict=True)):
                if case.split:
                    mine, right = without(mine, BY_BATCH), without(right, BY_BATCH)
                where = f"rank {rank}, {stage}, loader {index}"
                assert mine.keys() == right.keys(), where
                for key, value in right.items():
                    assert_close(mine[key], value, exactly="count" in key, where=f"{where}, {key}")
        if case.split:
            assert_same_rows(actual["predict"], expected["predict"], len(case.loaders))
            assert describe(actual["predict"]) == describe(on_ranks[0]["predict"]), f"rank {rank}"
        else:
            assert describe(actual["predict"]) == describe(expected["predict"]), f"rank {rank}: predictions"


BY_BATCH = ("last batch", "uneven weight")
"""Numbers that depend on which batches there are, of which a dataset that splits itself makes others."""


def without(metrics: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith(names)}


def assert_close(actual: float, expected: float, exactly: bool, where: str) -> None:
    if math.isnan(expected):
        assert math.isnan(actual), where
    elif exactly:
        assert actual == expected, where
    else:
        assert math.isclose(actual, expected, rel_tol=1e-6, abs_tol=1e-6), f"{where}: {actual} instead of {expected}"


def describe(predictions: Any) -> Any:
    """Predictions with tensors as (dtype, shape, numbers), so that they can be compared."""
    if isinstance(predictions, Tensor):
        return str(predictions.dtype), tuple(predictions.shape), predictions.tolist()
    if isinstance(predictions, dict):
        return {key: describe(value) for key, value in predictions.items()}
    if isinstance(predictions, (list, tuple)):
        return type(predictions)(describe(value) for value in predictions)
    return predictions


def assert_same_rows(actual: Any, expected: Any, loaders: int) -> None:
    """Assert that the same samples were predicted, once each, in whatever batches."""
    for mine, right in zip(*((one,) if loaders == 1 else one for one in (actual, expected)), strict=True):
        rows, wanted = (
            Counter(number for output in outputs for number in output["values"].reshape(-1).tolist())
            for outputs in (mine, right)
        )
        assert rows == wanted


@st.composite
def loaders(draw: Callable[[Any], Any], kinds: tuple[str, ...]) -> Loader:
    kind = draw(st.sampled_from(kinds))
    sizes = st.integers(1, 7) if kind in ("iterable",) else st.one_of(st.integers(1, 7), st.just(None))
    batch_size = draw(sizes)
    return Loader(
        kind=kind,
        samples=draw(st.integers(0, 40)),
        batch_size=batch_size,
        drop_last=batch_size is not None and kind != SPLIT and draw(st.booleans()),
        workers=draw(st.sampled_from((0, 0, 0, 2))),
        persistent=draw(st.booleans()),
    )


@st.composite
def cases(draw: Callable[[Any], Any]) -> Case:
    kinds = (SPLIT,) if draw(st.integers(0, 7)) == 0 else MAP_STYLE + STREAMS
    drawn = tuple(draw(st.lists(loaders(kinds), min_size=1, max_size=2)))
    share = st.sampled_from((0.3, 0.5, 0.75, 1.0))
    # Loader workers are given batches ahead of time, so what is drawn up to a limit depends on their number.
    lazy = any(loader.workers and loader.kind in ("lazy sampler", "own generator") for loader in drawn)
    limit = None if lazy or kinds == (SPLIT,) else draw(st.one_of(st.none(), st.integers(0, 12), share))
    if isinstance(limit, float) and limit < 1:
        sized = all(loader.kind not in (*STREAMS, "unsized batches") for loader in drawn)
        assume(sized and all(int(limit * len(loader.make())) > 0 for loader in drawn if loader.samples))
    return Case(ranks=draw(st.integers(1, 4)), loaders=drawn, limit=limit)


def check_random_cases(count: int, start: int, crew: Crew) -> None:
    """Check `count` random cases, which `start` determines."""

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(cases())
    def one(case: Case) -> None:
        check(case, crew)

    one()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    sys.stdout.write(f"seed {arguments.seed}\n")
    warnings.simplefilter("ignore")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Crew(Path(folder))) as crew:
        check_random_cases(arguments.cases, arguments.seed, crew)
    sys.stdout.write(f"{arguments.cases} cases in {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
