"""Logs how fast the loops are."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lightlite.callbacks.callback import Callback, StepOutput
from lightlite.progress import RunningStage, TrainerFn
from lightlite.utilities.rank_zero import rank_zero_warn
from lightlite.utilities.throughput import Throughput

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class ThroughputMonitor(Callback):
    """Logs what `Throughput` computes, from rank zero's batches, at the trainer's log points.

    The names begin with the loop's: "train/device/batches_per_sec", "validate/samples" and so on. For "flops_per_sec"
    and "mfu" the module has an attribute or property `flops_per_batch`; `measure_flops` counts them. The time of
    validations within a fit does not count for training. At log points the host waits for the device, so that what
    was queued is counted with the time that it takes; between them it does not.

    Args:
        batch_size_fn: The number of samples in a batch.
        length_fn: The number of items (such as tokens) in a batch; without it no items are counted.
        kwargs: `window_size` and `separator` of `Throughput`.

    Attributes:
        available_flops: Operations a second that the device could do; None where unknown.
    """

    def __init__(
        self, batch_size_fn: Callable[[Any], int], length_fn: Callable[[Any], int] | None = None, **kwargs: Any
    ) -> None:
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.kwargs = kwargs
        self.available_flops: float | None = None
        Throughput(**kwargs)
        self._loops: dict[RunningStage, _Loop] = {}
        self._seen: defaultdict[RunningStage, int] = defaultdict(int)
        self._has_flops = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out what the device could do."""
        self._loops = {}
        if not trainer.is_global_zero:
            return
        dtype = getattr(trainer.precision_plugin, "dtype", torch.float32)
        self.available_flops = trainer.accelerator.peak_flops(trainer.strategy.root_device, dtype)
        self._has_flops = hasattr(pl_module, "flops_per_batch")
        if not self._has_flops:
            rank_zero_warn(
                f"ThroughputMonitor logs no operations a second: {type(pl_module).__name__} has no flops_per_batch; "
                "set it in __init__, for example to lightlite.utilities.throughput.measure_flops(…)"
            )

    def _start(self, trainer: Trainer) -> None:
        stage = trainer.state.stage
        if stage is not None and stage is not RunningStage.SANITY_CHECKING and trainer.is_global_zero:
            self._loops[stage] = _Loop(
                Throughput(available_flops=self.available_flops, world_size=trainer.world_size, **self.kwargs)
            )

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Count a batch, and log if it is time."""
        stage = trainer.state.stage
        loop = None if stage is None else self._loops.get(stage)
        if loop is None or stage is None:
            return
        training = stage is RunningStage.TRAINING
        self._seen[stage] += 1
        every = trainer.log_every_n_steps
        step = trainer.progress.batches_that_stepped + 1 if training else loop.batches + 1
        # Only whole steps of the optimizer are logged, so that their time is in it.
        whole = not training or not trainer.fit_loop.step.micro_batch
        due = every and whole and (step % every == 0 or trainer.should_stop)
        if due:
            trainer.accelerator.synchronize(trainer.strategy.root_device)
        absent = training and batch is None  # this rank has no part in a stream's last global batch
        with torch.no_grad():
            samples = 0 if absent else self.batch_size_fn(batch)
            length = None if self.length_fn is None else 0 if absent else self.length_fn(batch)
        loop.add(samples, length, pl_module.flops_per_batch if self._has_flops else None)
        if due:
            metrics = loop.throughput.compute()
            named = {f"{stage.value}{loop.throughput.separator}{name}": value for name, value in metrics.items()}
            trainer.log_metrics(named, step=None if training else self._seen[stage])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        self._count(trainer, pl_module, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._count(trainer, pl_module, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out of the training's time."""
        training, validation = self._loops.get(RunningStage.TRAINING), self._loops.get(RunningStage.VALIDATING)
        if trainer.state.fn is TrainerFn.FITTING and training is not None and validation is not None:
            training.began += time.perf_counter() - validation.began

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._count(trainer, pl_module, batch)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._count(trainer, pl_module, batch)


class _Loop:
    """The totals of one loop."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.began = time.perf_counter()
        self.batches = self.samples = 0
        self.lengths: int | None = None

    def add(self, samples: int, length: int | None, flops: Any) -> None:
        self.batches += 1
        self.samples += samples
        if length is not None:
            self.lengths = (self.lengths or 0) + length
        seconds = time.perf_counter() - self.began
        self.throughput.update(
            time=seconds, batches=self.batches, samples=self.samples, lengths=self.lengths, flops=flops
        )
