"""Validation, test and prediction: batches dealt out in turn, scored by the bare module, counted once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightlite import distributed
from lightlite.callbacks.prediction_writer import BasePredictionWriter
from lightlite.data import RankLoader, RankLoaders, limit_of, rank_loader
from lightlite.distributed import Ranks
from lightlite.entries import numbers
from lightlite.errors import MisconfigurationException
from lightlite.hooks import is_overridden
from lightlite.loops.batches import BatchPath
from lightlite.loops.calls import positional, takes_batch_idx
from lightlite.loops.session import session
from lightlite.module import LightningModule
from lightlite.nest import move_to
from lightlite.progress import STAGES, RunningStage, TrainerFn
from lightlite.registry import CollectorRegistry
from lightlite.results import Results

if TYPE_CHECKING:
    from lightlite.loops.session import DataSource
    from lightlite.trainer import Trainer


def run_evaluation(
    ranks: Ranks,
    trainer: Trainer,
    fn: TrainerFn,
    module: LightningModule,
    source: DataSource,
    ckpt_path: str | None,
    verbose: bool,
) -> list[dict[str, float]]:
    """Validate or test on one rank. See `Trainer.validate`."""
    with session(trainer, ranks, fn, module, source, ckpt_path):
        return EvaluationLoop(trainer, module, STAGES[fn]).run(verbose)


def run_predict(
    ranks: Ranks, trainer: Trainer, module: LightningModule, source: DataSource, ckpt_path: str | None, keep: bool
) -> list[Any] | None:
    """Predict on one rank. See `Trainer.predict`."""
    with session(trainer, ranks, TrainerFn.PREDICTING, module, source, ckpt_path):
        return PredictionLoop(trainer, module, keep).run()


class _BatchLoop:
    """What evaluation and prediction have in common: loaders one after the other, each batch on one rank.

    Attributes:
        loaders: What this rank iterates.
        num_batches: Batches of each loader, over all ranks; None where unknown.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, stage: RunningStage) -> None:
        self.trainer, self.module, self.stage = trainer, module, stage
        self.word = stage.hook_prefix
        step, run = getattr(module, f"{self.word}_step"), trainer.strategy.evaluation_step(f"{self.word}_step")
        names, flexible = positional(step)
        self._step = trainer.profiler.wrap(f"[Strategy]{type(trainer.strategy).__name__}.{self.word}_step", run)
        self._takes_idx = takes_batch_idx(step)
        self._takes_loader = flexible or len(names) > 2
        self._path = BatchPath(trainer, module)
        self._context = trainer.precision_plugin.forward_context() or nullcontext
        self.load()

    def load(self) -> None:
        """Ask for the loaders."""
        trainer, stage = self.trainer, self.stage
        trainer.evaluation_loop = self
        deal, pin = trainer.use_distributed_sampler, trainer.strategy.accelerator.pin_memory
        name = f"limit_{stage.dataloader_prefix}_batches"
        limit = getattr(trainer, name)
        loaders = trainer.load(stage) if limit else []
        self.loaders = [rank_loader(loader, False, deal, pin) for loader in loaders]
        trainer.open_loaders += self.loaders
        self.num_batches = [limit_of(limit, loader.length, name) for loader in self.loaders]

    def _check_signature(self) -> None:
        if len(self.loaders) > 1 and not self._takes_loader:
            raise MisconfigurationException(
                f"there are {len(self.loaders)} {self.stage.dataloader_prefix} loaders, but {self.word}_step "
                "does not say which "
                f"one a batch is from; define {self.word}_step(self, batch, batch_idx, dataloader_idx=0)"
            )

    def _batches(self, loader: RankLoader | RankLoaders, limit: int | None) -> Iterator[tuple[int, Any]]:
        """This rank's batches of one loader, with their indices among all."""
        loader.set_epoch(self.trainer.progress.epoch)
        mine = self.trainer.profiler.profile_iterable(
            loader.start(limit=None if limit == loader.length else limit),
            f"[{type(self).__name__}].{self.stage.dataloader_prefix}_next",
        )
        return zip(itertools.count(loader.first, loader.stride), self._path.ahead(mine, loader), strict=False)

    def _has_nothing_to_do(self) -> bool:
        """Whether there is no batch at all, so that, as in Lightning, not even hooks are called."""
        self.trainer.note_batches(self.stage, self.num_batches)
        return not any(count is None or count for count in self.num_batches)

    def _hooks(self, when: str) -> None:
        self.trainer.hooks.call(f"on_{self.word}_{when}")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode and no gradients; afterwards every submodule is in the mode that it was in before."""
        module, trainer = self.module, self.trainer
        modes = [(part, part.training) for part in module.modules()]
        trainer.strategy.before_evaluation()
        # What a module computes once and keeps, such as a table of positions, has to serve in training afterwards; and
        # parameters that are put together of parts are written to again and again.
        plain = trainer.state.fn is TrainerFn.FITTING or trainer.strategy.spreads
        with torch.inference_mode() if trainer.inference_mode and not plain else torch.no_grad():
            getattr(module, f"on_{self.word}_model_eval")()
            try:
                yield
            finally:
                self._put_back(modes)
                trainer.strategy.after_evaluation()

    def _put_back(self, modes: list[tuple[nn.Module, bool]]) -> None:
        name = f"on_{self.word}_model_train"
        if is_overridden(name, self.module, LightningModule):
            getattr(self.module, name)()
            return
        for part, mode in modes:
            part.training = mode

    def _begin_pass(self) -> None:
        """Begin the first loader's pass: before the hooks, as in Lightning, which may draw random numbers as well."""
        self._first = self._batches(self.loaders[0], self.num_batches[0]) if self.loaders else iter(())

    def reload(self) -> None:
        """Ask for the loaders anew, from a hook before the first batch: for who has changed their batch size."""
        self.load()
        self._begin_pass()

    def _run_batches(self, results: Results, sink: Callable[[int, int, Any], None]) -> None:
        """Run the step on every batch of this rank; `sink` gets (batch index, loader index, output)."""
        several = len(self.loaders) > 1
        recorder, hooks, prepare, step = self.trainer.recorder, self.trainer.hooks, self._path.prepare, self._step
        start = hooks.together(f"on_{self.word}_batch_start")
        end = hooks.together(f"on_{self.word}_batch_end")
        hook_name = f"{self.word}_step"
        self._counts = [0] * len(self.loaders)
        for loader_idx, loader in enumerate(self.loaders):
            recorder.dataloader_idx = loader_idx if several else None
            more = (loader_idx,) if several else ()
            batches, self._first = self._first, iter(())
            if loader_idx:
                batches = self._batches(loader, self.num_batches[loader_idx])
            for batch_idx, batch in batches:
                if prepare is not None:
                    batch = prepare(batch, loader_idx)
                recorder.batch = batch
                results.batches[loader_idx] += 1
                if start is not None:
                    start(batch, batch_idx, *more)
                recorder.hook = hook_name
                with self._context():
                    output = step(batch, batch_idx, *more) if self._takes_idx else step(batch)
                recorder.hook = None
                if end is not None:
                    end(output, batch, batch_idx, *more)
                sink(batch_idx, loader_idx, output)
                self._counts[loader_idx] += 1
        recorder.dataloader_idx = None


class EvaluationLoop(_BatchLoop):
    """Validates or tests.

    Args:
        trainer: The trainer.
        module: The user's module.
        stage: VALIDATING, TESTING or SANITY_CHECKING.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, stage: RunningStage) -> None:
        super().__init__(trainer, module, stage)
        self._check_signature()
        self._steps: list[tuple[int, int, dict[str, Any]]] = []

    def run(self, verbose: bool = False, limit: int | None = None) -> list[dict[str, float]]:
        """Score every batch once.

        Args:
            verbose: Whether rank zero prints a table of the values.
            limit: At most so many batches of each loader: for the sanity check.

        Returns:
            For each loader, the values logged on_epoch, by key; the same on every rank. Empty without a batch.
        """
        if self._has_nothing_to_do():
            return []
        trainer, recorder = self.trainer, self.trainer.recorder
        recorder.publish_fresh()  # what training has logged last, for callbacks that watch it at validation's end
        former, former_stage = recorder.active, trainer.state.stage
        trainer.state.stage = self.stage
        whole = self.num_batches
        if limit is not None:
            self.num_batches = [limit if count is None else min(limit, count) for count in whole]
        results = recorder.active = Results(training=False)
        self._steps = []
        try:
            self._begin_pass()
            with self._evaluating():
                self._hooks("start")
                self._hooks("epoch_start")
                with trainer.strategy.evaluating():
                    self._run_batches(results, self._note_step)
                per_loader = self._conclude(results)
        finally:
            results.reset()
            recorder.active, trainer.state.stage, self.num_batches = former, former_stage, whole
        if verbose and trainer.is_global_zero:
            from lightlite.loops.table import print_metrics

            print_metrics(per_loader, self.stage.value)
        return per_loader

    def _conclude(self, results: Results) -> list[dict[str, float]]:
        trainer, recorder = self.trainer, self.trainer.recorder
        logged = recorder.reduce_epoch()
        self._hooks("epoch_end")
        logged |= recorder.reduce_epoch()
        per_loader = recorder.per_loader(len(self.loaders))
        if self.stage is not RunningStage.SANITY_CHECKING:
            self._log_steps()
            trainer.log_metrics(logged)
            if trainer.state.fn is TrainerFn.FITTING:
                # Before the hooks: what is saved in one of them was validated, and is not to be again when resumed.
                trainer.progress.validated = True
        self._hooks("end")
        return per_loader

    def _note_step(self, batch_idx: int, loader_idx: int, output: Any) -> None:
        values = self.trainer.recorder.take_steps()
        if values:
            self._steps.append((loader_idx, batch_idx, values))

    def _log_steps(self) -> None:
        """Hand the loggers what was logged on_step, in the order of a single process."""
        plain = [
            (loader_idx, batch_idx, dict(zip(values, numbers(list(values.values())), strict=True)))
            for loader_idx, batch_idx, values in self._steps
        ]
        gathered = distributed.gather_objects((plain, self._counts))
        everything = [step for steps, _ in gathered for step in steps]
        trainer = self.trainer
        seen = trainer.progress.batches_validated if trainer.state.fn is TrainerFn.FITTING else {}
        for loader_idx, batch_idx, values in sorted(everything, key=lambda step: step[:2]):
            trainer.log_metrics(values, step=seen.get(loader_idx, 0) + batch_idx)
        for loader_idx in range(len(self.loaders)):
            seen[loader_idx] = seen.get(loader_idx, 0) + sum(counts[loader_idx] for _, counts in gathered)


class PredictionLoop(_BatchLoop):
    """Predicts.

    Args:
        trainer: The trainer.
        module: The user's module.
        keep: Whether to return what was predicted.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, keep: bool) -> None:
        super().__init__(trainer, module, RunningStage.PREDICTING)
        self._check_signature()
        self._keep = keep
        self._keeps_own = any(writer.interval != "batch" for writer in self._writers)
        # Kept outputs must not fill the device, and are the same on any number of ranks.
        self._fetches = trainer.strategy.accelerator.batch_mover(trainer.strategy.root_device) is not None
        self.current_batch_indices: list[int] | None = None
        self._indices: list[list[Any]] = [[] for _ in self.loaders]
        self._outputs: list[list[Any]] = [[] for _ in self.loaders]

    def load(self) -> None:
        """Ask for the loaders."""
        super().load()
        callbacks = self.trainer.callbacks
        self._writers = [callback for callback in callbacks if isinstance(callback, BasePredictionWriter)]
        self._drawn = [loader.track() if self._writers else None for loader in self.loaders]

    @property
    def predictions(self) -> list[Any]:
        """What this rank predicted, by batch; by loader and batch where there are several loaders."""
        return self._outputs[0] if len(self.loaders) == 1 else self._outputs

    @property
    def epoch_batch_indices(self) -> list[Any]:
        """Which samples of the dataset each of this rank's batches holds, by loader and batch, as in Lightning."""
        return self._indices

    def _batches(self, loader: RankLoader | RankLoaders, limit: int | None) -> Iterator[tuple[int, Any]]:
        batches = super()._batches(loader, limit)
        drawn = self._drawn[self.loaders.index(loader)]
        self.current_batch_indices = None
        return batches if drawn is None else self._with_indices(batches, drawn)

    def _with_indices(self, batches: Iterator[tuple[int, Any]], drawn: deque[Any]) -> Iterator[tuple[int, Any]]:
        for batch_idx, batch in batches:
            indices = drawn.popleft()
            indices = indices.tolist() if hasattr(indices, "tolist") else indices
            self.current_batch_indices = list(indices) if isinstance(indices, (list, tuple)) else [indices]
            yield batch_idx, batch

    def run(self) -> list[Any] | None:
        """Predict every batch once.

        Returns:
            What `predict_step` returned for each batch, in the loader's order; a list of such lists where there are
            several loaders; the same on every rank. None with `return_predictions=False`, or without a batch.
        """
        if self._has_nothing_to_do():
            return None
        trainer = self.trainer
        trainer.state.stage = self.stage
        trainer.predict_loop = self
        results = Results(training=False)
        with ExitStack() as stack:
            collectors = [
                stack.enter_context(_collector(trainer.strategy.ranks)) for _ in (self.loaders if self._keep else ())
            ]
            self._begin_pass()
            with self._evaluating():
                self._hooks("start")
                self._hooks("epoch_start")
                with trainer.strategy.evaluating():
                    self._run_batches(results, lambda _, loader_idx, output: self._take(collectors, loader_idx, output))
                self._hooks("epoch_end")
                self._hooks("end")
            predictions = [collector.collect() for collector in collectors]
        if not self._keep:
            return None
        return predictions[0] if len(predictions) == 1 else predictions

    def _take(self, collectors: list[Any], loader_idx: int, output: Any) -> None:
        if self._fetches and (collectors or self._keeps_own):
            output = move_to(output, torch.device("cpu"))
        if collectors:
            collectors[loader_idx].put(output)
        if self._keeps_own:
            self._outputs[loader_idx].append(output)
            self._indices[loader_idx].append(self.current_batch_indices)


@contextmanager
def _collector(ranks: Ranks) -> Iterator[Any]:
    collector = CollectorRegistry.create("files", ranks=ranks)
    try:
        yield collector
    finally:
        collector.close()
