"""Fit: for each epoch, for each batch.

fit start
  sanity check                      a few validation batches, before anything is trained
  train start
    epoch start
      batch start                   return -1 to skip the rest of the epoch
        optimizer_step              loops/step.py: training_step, zero_grad, backward, clip
      schedulers by step, and by epoch after its last batch
      batch end                     checkpoints by step
      log values, validate if due
    epoch end                       checkpoints by epoch
  if a callback asked for it: one more epoch that trains nothing, as for batch-norm statistics
  train end
fit end
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from lightlite import distributed
from lightlite.callbacks.model_checkpoint import ModelCheckpoint
from lightlite.checkpoint import random_now
from lightlite.data import RankLoader, RankLoaders, limit_of
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.hooks import is_overridden
from lightlite.loops.batches import NO_BATCH, BatchPath, one_ahead
from lightlite.loops.evaluate import EvaluationLoop
from lightlite.loops.session import session
from lightlite.loops.step import ManualStep, TrainStep
from lightlite.loops.uneven import Uneven, uneven
from lightlite.module import LightningModule
from lightlite.progress import RunningStage, TrainerFn
from lightlite.results import Results, idle_metrics
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightlite.utilities.seed import capture_rng, isolate_rng, restore_rng

if TYPE_CHECKING:
    from lightlite.loops.session import DataSource
    from lightlite.trainer import Trainer


def run_fit(
    ranks: Ranks,
    trainer: Trainer,
    module: LightningModule,
    source: DataSource,
    ckpt_path: str | None,
    within: Callable[..., AbstractContextManager[None]] = session,
) -> None:
    """Fit on one rank. See `Trainer.fit`.

    Args:
        ranks: This process's place.
        trainer: The trainer.
        module: The user's module.
        source: Where loaders come from.
        ckpt_path: A checkpoint to restore from, or None.
        within: What surrounds the loop; something else where a session stands already.
    """
    with within(trainer, ranks, TrainerFn.FITTING, module, source, ckpt_path):
        fit = trainer.fit_loop = FitLoop(trainer, module)
        fit.check_sanity()
        if not fit.begin():
            return
        recorder, progress, preemption = trainer.recorder, trainer.progress, trainer.preemption
        prepare, schedulers = fit.prepare, fit.schedulers
        while not fit.done():
            step, batch_start, batch_end = fit.begin_epoch()
            for batch, batch_idx in fit.batches():
                progress.last_batch = last = batch_idx + 1 == fit.length
                if prepare is not None:
                    batch = prepare(batch, 0)
                recorder.batch = batch
                if batch_start is not None and batch_start(batch, batch_idx) == -1 and fit.stops_epoch(batch_idx):
                    break
                output = step(batch, batch_idx, last)
                progress.batches_in_epoch = batch_idx + 1
                progress.batches_total += 1
                progress.pending = True
                if schedulers:
                    fit.step_schedulers(last)
                if batch_end is not None:
                    batch_end(output, batch, batch_idx)
                if batch_idx < fit.quiet_until and not trainer.should_stop:
                    progress.batches_that_stepped += 1
                    progress.pending = False
                elif fit.finish_batch(batch_idx):
                    break
                if preemption.asked:
                    preemption.leave_if_agreed()
            fit.end_epoch()
        fit.end()


class FitLoop:
    """The state of a fit, and all of it that is not done for every batch.

    Attributes:
        results: What was logged in this epoch.
        logged: What goes to the loggers when the epoch is left.
        length: Batches in an epoch on this rank; infinite where unknown, until the last batch is reached.
        step: The training step.
        quiet_until: Before the batch of that index nothing is due after a batch: no log point, no validation, no end.
        path: The way of a batch to the device.
        schedulers: Learning-rate schedulers, if the loop is to step them.
        outside: In the sanity check and in validation, what was there before of what these change, so that a fit that
            goes on from within begins them anew; empty otherwise.
        random_ahead: The generators' states before a batch was fetched ahead, if it is fetched in this process.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.progress, self.recorder = trainer.progress, trainer.recorder
        self.results = Results(training=True)
        self.logged: dict[str, float] = {}
        self.outside: dict[str, Any] = {}
        self.random_ahead: dict[str, Any] | None = None
        make_step = TrainStep if module.automatic_optimization else ManualStep
        assert trainer.training_step is not None
        self.step: TrainStep | ManualStep = make_step(trainer, module, trainer.training_step)
        self.path = BatchPath(trainer, module)
        self.prepare = self.path.prepare
        self._uneven: Uneven | None = None
        self.schedulers = trainer.lr_scheduler_configs if module.automatic_optimization else []
        self._max_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        self._alone = distributed.world_size() == 1
        self._agreed_to_stop = self._agreed_to_leave = False
        self._expects_first_step = True
        self._log_every = trainer.log_every_n_steps or math.inf
        self.length: float = math.inf
        self._known_length: float = math.inf
        self._own_length: float = math.inf
        self._loader: RankLoader | RankLoaders | None = None
        self._loaded_in_epoch = 0
        self._begun: Iterator[Any] | None = None
        self._validation: EvaluationLoop | None = None
        self._validation_states: list[Any] = []
        self._validation_loaded_in_epoch = 0
        self._validates = bool(trainer.limit_val_batches) and trainer.has_validation(module)
        self._val_every: float = math.inf
        self.quiet_until: float = 0
        self._may_be_quiet = False
        self._last_validation = time.monotonic()

    @property
    def max_epochs(self) -> int | None:
        """The trainer's; may be set between two calls of fit, to train on."""
        return self.trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, epochs: int) -> None:
        self.trainer.max_epochs = epochs

    def check_sanity(self) -> None:
        """Run a few validation batches, leaving no trace but the errors they reveal."""
        trainer = self.trainer
        steps = trainer.num_sanity_val_steps
        if not self._validates or steps == 0 or trainer.ckpt_path is not None:
            return
        self.outside = self._before_validation()
        with isolate_rng():
            trainer.state.stage = RunningStage.SANITY_CHECKING
            trainer.hooks.call("on_sanity_check_start")
            loop = self._validation_loop(RunningStage.SANITY_CHECKING)
            self.outside["validation"] = self.validation_states()
            loop.run(limit=None if steps == math.inf else int(steps))
            for loader in loop.loaders:
                loader.load_state_dict(loader.initial_state)
            trainer.hooks.call("on_sanity_check_end")
            self.recorder.forget()
        self.outside = {}

    def begin(self) -> bool:
        """Load the data and open the fit; False where there is nothing to train."""
        trainer = self.trainer
        trainer.state.stage = RunningStage.TRAINING
        self.recorder.active = self.results
        torch.set_grad_enabled(True)
        if trainer.resumed_results:
            self.results.load_state_dict(trainer.resumed_results["values"], self.module)
            self.logged = dict(trainer.resumed_results["logged"])
            trainer.resumed_results = {}
        if self.progress.epoch_done:
            if trainer.resumed_random_states is not None:
                restore_rng(trainer.resumed_random_states["now"])
            self._catch_up()
            self._leave_epoch()  # what a checkpoint taken in on_train_epoch_end left to do
        if trainer.limit_train_batches == 0:
            rank_zero_info("Trainer.fit stopped: limit_train_batches=0 leaves no batches")
            return False
        self._load()
        assert self._loader is not None
        if self.length == 0:
            rank_zero_warn("Trainer.fit stopped: the training loader has no batches")
            return False
        resumed = trainer.resumed_random_states
        self._agree_to_stop()
        if self.done():
            if resumed is not None:
                self._put_back_random(resumed)
            return False
        self._validation_states = (resumed or {}).get("validation", [])
        if self._validates and self._validation is None and self._epoch_validates():
            self._validation_loop(RunningStage.VALIDATING)
        trainer.strategy.checkpoint_io.on_failure = self._look_soon
        if resumed is None or resumed.get("begun"):
            # Before the hooks, as in Lightning: random numbers that they draw come after those of the data's order.
            self._loader.set_epoch(self.progress.epoch)
            self._begun = self._start(self._loader, self.progress.batches_in_epoch if self.progress.epoch_open else 0)
        trainer.hooks.call("on_train_start")
        if resumed is not None:
            self._put_back_random(resumed)
        return True

    def _put_back_random(self, states: dict[str, Any]) -> None:
        assert self._loader is not None
        restore_rng(states["now"])
        self._loader.load_state_dict(states["loader_now"])

    def _load(self) -> None:
        trainer = self.trainer
        loader = self._loader = trainer.load_training()
        self._loaded_in_epoch = self.progress.epoch
        own = limit_of(trainer.limit_train_batches, loader.length, "limit_train_batches")
        counts = distributed.gather_objects(own)
        self._uneven = uneven(trainer, loader, counts, self.module.automatic_optimization)
        self.prepare = self.path.prepare if self._uneven is None else self._uneven.preparer(self.path.prepare)
        self._known_length = self._batches_in_epoch(counts)
        self._own_length = min(self._known_length, math.inf if own is None else own)
        self.length = trainer.num_training_batches = self._known_length
        self._set_validation_interval()
        if trainer.loggers and self.length < trainer.log_every_n_steps and not trainer.fast_dev_run:
            rank_zero_warn(
                f"an epoch has {self.length} batches, fewer than log_every_n_steps={trainer.log_every_n_steps}: "
                "steps are logged across epochs; set a lower log_every_n_steps to see each epoch's"
            )

    def _batches_in_epoch(self, counts: list[int | None]) -> float:
        """The number of batches that the epoch has where ranks have these; infinite where that is not known yet."""
        known = [math.inf if count is None else count for count in counts]
        if self._uneven is not None:
            return max(known)
        if len(set(known)) > 1:
            rank_zero_warn(f"ranks have {counts} training batches; each trains on {min(known)}, the least of them")
        return min(known)

    def _set_validation_interval(self) -> None:
        trainer, given = self.trainer, self.trainer.val_check_interval
        if trainer.val_check_time is not None:
            self._val_every = math.inf
        elif isinstance(given, int) and not isinstance(given, bool):
            self._val_every = given
            if given > self.length and trainer.check_val_every_n_epoch is not None and self._validates:
                raise MisconfigurationException(
                    f"val_check_interval={given} is more than the {self.length} batches of an epoch; give at "
                    "most that, or set check_val_every_n_epoch=None to count batches across epochs"
                )
        elif self._loader is not None and self._loader.length is None:
            if given != 1.0:
                raise MisconfigurationException(
                    f"val_check_interval={given} is a share of an epoch, but the training loader has no length; "
                    "give an int, a duration or 1.0"
                )
            self._val_every = math.inf
        else:
            self._val_every = max(1, int(self.length * given))
        trainer.val_check_batch = None if trainer.val_check_time is not None else self._val_every

    def done(self) -> bool:
        """Whether nothing is left to do.

        However training ended, one more epoch follows it where a callback has set `trainer.closing_epoch`: it runs
        `training_step` and all hooks but trains nothing, for statistics that a forward pass gathers.
        """
        if self.progress.epoch_open:
            return False
        reason = self._why_trained_enough()
        if reason is None or (self.trainer.closing_epoch and not self.progress.closing):
            return False
        if reason:
            rank_zero_info(f"Trainer.fit stopped: {reason}")
        return True

    def _why_trained_enough(self) -> str | None:
        """The limit that was reached; empty where somebody asked to stop; None where there is more to train."""
        trainer, progress = self.trainer, self.progress
        if progress.optimizer_steps >= self._max_steps:
            return f"max_steps={trainer.max_steps} reached"
        if trainer.max_epochs not in (None, -1) and progress.epoch >= trainer.max_epochs:
            return f"max_epochs={trainer.max_epochs} reached"
        return "" if self._stops() else None

    def stop(self) -> None:
        """End after this batch. Every rank has to call it, and in the same batch."""
        self.trainer.should_stop = self._agreed_to_stop = True

    def reload(self) -> None:
        """Ask for the loaders anew, before the epoch's first batch: for who has changed their batch size."""
        self._load()
        assert self._loader is not None
        self._loader.set_epoch(self.progress.epoch)
        self._begun = self._validation = None

    def _agree_to_stop(self) -> None:
        """Make one rank's `trainer.should_stop` every rank's: at log points, after validations and epochs.

        And whether one was told to end by a signal.
        """
        asked = self.trainer.preemption.asked
        if self._alone:
            self._agreed_to_leave = asked
            return
        answers = distributed.gather_objects((self.trainer.should_stop, asked))
        self._agreed_to_stop = self.trainer.should_stop = any(stop for stop, _ in answers)
        self._agreed_to_leave = any(leave for _, leave in answers)

    @property
    def _asked_to_stop(self) -> bool:
        """Whether somebody asked to stop, and all ranks know it."""
        return self.trainer.should_stop if self._alone else self._agreed_to_stop

    def _stops(self) -> bool:
        """Whether somebody asked to stop, all ranks know it, and enough has been trained."""
        return self._asked_to_stop and self._may_stop()

    def _may_stop(self) -> bool:
        trainer, progress = self.trainer, self.progress
        epochs_done = progress.epoch + (1 if progress.last_batch and progress.epoch_open else 0)
        enough_epochs = not trainer.min_epochs or epochs_done >= trainer.min_epochs
        return enough_epochs and (not trainer.min_steps or progress.optimizer_steps >= trainer.min_steps)

    def begin_epoch(self) -> tuple[Callable[..., Any], Callable[..., Any] | None, Callable[..., Any] | None]:
        """Open the epoch, or go on with the one that a checkpoint was taken in.

        Returns:
            What to do with each batch, and the hooks before and after it.
        """
        trainer, progress = self.trainer, self.progress
        every = trainer.reload_dataloaders_every_n_epochs
        if self._loader is None or (every and progress.epoch - self._loaded_in_epoch >= every):
            self._load()
        assert self._loader is not None
        if self._begun is None:
            self._loader.set_epoch(progress.epoch)
        if not progress.epoch_open:
            progress.begin_epoch(closing=self._why_trained_enough() is not None)
            trainer.hooks.call("on_train_epoch_start")
        trainer.profiler.start("run_training_epoch")
        trainer.strategy.before_training_epoch()
        self.step.begin_epoch()
        self.step.load_state_dict(trainer.resumed_window)
        trainer.resumed_window = {}
        self.quiet_until = 0
        self._may_be_quiet = (
            self.module.automatic_optimization
            and trainer.accumulate_grad_batches == 1
            and not progress.closing
            and not any(config.reduce_on_plateau for config in self.schedulers)
            and not (self._validates and (trainer.val_check_time is not None or self._val_every == math.inf))
        )
        run: Callable[..., Any] = self.step.observe if progress.closing else self.step
        if self._uneven is not None and isinstance(self.step, TrainStep):
            run = self._uneven.step(self.step, trains=not progress.closing)
        step = trainer.profiler.wrap("run_training_batch", run)
        return step, trainer.hooks.together("on_train_batch_start"), trainer.hooks.together("on_train_batch_end")

    def batches(self) -> Iterator[tuple[Any, int]]:
        """This rank's batches of the epoch with their indices, from where a checkpoint left off.

        A loader is used up, as a `for` loop would, unless its batches are limited: what it draws from its generator
        after the last batch decides on the order of the next epoch.
        """
        progress, loader = self.progress, self._loader
        assert loader is not None
        begun, self._begun = self._begun, None
        if progress.epoch_done:
            return iter(())
        skip = progress.batches_in_epoch
        if skip and self.trainer.resumed_random_states is not None:
            self._tell_of_another(self.trainer.resumed_random_states.get("pass"))
        over = bool(skip) and skip >= self.length
        batches = iter(()) if over else self._start(loader, skip) if begun is None else begun
        # Only now: beginning a pass again puts the random state back to that of the checkpoint.
        if (progress.pending and self._finish_pending()) or over:
            return iter(())
        self._enter_batches()
        if loader.length is None:
            numbered = self._looking_ahead(batches, skip)
        else:
            numbered = zip(batches, range(skip, int(self.length)), strict=False)
        return numbered if self._uneven is None else self._noting_absence(self._uneven.unpack(numbered))

    def _noting_absence(self, batches: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        for numbered in batches:
            assert self._uneven is not None
            self.recorder.lacks_batch = self._uneven.absent
            yield numbered

    def _enter_batches(self) -> None:
        """From now on what is logged, and not from within another hook, comes from training_step."""
        self.recorder.hook = "training_step"

    def _start(self, loader: RankLoader | RankLoaders, skip: int) -> Iterator[Any]:
        """Begin the pass from the random state in which this epoch's order was, or is now, drawn."""
        trainer = self.trainer
        resumed = trainer.resumed_random_states
        if resumed is not None and not skip and not resumed.get("begun"):
            resumed = None  # it was before this pass
        if resumed is not None:
            restore_rng(resumed["epoch"])
            loader.load_state_dict(resumed.get("loader"))
        else:
            trainer.epoch_random_state = {"epoch": capture_rng(), "loader": loader.state_dict()}
        limited = loader.length is not None and self._own_length != loader.length
        at = None if resumed is None else resumed.get("loader_now")
        batches = trainer.profiler.profile_iterable(
            loader.start(skip, int(self._own_length) if limited else None, at), "[FitLoop].train_dataloader_next"
        )
        if self._uneven is None:
            batches = self.path.moving(batches)
        else:
            batches = self._uneven.pairs(batches, skip, self.path.begin)
        ahead = loader.length is not None and self.path.fetches_ahead(loader)
        if resumed is not None:
            if ahead and skip:  # as it had been when the state was kept that is now put back
                batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
            trainer.epoch_random_state = {key: resumed[key] for key in ("epoch", "loader")}
            restore_rng(resumed["now"])
            if not resumed.get("moved"):
                loader.load_state_dict(resumed["loader_now"])
        trainer.resumed_random_states = None
        if loader.length is None:
            restore_rng((resumed or {}).get("ahead") or {})
            first = self._next_ahead(batches)
            restore_rng((resumed or {}).get("now", {}))
            return iter(()) if first is NO_BATCH else itertools.chain((first,), batches)
        return one_ahead(batches) if ahead else batches

    def described_pass(self) -> str:
        """Of what the place in an epoch is one."""
        count = "an unknown number of" if math.isinf(self._known_length) else self._known_length
        return "" if self._loader is None else f"{count} batches from {self._loader.described()}"

    def _tell_of_another(self, former: str | None) -> None:
        """Warn where the place that is gone on from is not one in this epoch."""
        if former and former != self.described_pass():
            rank_zero_warn(
                f"{self.trainer.ckpt_path} was taken within an epoch of {former}, which is one of "
                f"{self.described_pass()} now: until its end, samples may be repeated or left out"
            )

    def _next_ahead(self, batches: Iterator[Any]) -> Any:
        """The batch after the present one; what is drawn at random for it here is noted, to be drawn again."""
        assert self._loader is not None
        self.random_ahead = None if self._loader.may_fetch_ahead else capture_rng()
        return next(batches, NO_BATCH)

    def _looking_ahead(self, batches: Iterator[Any], first: int) -> Iterator[tuple[Any, int]]:
        """Fetch one batch ahead where the loader has no length, so that its last batch is known as such."""
        agree = self._ends_may_differ()
        batch = next(batches, NO_BATCH)  # drawn as the pass was begun
        for batch_idx in itertools.count(first):
            if agree and not all(distributed.gather_objects(batch is not NO_BATCH)):
                return
            if batch is NO_BATCH:
                return
            limited = batch_idx + 1 >= self._known_length
            following = NO_BATCH if limited else self._next_ahead(batches)
            ends = following is NO_BATCH
            if agree:
                ends = any(distributed.gather_objects(ends))
            self.length = batch_idx + 1 if ends else math.inf
            yield batch, batch_idx
            batch = NO_BATCH if ends else following
        return

    def _ends_may_differ(self) -> bool:
        return distributed.world_size() > 1 and not self.trainer.use_distributed_sampler and self._uneven is None

    def stops_epoch(self, batch_idx: int) -> bool:
        """Whether the last of the hooks before a batch, which returned -1, is the module's: that ends the epoch."""
        if not is_overridden("on_train_batch_start", self.module, LightningModule):
            return False
        # Schedulers and the count of batches go on as after an epoch's last batch.
        self.progress.last_batch = True
        self.progress.batches_total += 1
        for interval in ("step", "epoch"):
            self._step_those(interval, plateau=False, batches=batch_idx + 1)
        return True

    def end_epoch(self) -> None:
        """Close the epoch: hooks, then schedulers that watch a value, then loggers."""
        trainer, progress, recorder = self.trainer, self.progress, self.recorder
        recorder.hook = None
        trainer.profiler.stop("run_training_epoch")
        if not progress.epoch_done:
            progress.epoch_done = True
            self.logged = recorder.reduce_epoch()
            self._epoch_end_hooks()
        self._leave_epoch()

    def _leave_epoch(self) -> None:
        trainer, progress = self.trainer, self.progress
        logged, self.logged = self.logged | self.recorder.reduce_epoch(), {}
        self._agree_to_stop()
        self.step_plateau_schedulers("epoch")
        progress.batches_that_stepped -= 1
        trainer.log_metrics(logged)
        progress.batches_that_stepped += 1
        self.results.reset()
        self.recorder.lacks_batch = False
        progress.end_epoch()
        self.length = self._known_length
        if self._agreed_to_leave:
            trainer.preemption.leave()

    def _epoch_end_hooks(self) -> None:
        hooks = self.trainer.hooks
        name = "on_train_epoch_end"
        for hook in hooks.of_callbacks(name, monitoring=False) + hooks.of_module(name):
            hook()
        monitoring = hooks.of_callbacks(name, monitoring=True)
        if monitoring:
            self.recorder.reduce_epoch_quietly()
        for hook in monitoring:
            hook()

    def end(self) -> None:
        """Close the fit."""
        self.trainer.hooks.call("on_train_end")
        self.step.end()
        self.recorder.active = None

    def finish_batch(self, batch_idx: int) -> bool:
        """Log, validate if that is due, and see whether to go on.

        Returns:
            Whether the epoch ends here.
        """
        trainer, progress = self.trainer, self.progress
        trainer.strategy.checkpoint_io.wait(0)
        if self._expects_first_step and progress.optimizer_steps:
            self._announce_saves()
        due = (progress.batches_that_stepped + 1) % self._log_every == 0 or self._asked_to_stop
        if due and not self.step.micro_batch and not progress.logged:
            self._agree_to_stop()
            trainer.log_metrics(self.recorder.step_metrics())
            progress.logged = True
        if self._validates and not progress.validated and self._validation_due(batch_idx):
            self._validate()
            self._agree_to_stop()
        if not self.step.micro_batch:
            if self.schedulers:
                self.step_plateau_schedulers("step")
            progress.batches_that_stepped += 1
        progress.pending = progress.logged = progress.validated = False
        self.quiet_until = self._next_look(batch_idx) if self._may_be_quiet else 0
        if progress.closing:
            return False
        return (trainer.should_stop and self._stops()) or progress.optimizer_steps >= self._max_steps

    def _announce_saves(self) -> None:
        """Tell what will be saved to what writes it, now that the optimizers have their state."""
        self._expects_first_step = False
        if self.trainer.is_global_zero:
            states = [state.values() for optimizer in self.trainer.optimizers for state in optimizer.state.values()]
            tensors = filter(torch.is_tensor, itertools.chain.from_iterable(states))
            everything = itertools.chain(self.module.parameters(), self.module.buffers(), tensors)
            self.trainer.strategy.checkpoint_io.expect(everything)

    def _next_look(self, batch_idx: int) -> float:
        """Index of the next batch after which something may be due: a log point, a validation, the last step."""
        progress = self.progress
        to_go = min(
            self._log_every - progress.batches_that_stepped % self._log_every,
            self._max_steps - progress.optimizer_steps,
        )
        if self._validates:
            counted = progress.batches_total if self.trainer.check_val_every_n_epoch is None else batch_idx + 1
            to_go = min(to_go, self._val_every - counted % self._val_every)
        return batch_idx + to_go

    def _look_soon(self) -> None:
        """Let something be due after every batch from now on."""
        self.quiet_until, self._may_be_quiet = 0, False

    def _finish_pending(self) -> bool:
        """Do what a checkpoint taken within a batch's hooks left undone of that batch."""
        self._catch_up()
        return self.finish_batch(self.progress.batches_in_epoch - 1)

    def _catch_up(self) -> None:
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.catch_up(self.trainer, self.module)

    def _epoch_validates(self) -> bool:
        every = self.trainer.check_val_every_n_epoch
        return every is None or (self.progress.epoch + 1) % every == 0

    def _validation_due(self, batch_idx: int) -> bool:
        trainer, progress = self.trainer, self.progress
        if not self._epoch_validates():
            return False
        if self._stops() and not progress.closing:
            return True
        if trainer.val_check_time is not None:
            elapsed = time.monotonic() - self._last_validation >= trainer.val_check_time.total_seconds()
            return bool(distributed.broadcast_object(elapsed))
        if self._val_every == math.inf:
            return progress.last_batch
        count = progress.batches_total if trainer.check_val_every_n_epoch is None else batch_idx + 1
        return count % self._val_every == 0

    def _validate(self) -> None:
        trainer = self.trainer
        trainer.state.stage = RunningStage.VALIDATING
        if self.step.micro_batch == 0:
            for hook in trainer.hooks.of_module("on_validation_model_zero_grad") or (
                self.module.on_validation_model_zero_grad,
            ):
                hook()
        loop = self._validation_loop(RunningStage.VALIDATING)
        self.outside = self._before_validation()
        loop.run()
        self.outside = {}
        trainer.state.stage = RunningStage.TRAINING
        torch.set_grad_enabled(True)
        self._enter_batches()
        self._last_validation = time.monotonic()

    def _validation_loop(self, stage: RunningStage) -> EvaluationLoop:
        every = self.trainer.reload_dataloaders_every_n_epochs
        stale = every and self.progress.epoch - self._validation_loaded_in_epoch >= every
        if self._validation is None or stale:
            former, self.trainer.state.stage = self.trainer.state.stage, stage
            self._validation = EvaluationLoop(self.trainer, self.module, stage)
            self.trainer.state.stage = former
            for loader, kept in zip(self._validation.loaders, self._validation_states, strict=False):
                loader.load_state_dict(kept)
            self._validation_states = []
            self._validation_loaded_in_epoch = self.progress.epoch
            self.trainer.note_batches(RunningStage.VALIDATING, self._validation.num_batches)
        self._validation.stage = stage
        return self._validation

    def validation_states(self) -> list[Any]:
        """States of what the validation loaders own."""
        return [] if self._validation is None else [loader.state_dict() for loader in self._validation.loaders]

    def _before_validation(self) -> dict[str, Any]:
        idle = idle_metrics(self.module)
        return {**random_now(self.trainer), "validation": self.validation_states(), "idle": idle}

    @property
    def has_begun_pass(self) -> bool:
        """Whether the training loader's pass has begun, but no batch was drawn yet."""
        return self._begun is not None

    def step_schedulers(self, last: bool) -> None:
        """Step the schedulers that watch no value: by step, and by epoch after its last batch."""
        if self.step.micro_batch == 0:
            self._step_those("step", plateau=False)
        if last:
            self._step_those("epoch", plateau=False)

    def step_plateau_schedulers(self, interval: str) -> None:
        """Step the schedulers that watch a value."""
        if self.schedulers and (interval == "step" or self.progress.last_batch):
            self._step_those(interval, plateau=True)

    def _step_those(self, interval: str, plateau: bool, batches: int | None = None) -> None:
        progress = self.progress
        count = progress.epoch + 1 if interval == "epoch" else progress.batches_in_epoch if batches is None else batches
        step = self.trainer.hooks.of_module("lr_scheduler_step") or (self.module.lr_scheduler_step,)
        for config in self.schedulers:
            if config.reduce_on_plateau is not plateau or config.interval != interval or count % config.frequency:
                continue
            value = None
            if plateau:
                value = self.recorder.callback_metrics.get(str(config.monitor))
                if value is None:
                    self._missing(str(config.monitor), config.strict)
                    continue
            step[0](config.scheduler, value)
            progress.scheduler_steps += 1

    def _missing(self, monitor: str, strict: bool) -> None:
        known = ", ".join(sorted(self.recorder.callback_metrics)) or "nothing yet"
        message = f"ReduceLROnPlateau watches {monitor!r}, which has not been logged; logged are: {known}"
        if strict:
            raise MisconfigurationException(f"{message}. Log it, or pass 'strict': False to step only when it is there")
        rank_zero_warn(message)
