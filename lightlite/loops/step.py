"""The training step: forward, backward, accumulate, clip, step.

Whatever can be decided before the first batch is decided in `__init__`; what nobody asked for is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightlite import distributed
from lightlite.errors import MisconfigurationException
from lightlite.hooks import HookTable, is_overridden
from lightlite.interfaces import Strategy
from lightlite.loops.calls import with_batch_idx
from lightlite.module import LightningModule
from lightlite.optim import LightningOptimizer, evaluates_closure_once, settle
from lightlite.profilers import PassThroughProfiler

if TYPE_CHECKING:
    from lightlite.trainer import Trainer


class TrainStep:
    """Trains on one batch, in automatic optimization.

    Where nothing else is asked for, that is the hand-written loop's forward, zero_grad, backward and step. An
    overridden `optimizer_step`, an optimizer that evaluates its closure itself, and a gradient scaler are given all
    but the step as a closure instead.

    Args:
        trainer: For its settings and hooks.
        module: The user's module.
        training_step: Runs `module.training_step`, through the strategy's wrapper.

    Attributes:
        micro_batch: How many batches of the accumulation window have been seen; 0 after a step.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, training_step: Callable[..., Any]) -> None:
        self._trainer, self._module = trainer, module
        profiler, strategy = trainer.profiler, f"[Strategy]{type(trainer.strategy).__name__}"
        own = f"[LightningModule]{type(module).__name__}"
        self._training_step = profiler.wrap(
            f"{strategy}.training_step", with_batch_idx(training_step, module.training_step)
        )
        self._bare_step = with_batch_idx(module.training_step, module.training_step)
        self._progress = trainer.progress
        self._optimizer: LightningOptimizer | None = next(iter(trainer.wrapped_optimizers), None)
        self._context: Callable[[], AbstractContextManager[Any]] | None = trainer.precision_plugin.forward_context()
        self._scaler = trainer.precision_plugin.scaler
        self._no_sync, self._after_step = trainer.strategy.no_sync, trainer.strategy.after_step
        self._plain_optimizer = self._steppable_as_by_hand(trainer)
        self._optimizer_step = next(iter(trainer.hooks.of_module("optimizer_step")), None) or profiler.wrap(
            f"{own}.optimizer_step", module.optimizer_step
        )
        self._clear_gradients = profiler.wrap("zero_grad", self._compose_clearing(trainer.hooks))
        self._backward = profiler.wrap(f"{strategy}.backward", self._compose_backward(trainer.hooks))
        self._before_step = trainer.hooks.resolve("on_before_optimizer_step")
        self._clipping = trainer.hooks.of_module("configure_gradient_clipping")
        if not self._clipping and trainer.gradient_clip_val:
            clip = module.configure_gradient_clipping
            self._clipping = (profiler.wrap(f"{own}.configure_gradient_clipping", clip),)
        self._wants_outputs = bool(trainer.hooks.resolve("on_train_batch_end"))
        self.begin_epoch()
        self._batch: Any = None
        self._batch_idx = 0
        self._outputs: Any = None

    def _compose_clearing(self, hooks: HookTable) -> Callable[[], Any]:
        """What clears the gradients: the optimizer's own zero_grad, where no hook is in the way."""
        optimizer, before = self._optimizer, hooks.resolve("on_before_zero_grad")
        override = next(iter(hooks.of_module("optimizer_zero_grad")), None)
        zero_grad = self._module.zero_grad if optimizer is None else optimizer.optimizer.zero_grad
        if optimizer is None or (override is None and not before):
            return zero_grad

        def clear() -> None:
            for hook in before:
                hook(optimizer)
            if override is None:
                zero_grad()
            else:
                override(self._progress.epoch, self._batch_idx, optimizer)

        return clear

    def _compose_backward(self, hooks: HookTable) -> Callable[[Tensor], Any]:
        """What computes the gradients: `Tensor.backward`, where no hook and no scaler is in the way."""
        before, after = hooks.resolve("on_before_backward"), hooks.resolve("on_after_backward")
        overridden = is_overridden("backward", self._module, LightningModule)
        backward: Callable[..., Any] = self._module.backward if overridden else Tensor.backward
        scaler = self._scaler
        if not before and not after and scaler is None:
            return backward

        def run(loss: Tensor) -> None:
            for hook in before:
                hook(loss)
            backward(loss if scaler is None else scaler.scale(loss))
            for hook in after:
                hook()

        return run

    def _steppable_as_by_hand(self, trainer: Trainer) -> Any:
        """What has the optimizer's `step`, where `closure()` and `step()` are all there is to a step; else None."""
        optimizer = self._optimizer
        if optimizer is None or optimizer.scaler is not None or trainer.hooks.of_module("optimizer_step"):
            return None
        if self._after_step is not None:
            return None
        plain = optimizer.optimizer
        if not evaluates_closure_once(plain):
            return None
        if isinstance(trainer.profiler, PassThroughProfiler):
            return plain
        return SimpleNamespace(step=trainer.profiler.wrap("optimizer_step", lambda: plain.step()))

    def begin_epoch(self) -> None:
        """Begin a new accumulation window, of the length that holds for this epoch; one that only observes is one."""
        self.micro_batch = self._accumulated = self._lacking = 0
        if self._progress.closing and not self._progress.last_batch:
            self.micro_batch = self._progress.batches_in_epoch
        self._window = self._trainer.accumulate_grad_batches
        self._finishes = bool(self._before_step or self._clipping) or self._window > 1
        if self._optimizer is not None:
            self._optimizer.after_closure = self._finish_gradients if self._finishes else None

    def end(self) -> None:
        """Let go of the last batch, and of what was made of it: the step outlives the fit."""
        self._batch = self._outputs = None

    def state_dict(self) -> dict[str, Any]:
        """The accumulation window, where one is open: this rank's gradients so far; empty otherwise."""
        if not self._accumulated:
            return {}
        gradients = _gradients(self._module.named_parameters())
        window = {"micro_batch": self._accumulated, "window": self._window, "lacking": self._lacking}
        return {**window, "gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, after `begin_epoch`; of a window of another length, too."""
        if not state:
            return
        self.micro_batch = self._accumulated = state["micro_batch"]
        self._lacking = state.get("lacking", 0)
        _set_gradients(self._module, state["gradients"], self._trainer.strategy)
        if state.get("window", self._window) != self._window:
            self._rescale(state["window"] / self._window)
            self._finishes = True
            if self._optimizer is not None:
                self._optimizer.after_closure = self._finish_gradients

    def __call__(self, batch: Any, batch_idx: int, last: bool) -> Any:
        """Train on a batch.

        Args:
            batch: On its device already.
            batch_idx: Its index in the epoch.
            last: Whether it is the epoch's last, so that the accumulation window ends with it.

        Returns:
            What `on_train_batch_end` hooks are given; None where there are none.
        """
        self._batch, self._batch_idx = batch, batch_idx
        self.micro_batch += 1
        if not last and self.micro_batch < self._window:
            with self._no_sync():
                self._closure()
            self._accumulated = self.micro_batch
            return self._outputs
        self._accumulated = 0
        if self._plain_optimizer is not None:
            self._closure()
            if self._finishes:
                self._finish_gradients()
            self._plain_optimizer.step()
        elif self._optimizer is not None:
            self._step_by_hook(self._optimizer, self._closure)
        else:
            self._closure()
        # Without an optimizer too, so that max_steps ends the fit and checkpoints are told apart.
        self._progress.optimizer_steps += 1
        self.micro_batch = 0
        return self._outputs

    def observe(self, batch: Any, batch_idx: int, last: bool) -> Any:
        """Run `training_step` and train nothing: for statistics that a forward pass gathers; see `__call__`.

        An epoch of this counts as one step, at its end, by which what is logged and saved then can be told apart from
        what was before.
        """
        self._batch, self._batch_idx = batch, batch_idx
        self.micro_batch += 1
        with self._no_sync(), (self._context or nullcontext)():
            output = self._training_step(batch, batch_idx)
        if self._wants_outputs:
            self._outputs = self._described(output, output if isinstance(output, Tensor) else self._loss_in(output))
        if last:
            self.micro_batch = 0
            self._progress.optimizer_steps += 1
        return self._outputs

    def without_some(self, batch: Any, batch_idx: int, last: bool, present: int, absent: bool, trains: bool) -> Any:
        """Train on a global batch of which some ranks have no part; see `__call__` and `observe`.

        The module's own `training_step` is run, on the ranks that have a batch. Collective calls in it concern the rank
        alone.

        Args:
            batch: This rank's.
            batch_idx: Its index in the epoch.
            last: Whether it is the epoch's last.
            present: Number of ranks that have a batch.
            absent: Whether this rank has none.
            trains: Whether to train, or to observe.
        """
        self._batch, self._batch_idx = batch, batch_idx
        self.micro_batch += 1
        self._outputs = {} if self._wants_outputs else None
        ends = last or (trains and self.micro_batch >= self._window)
        if not trains:
            if not absent:
                with distributed.alone(), torch.no_grad():
                    self._bare_step(batch, batch_idx)
            self.micro_batch = 0 if last else self.micro_batch
            self._progress.optimizer_steps += last
            return self._outputs
        self._lacking += distributed.world_size() - present
        compute = functools.partial(self._compute_with_others, absent, ends)
        self._accumulated = 0 if ends else self.micro_batch
        if not ends:
            compute()
            return self._outputs
        if self._optimizer is None:
            compute()
        else:
            after, self._optimizer.after_closure = self._optimizer.after_closure, self._finish_gradients
            self._step_by_hook(self._optimizer, compute)
            self._optimizer.after_closure = after
        self._progress.optimizer_steps += 1
        self.micro_batch = self._lacking = 0
        return self._outputs

    def _compute_with_others(self, absent: bool, ends: bool) -> Tensor:
        """This rank's gradients, if it has a batch, brought together with the others' where the window ends."""
        loss: Tensor | None = None
        if absent:
            if self.micro_batch == 1:
                self._clear_gradients()
        else:
            wrapped, self._training_step = self._training_step, self._bare_step
            with distributed.alone():
                loss = self._closure()
            self._training_step = wrapped
        if ends:
            self._trainer.strategy.sync_gradients(self._module.parameters())
        if loss is not None:
            return loss
        nothing = torch.zeros((), device=self._trainer.strategy.root_device)
        return nothing if self._scaler is None else self._scaler.scale(nothing)

    def _step_by_hook(self, optimizer: LightningOptimizer, compute: Callable[[], Tensor | None]) -> None:
        """Step as the module's `optimizer_step` says, or as the optimizer or the gradient scaler needs it."""
        runs: list[Tensor | None] = []
        recorder = self._trainer.recorder

        def closure() -> Tensor | None:
            # What training_step logs is its own here too, not that of the optimizer_step which calls it.
            outer, recorder.hook = recorder.hook, "training_step"
            runs.append(compute())
            recorder.hook = outer
            return runs[-1]

        self._optimizer_step(self._progress.epoch, self._batch_idx, optimizer, closure)
        if not runs:
            raise MisconfigurationException(
                f"{type(self._module).__name__}.optimizer_step did not run its closure, so nothing was trained; "
                "call optimizer.step(closure=optimizer_closure), or optimizer_closure() itself"
            )
        if self._after_step is not None:
            self._after_step()

    def _closure(self) -> Tensor | None:
        if self._context is None:
            output = self._training_step(self._batch, self._batch_idx)
        else:
            with self._context():
                output = self._training_step(self._batch, self._batch_idx)
        loss = output if isinstance(output, Tensor) else self._loss_in(output)
        if self._window > 1 and loss is not None:
            loss = loss / self._window
        if self._wants_outputs:
            self._outputs = self._described(output, loss)
        if self.micro_batch == 1:
            self._clear_gradients()
        if loss is not None:
            try:
                self._backward(loss)
            except RuntimeError as error:
                _explain_loss(loss, error)
                raise
        return loss

    def _finish_gradients(self) -> None:
        """Make the gradients those of the whole window, show them to the hooks, clip them."""
        optimizer = self._optimizer
        assert optimizer is not None
        if self.micro_batch != self._window or self._lacking:
            world = self._trainer.world_size
            self._rescale(self._window * world / (self.micro_batch * world - self._lacking))
        if not self._before_step and not self._clipping:
            return
        optimizer.unscale()
        for hook in self._before_step:
            hook(optimizer)
        for clip in self._clipping:
            clip(
                optimizer,
                gradient_clip_val=self._trainer.gradient_clip_val,
                gradient_clip_algorithm=self._trainer.gradient_clip_algorithm,
            )

    def _rescale(self, factor: float) -> None:
        """Losses were divided by another number of batches than there were: by more, where an epoch or a rank ended."""
        gradients = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def _loss_in(self, output: Any) -> Tensor | None:
        if output is None:
            if self._trainer.world_size > 1:
                raise MisconfigurationException(
                    f"training_step returned None on rank {self._trainer.global_rank}: a batch cannot be skipped with "
                    "several ranks, which would wait for its gradients for ever; return a loss times zero instead"
                )
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if isinstance(loss, Tensor):
            return loss
        what = (
            f"a dict with the keys {list(output)}"
            if isinstance(output, Mapping)
            else f"{output!r} ({type(output).__name__})"
        )
        raise MisconfigurationException(
            f"training_step returned {what}; in automatic optimization return the loss as a tensor, a dict with "
            "the loss under 'loss', or None to skip the batch"
        )

    @staticmethod
    def _described(output: Any, loss: Tensor | None) -> dict[str, Any]:
        if loss is None:
            return {}
        extra = dict(output) if isinstance(output, Mapping) else {}
        return {**extra, "loss": loss.detach()}


def _explain_loss(loss: Tensor, error: RuntimeError) -> None:
    """Say of a loss that has no gradients what is wrong with it.

    Raises:
        MisconfigurationException: Where it is not a single number, or depends on no parameter.
    """
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"training_step returned a loss of shape {tuple(loss.shape)}; return a scalar, such as its .mean()"
        ) from error
    if not loss.requires_grad:
        raise MisconfigurationException(
            "training_step returned a loss that depends on no parameter with requires_grad=True: it was detached, made "
            "under torch.no_grad(), or all parameters are frozen; return the loss as it was computed, or None to skip "
            "the batch"
        ) from error


class ManualStep:
    """Runs `training_step` in manual optimization, where the user's code does the rest.

    Args:
        trainer: For its settings and hooks.
        module: The user's module.
        training_step: Runs `module.training_step`.
    """

    micro_batch = 0

    def __init__(self, trainer: Trainer, module: LightningModule, training_step: Callable[..., Any]) -> None:
        self._training_step = trainer.profiler.wrap(
            f"[Strategy]{type(trainer.strategy).__name__}.training_step",
            with_batch_idx(training_step, module.training_step),
        )
        self._module, self._progress, self._strategy = module, trainer.progress, trainer.strategy
        self._context = trainer.precision_plugin.forward_context() or nullcontext
        self._scaler, self._optimizers = trainer.precision_plugin.scaler, trainer.wrapped_optimizers
        self._hooks = trainer.hooks.resolve("on_before_optimizer_step")
        _refuse_automatic_settings(trainer)
        for optimizer in trainer.wrapped_optimizers:
            optimizer.count_step = self._count_step
            if self._hooks:
                optimizer.after_closure = functools.partial(self._show_gradients, optimizer)
            if not isinstance(trainer.profiler, PassThroughProfiler):
                optimizer.step = trainer.profiler.wrap("optimizer_step", optimizer.step)  # type: ignore[method-assign]

    def begin_epoch(self) -> None:
        """Nothing is kept from batch to batch."""

    def end(self) -> None:
        """Nothing is kept from batch to batch."""

    def state_dict(self) -> dict[str, Any]:
        """Gradients that no optimizer has made a step of yet, where the user's code accumulates; empty otherwise."""
        waiting = {
            id(parameter)
            for optimizer in self._optimizers
            if optimizer.gradients_wait
            for group in optimizer.optimizer.param_groups
            for parameter in group["params"]
        }
        parameters = [(name, value) for name, value in self._module.named_parameters() if id(value) in waiting]
        gradients = _gradients(parameters)
        return {"gradients": gradients} if gradients else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        _set_gradients(self._module, state.get("gradients", {}), self._strategy)
        for optimizer in self._optimizers:
            optimizer.gradients_wait = optimizer.gradients_wait or bool(state)

    def __call__(self, batch: Any, batch_idx: int, last: bool) -> Any:
        """Run the user's training step; see `TrainStep.__call__`."""
        with self._context():
            output = self._training_step(batch, batch_idx)
        if self._scaler is not None:
            settle(self._scaler, self._optimizers)
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        if output is None or isinstance(output, Mapping):
            return {} if output is None else dict(output)
        raise MisconfigurationException(
            f"training_step returned {output!r} ({type(output).__name__}); in manual optimization return a "
            "tensor, a dict or None"
        )

    def observe(self, batch: Any, batch_idx: int, last: bool) -> Any:
        """Refuse to hold back the steps that the user's code takes.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(
            "after training, trainer.closing_epoch asks for an epoch that trains nothing, but in manual optimization "
            "training_step itself steps the optimizers; leave out the callback that set it"
        )

    def _show_gradients(self, optimizer: LightningOptimizer) -> None:
        optimizer.unscale()
        for hook in self._hooks:
            hook(optimizer.optimizer)

    def _count_step(self) -> None:
        self._progress.optimizer_steps += 1


def _gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    return {name: parameter.grad.cpu().clone() for name, parameter in parameters if parameter.grad is not None}


def _set_gradients(module: nn.Module, gradients: Mapping[str, Tensor], strategy: Strategy) -> None:
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = strategy.part(gradients[name], parameter)


def _refuse_automatic_settings(trainer: Trainer) -> None:
    """What the Trainer cannot do for a module that optimizes by hand."""
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"gradient_clip_val={trainer.gradient_clip_val} has no effect in manual optimization; call "
            "self.clip_gradients(optimizer, gradient_clip_val=…) in training_step instead"
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} has no effect in manual optimization; "
            "step the optimizer every so many batches in training_step instead"
        )
