"""What `configure_optimizers` may return, and the optimizer that hooks are handed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightlite.errors import MisconfigurationException
from lightlite.nest import move_to
from lightlite.utilities.types import LRSchedulerConfig as LRSchedulerConfig

FORMS = (
    "an optimizer; a list of optimizers; two lists, of optimizers and of schedulers; a dict with 'optimizer' and, "
    "if wanted, 'lr_scheduler' (a scheduler, or a dict with 'scheduler', 'interval', 'frequency', 'monitor', "
    "'strict', 'name'); a list of such dicts; or None"
)


class LightningOptimizer:
    """What the module's hooks see of an optimizer: the optimizer itself, but that steps are counted and scaled.

    Every attribute is the wrapped optimizer's, and `isinstance(…, type(optimizer))` holds.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scaler: torch.amp.GradScaler | None = None
        self.peers: Collection[LightningOptimizer] = ()
        """All that share the scaler."""
        self.after_closure: Callable[[], None] | None = None
        """Set where gradients are to be shown to hooks or clipped before a step."""
        self.count_step: Callable[[], None] | None = None
        self.gradients_wait = False  # whether gradients were computed by hand of which no step was made yet
        """Set in manual optimization; in automatic optimization the training step counts."""
        self._unscaled = self._stepped = False
        self.no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.toggled: Callable[[LightningOptimizer], AbstractContextManager[Any]] = lambda _: nullcontext()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (LightningOptimizer, (self.optimizer,))

    def __repr__(self) -> str:
        return f"Lightning{self.optimizer!r}"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer; with a gradient scaler, unless gradients overflowed.

        Args:
            closure: Clears gradients, computes the loss and its gradients, and returns it. Without a scaler the
                optimizer itself calls it, once or (LBFGS) several times.
            kwargs: Handed to the optimizer.
        """
        if self.after_closure is not None:
            closure = self._finishing(closure, self.after_closure)
        if self.scaler is not None:
            result = self._scaled_step(closure, **kwargs)
        else:
            result = self.optimizer.step(**kwargs) if closure is None else self.optimizer.step(closure, **kwargs)
        self.gradients_wait = False
        if self.count_step is not None:
            self.count_step()
        return result

    def unscale(self) -> None:
        """Take the scaler's factor out of the gradients, once before a step; nothing without a scaler."""
        if self.scaler is not None and not self._unscaled:
            self.scaler.unscale_(self.optimizer)
            self._unscaled = True

    def _finishing(self, closure: Callable[[], Any] | None, finish: Callable[[], None]) -> Callable[[], Any] | None:
        if closure is None:
            finish()
            return None

        def evaluate() -> Any:
            loss = closure()
            if not self._skips(loss):
                finish()
            return loss

        return evaluate

    def _skips(self, loss: Any) -> bool:
        """Whether an automatic training_step skipped its batch, which leaves the scaler nothing to look at."""
        return loss is None and self.scaler is not None and self.count_step is None

    def _scaled_step(self, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        scaler = self.scaler
        assert scaler is not None
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates its closure several times a step, which a gradient scaler cannot follow; "
                "use precision='bf16-mixed' or '32-true' instead of '16-mixed'"
            )
        if closure is not None and self._skips(closure()):
            return None
        peers = self.peers or (self,)
        if self._stepped:
            settle(scaler, peers)
        result = scaler.step(self.optimizer, **kwargs)
        self._unscaled, self._stepped = False, True
        if all(peer._stepped for peer in peers):
            settle(scaler, peers)
        return result

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Context for manual optimization: gradients only for this optimizer's parameters.

        Args:
            sync_grad: Whether backward passes in it average gradients over the ranks.
        """
        with self.toggled(self), nullcontext() if sync_grad else self.no_sync():
            yield


def settle(scaler: torch.amp.GradScaler, optimizers: Iterable[LightningOptimizer]) -> None:
    """Have the scaler choose its next scale, if there were steps since, unless clipped gradients wait for theirs.

    Done after the last optimizer's step, at the end of a manual training_step, or before the next backward pass. Any
    earlier, the gradients of optimizers that are yet to step would be divided by another scale than they were
    multiplied by.
    """
    if any(optimizer._stepped for optimizer in optimizers) and not any(optimizer._unscaled for optimizer in optimizers):
        scaler.update()
        for optimizer in optimizers:
            optimizer._stepped = False


def evaluates_closure_once(optimizer: Optimizer) -> bool:
    """Whether `step(closure)` is the same as `closure()` and then `step()`, which is what a hand-written loop does."""
    return type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, torch.optim.LBFGS)


def configure(returned: Any) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Read what `configure_optimizers` returned.

    Args:
        returned: One of the forms that Lightning 2.x documents (see `FORMS`).

    Raises:
        MisconfigurationException: Saying what was returned and which forms are allowed.
    """
    if returned is None:
        return [], []
    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, dict):
        return _from_dicts([returned])
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned):
            optimizers, schedulers = list(returned[0]), list(returned[1])
            _check_optimizers(optimizers, returned)
            return optimizers, _schedulers(schedulers, None, optimizers)
        if returned and all(isinstance(part, dict) and "optimizer" in part for part in returned):
            return _from_dicts(returned)
        if returned:
            _check_optimizers(returned, returned)
            return list(returned), []
    raise MisconfigurationException(f"configure_optimizers returned {_shown(returned)}; it may return {FORMS}")


def _from_dicts(parts: Sequence[dict[str, Any]]) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    optimizers: list[Optimizer] = []
    configs: list[LRSchedulerConfig] = []
    for part in parts:
        unknown = part.keys() - {"optimizer", "lr_scheduler", "monitor", "frequency"}
        if unknown or "optimizer" not in part:
            what = f"with unknown keys {sorted(map(str, unknown))}" if unknown else "without the key 'optimizer'"
            raise MisconfigurationException(
                f"configure_optimizers returned a dict {what}: {_shown(part)}; it may return {FORMS}"
            )
        _check_optimizers([part["optimizer"]], part)
        optimizers.append(part["optimizer"])
        if part.get("lr_scheduler") is not None:
            configs += _schedulers([part["lr_scheduler"]], part.get("monitor"), optimizers)
    return optimizers, configs


def _check_optimizers(candidates: Sequence[Any], returned: Any) -> None:
    for candidate in candidates:
        if not isinstance(candidate, Optimizer):
            raise MisconfigurationException(
                f"configure_optimizers returned {_shown(returned)}, in which {_shown(candidate)} is no "
                f"torch.optim.Optimizer; it may return {FORMS}"
            )


def _schedulers(given: Sequence[Any], monitor: str | None, optimizers: list[Optimizer]) -> list[LRSchedulerConfig]:
    configs = []
    for scheduler in given:
        if isinstance(scheduler, dict):
            config = _scheduler_from_dict(scheduler, monitor)
        else:
            config = LRSchedulerConfig(scheduler, monitor=monitor)
        if not callable(getattr(config.scheduler, "step", None)):
            raise MisconfigurationException(
                f"configure_optimizers returned {_shown(config.scheduler)} as a learning-rate scheduler, which has no "
                "step(); give a torch.optim.lr_scheduler.LRScheduler or ReduceLROnPlateau"
            )
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.reduce_on_plateau = True
        owner = getattr(config.scheduler, "optimizer", None)
        if isinstance(config.scheduler, LRScheduler) and not any(owner is optimizer for optimizer in optimizers):
            raise MisconfigurationException(
                f"configure_optimizers returned the scheduler {type(config.scheduler).__name__} of an optimizer "
                "that it did not return; return both"
            )
        configs.append(config)
    return configs


def check_monitors(configs: Iterable[LRSchedulerConfig]) -> None:
    """See that each scheduler which watches a value says which, as those have to that the user does not step.

    Raises:
        MisconfigurationException: Saying how to say it.
    """
    if any(config.reduce_on_plateau and config.monitor is None for config in configs):
        raise MisconfigurationException(
            "configure_optimizers returned ReduceLROnPlateau without saying what it watches; return "
            "{'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'monitor': 'val_loss'}}"
        )


def _scheduler_from_dict(given: dict[str, Any], monitor: str | None) -> LRSchedulerConfig:
    allowed = [field.name for field in fields(LRSchedulerConfig)]
    unknown = given.keys() - set(allowed)
    if unknown or "scheduler" not in given:
        what = f"unknown keys {sorted(map(str, unknown))}" if unknown else "no key 'scheduler'"
        raise MisconfigurationException(
            f"the 'lr_scheduler' dict of configure_optimizers has {what}; allowed are {', '.join(allowed)}"
        )
    config = LRSchedulerConfig(**{"monitor": monitor, **given})
    if config.interval not in ("epoch", "step"):
        raise MisconfigurationException(
            f"the 'lr_scheduler' dict of configure_optimizers has interval={config.interval!r}; allowed are "
            "'epoch', 'step'"
        )
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise MisconfigurationException(
            f"the 'lr_scheduler' dict of configure_optimizers has frequency={config.frequency!r}; give an int >= 1"
        )
    return config


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:117]}..." if len(text) > 120 else text


def follow_parameters(optimizer: Optimizer) -> None:
    """Bring an optimizer's state to where its parameters are by now, so that it leaves the device with them."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, Tensor) and isinstance(state, dict):
            state.update(move_to(state, parameter.device))
