"""Finds a learning rate to begin with: trains for trial while the rate rises, and looks where the loss falls fastest.

The procedure is Leslie N. Smith's learning-rate range test (https://arxiv.org/abs/1506.01186); arguments, smoothing and
suggestion are those of Lightning 2.x.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException
from lightlite.utilities.parsing import lightning_hasattr, lightning_setattr
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

MODES = ("exponential", "linear")
SMOOTHING = 0.98
"""How much of the former average stays in the average of the losses, per step."""


class LRFinder:
    """What a search for a learning rate has found.

    Args:
        mode: How the rate rose, "exponential" or "linear".
        lr_min: The first rate.
        lr_max: The last rate.
        num_training: Number of steps from the one to the other.

    Attributes:
        results: "lr" and "loss": the rate of each step, and the smoothed loss; NaN where a step had none.
    """

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, MODES))}")
        if not lr_min < lr_max or (mode == "exponential" and lr_min <= 0):
            least = "above 0 " if mode == "exponential" else ""
            raise MisconfigurationException(f"min_lr={lr_min}, max_lr={lr_max}; give a min_lr {least}below max_lr")
        if num_training < 1:
            raise MisconfigurationException(f"num_training={num_training}; give a number of steps of at least 1")
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": [], "loss": []}

    def rate(self, step: int) -> float:
        """The learning rate of a step, of which the first has index 0."""
        share = (step + 1) / self.num_training if step else 0.0
        if self.mode == "linear":
            return self.lr_min + share * (self.lr_max - self.lr_min)
        return float(self.lr_min * (self.lr_max / self.lr_min) ** share)

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss fell fastest, per rate.

        Args:
            skip_begin: Steps at the beginning to leave out.
            skip_end: Steps at the end to leave out.

        Returns:
            The rate; None, with a warning, where fewer than two losses are left.
        """
        index = self._steepest(skip_begin, skip_end)
        return None if index is None else self.results["lr"][index]

    def _steepest(self, skip_begin: int, skip_end: int) -> int | None:
        losses, rates = self.results["loss"], self.results["lr"]
        candidates = range(skip_begin, min(len(losses), len(rates)) - skip_end)
        indices = [index for index in candidates if math.isfinite(losses[index])]
        if len(indices) < 2:
            rank_zero_warn(
                f"no learning rate can be suggested: of {len(losses)} steps, {len(indices)} with a finite loss are "
                f"left after skip_begin={skip_begin} and skip_end={skip_end}, and 2 are needed; allow the Trainer more "
                "steps or epochs, or skip less"
            )
            return None
        gradients = torch.gradient(
            torch.tensor([losses[index] for index in indices]),
            spacing=[torch.tensor([rates[index] for index in indices])],
        )[0]
        return indices[int(torch.argmin(gradients))]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """Draw the loss over the rate.

        Args:
            suggest: Whether to mark the suggestion by a red dot.
            show: Whether to show the figure.
            ax: The matplotlib axes to draw on; a new figure by default.

        Returns:
            The matplotlib figure.

        Raises:
            ModuleNotFoundError: Where matplotlib is not installed.
        """
        if ax is None or show:
            try:
                import matplotlib.pyplot as plt
            except ModuleNotFoundError:
                raise ModuleNotFoundError(
                    "plot() needs the package matplotlib, which is not installed: `pip install matplotlib`, or "
                    "`pip install 'lightlite[tuner]'`"
                ) from None
        if ax is None:
            _, ax = plt.subplots()
        rates, losses = self.results["lr"], self.results["loss"]
        ax.plot(rates, losses)
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        index = self._steepest(10, 1) if suggest else None
        if index is not None:
            ax.plot(rates[index], losses[index], markersize=10, marker="o", color="red")
        if show:
            plt.show()
        return ax.figure


class LearningRateFinder(Callback):
    """Finds a learning rate at the start of fit, and goes on with it.

    The rate rises step by step while the module is trained for trial; the rate is suggested at which the loss fell
    fastest. Then module, optimizer and random generators are as they were, but that the module (or its hparams, or the
    data module) and the optimizer have the suggested rate. To search at other times, call `lr_find` from another hook.

    Args:
        min_lr: The first rate.
        max_lr: The last rate.
        num_training_steps: Number of optimizer steps from the one to the other. A fit that is allowed fewer has fewer.
        mode: How the rate rises, "exponential" or "linear".
        early_stop_threshold: End the search when the smoothed loss is more than so many times the lowest so far; None
            to go on to the end.
        update_attr: Whether to set the attribute and the optimizer's rate to what was found.
        attr_name: Where the module keeps its learning rate; by default "lr" or else "learning_rate".

    Attributes:
        optimal_lr: The result; None before the search, and where `fast_dev_run` leaves it out.

    Raises:
        ValueError: For another mode.
        MisconfigurationException: For rates or a number of steps that cannot be.
    """

    SUPPORTED_MODES = MODES

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        self._arguments = (mode.lower(), min_lr, max_lr, num_training_steps)
        LRFinder(*self._arguments)
        self._early_stop_threshold = early_stop_threshold
        self._update_attr, self._attr_name = update_attr, attr_name
        self.optimal_lr: LRFinder | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        self.lr_find(trainer, pl_module)

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> LRFinder | None:
        """Search, and keep the result as `optimal_lr`. A collective call.

        Raises:
            AttributeError: Where the attribute to update is not there.
            MisconfigurationException: Where the module has not one optimizer, but none or several.
        """
        if trainer.fast_dev_run:
            rank_zero_warn("the search for a learning rate is left out: fast_dev_run is on")
            return None
        attribute = _attribute(pl_module, self._attr_name) if self._update_attr else ""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.configure_optimizers returned {len(trainer.optimizers)} optimizers; a "
                "learning rate can be searched for one"
            )
        finder = LRFinder(*self._arguments)
        steps = finder.num_training
        test = _RangeTest(finder, self._early_stop_threshold, trainer.optimizers[0], trainer.global_step)
        with (
            trainer.rehearsal(
                [test],
                # The rate is the test's to set; what steps by hand may find its schedulers.
                lr_scheduler_configs=[] if pl_module.automatic_optimization else trainer.lr_scheduler_configs,
                max_steps=trainer.global_step + steps,
                min_steps=None,
                min_epochs=None,
                limit_val_batches=steps,
            ) as attempt,
            _bar_of(trainer, steps) as test.bar,
        ):
            attempt()
        finder.results = trainer.strategy.broadcast(finder.results)
        taken = len(finder.results["lr"])
        if taken < steps:
            rank_zero_info(f"the search for a learning rate ended after {taken} of {steps} steps")
        self.optimal_lr = finder
        rate = finder.suggestion() if self._update_attr else None
        if rate is not None:
            lightning_setattr(pl_module, attribute, rate)
            _begin_with(trainer, rate)
            rank_zero_info(f"{attribute} is set to {rate}")
        return finder


class _RangeTest(Callback):
    """Sets the rate of each step of a trial, and notes the loss.

    Args:
        finder: Whose `results` are filled.
        threshold: See `LearningRateFinder`.
        optimizer: Whose rate is set.
        first_step: The trainer's `global_step` at the beginning.
    """

    def __init__(self, finder: LRFinder, threshold: float | None, optimizer: Optimizer, first_step: int) -> None:
        self._finder, self._threshold, self._optimizer, self._first = finder, threshold, optimizer, first_step
        self._average = self._best = 0.0
        self.bar: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rate = self._finder.rate(trainer.global_step - self._first)
        _set_rate(self._optimizer, rate)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._finder.results["lr"].append(rate)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.bar is not None:
            self.bar.update()
        losses = self._finder.results["loss"]
        loss = outputs.get("loss") if outputs else None
        if loss is None:
            losses.append(math.nan)
            return
        step = trainer.global_step - self._first
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss.item()
        smoothed = self._average / (1 - SMOOTHING ** (step + 1))
        diverges = self._threshold is not None and step > 1 and smoothed > self._threshold * self._best
        if trainer.strategy.broadcast(diverges):
            trainer.fit_loop.stop()
        if smoothed < self._best or step == 1:
            self._best = smoothed
        losses.append(smoothed)


def _bar_of(trainer: Trainer, steps: int) -> Any:
    from tqdm import tqdm

    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    return tqdm(desc="Finding best initial lr", total=steps, disable=None if shown else True)


def _attribute(module: LightningModule, name: str) -> str:
    names = (name,) if name else ("lr", "learning_rate")
    for candidate in names:
        if lightning_hasattr(module, candidate):
            return candidate
    raise AttributeError(
        f"{type(module).__name__} has no {' or '.join(names)} to set to the learning rate that is found, nor have its "
        "hparams or the data module; say what it is called by attr_name=…, or give update_attr=False"
    )


def _begin_with(trainer: Trainer, rate: float) -> None:
    """Make `rate` the one that the optimizer has, and that schedulers take for its first."""
    for optimizer in trainer.optimizers:
        _set_rate(optimizer, rate)
        for group in optimizer.param_groups:
            if "initial_lr" in group:
                group["initial_lr"] = rate
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [rate] * len(config.scheduler.base_lrs)


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
