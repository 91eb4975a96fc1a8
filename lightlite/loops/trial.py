"""Running a few batches to see what happens, and putting everything back: for learning rates and batch sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightlite.callbacks.callback import Callback
from lightlite.distributed import Ranks
from lightlite.hooks import HookTable
from lightlite.loops.evaluate import EvaluationLoop, PredictionLoop
from lightlite.loops.fit import run_fit
from lightlite.loops.preemption import Preemption
from lightlite.loops.session import session
from lightlite.module import LightningModule
from lightlite.nest import apply_to_tensors
from lightlite.profilers import PassThroughProfiler
from lightlite.progress import STAGES, TrainerFn
from lightlite.results import Recorder
from lightlite.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from lightlite.loops.session import DataSource
    from lightlite.trainer import Trainer

T = TypeVar("T")


def run_search(
    ranks: Ranks,
    trainer: Trainer,
    fn: TrainerFn,
    module: LightningModule,
    source: DataSource,
    search: Callable[[Trainer, LightningModule], T],
) -> T:
    """Set up on one rank what `fn` needs, call `search` instead of it, and return what that returns."""
    with session(trainer, ranks, fn, module, source, None, for_trial=True):
        return search(trainer, module)


@contextmanager
def rehearsal(trainer: Trainer, callbacks: Sequence[Callback] = (), **settings: Any) -> Iterator[Callable[[], None]]:
    """Within it, what was called (fit, validate, test or predict) may be tried as often as wanted.

    However it is left, the trainer, the module, its optimizers and schedulers, and all random generators are as they
    were before. What is kept for that lies in the memory of the CPU.

    Args:
        trainer: The trainer, whose session is set up.
        callbacks: The callbacks of the trials. There are no loggers.
        settings: Attributes of the trainer within it.

    Yields:
        A function that runs the loop once, from the trainer's present place; the module learns from trial to trial.
        Where the present loop has begun already, its loaders are asked for anew in the end.
    """
    keeper = _Keeper(trainer)
    attempt = _Attempt(trainer, callbacks)
    trainer.__dict__.update(
        loggers=[],
        profiler=PassThroughProfiler(),
        num_sanity_val_steps=0,
        preemption=Preemption(trainer),
        resumed_random_states=None,
        resumed_window={},
        resumed_results={},
        **settings,
    )
    try:
        with isolate_rng():
            yield attempt
    finally:
        keeper.put_back()
    _reload(trainer)


def _reload(trainer: Trainer) -> None:
    """Have the loaders of a loop that has begun made anew: the trial may have used their workers."""
    if trainer.state.fn is not TrainerFn.FITTING:
        if trainer.evaluation_loop is not None:
            trainer.evaluation_loop.reload()
    elif trainer.recorder.active is not None:
        trainer.fit_loop.reload()


class _Attempt:
    """Runs the present call's loop once, and closes what it opened."""

    def __init__(self, trainer: Trainer, callbacks: Sequence[Callback]) -> None:
        self._trainer = trainer
        self._progress, self._state = trainer.progress, trainer.state
        self._callbacks = list(callbacks)

    def __call__(self) -> None:
        trainer, module = self._trainer, self._trainer.lightning_module
        progress = copy.copy(self._progress)
        progress.abandon_epoch()
        recorder = Recorder()
        recorder.module = module
        module.attach(trainer, recorder)
        module.zero_grad()
        trainer.__dict__.update(
            callbacks=self._callbacks,
            progress=progress,
            recorder=recorder,
            state=copy.copy(self._state),
            should_stop=False,
            open_loaders=[],
            _loader=None,
        )
        trainer.hooks = HookTable(trainer, module, self._callbacks, Callback, LightningModule)
        for callback in self._callbacks:
            callback._logs_to = module
        try:
            self._run(trainer, module)
        finally:
            for loader in trainer.open_loaders:
                loader.load_state_dict(loader.initial_state)
                loader.close()

    def _run(self, trainer: Trainer, module: LightningModule) -> None:
        fn = trainer.state.fn
        assert fn is not None
        if fn is TrainerFn.FITTING:
            ranks, source = trainer.strategy.ranks, trainer._source
            run_fit(ranks, trainer, module, source, None, within=lambda *call: nullcontext())
        elif fn is TrainerFn.PREDICTING:
            PredictionLoop(trainer, module, keep=False).run()
        else:
            EvaluationLoop(trainer, module, STAGES[fn]).run()


class _Keeper:
    """What a trial changes, as it was before."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._attributes = trainer, dict(trainer.__dict__)
        self._parts = [
            (part, dict(part._parameters), dict(part._buffers), part.training)
            for part in trainer.lightning_module.modules()
        ]
        self._tensors = {
            id(tensor): (tensor, _on_cpu(tensor)) for tensor in _tensors_of(trainer.lightning_module)
        }.values()
        self._wrapped = [(wrapped, dict(wrapped.__dict__)) for wrapped in trainer.wrapped_optimizers]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        owners = [*trainer.optimizers, *schedulers, trainer.precision_plugin]
        self._states = [(owner, copy.deepcopy(apply_to_tensors(owner.state_dict(), _on_cpu))) for owner in owners]

    def put_back(self) -> None:
        trainer = self._trainer
        trainer.__dict__.clear()
        trainer.__dict__.update(self._attributes)
        module = trainer.lightning_module
        for part, parameters, buffers, training in self._parts:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
            part.training = training
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)
        module.zero_grad()
        for wrapped, attributes in self._wrapped:
            wrapped.__dict__.update(attributes)
        for owner, state in self._states:
            owner.load_state_dict(state)
        module.attach(trainer, trainer.recorder)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
