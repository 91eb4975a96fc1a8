"""Types for annotations, under the names that Lightning has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import NotRequired, Required

STEP_OUTPUT: TypeAlias = Tensor | Mapping[str, Any] | None
"""What a step returns."""

TRAIN_DATALOADERS: TypeAlias = Any
EVAL_DATALOADERS: TypeAlias = Any
"""An iterable of batches, or a nest of them."""

_EVALUATE_OUTPUT: TypeAlias = list[Mapping[str, float]]
_PREDICT_OUTPUT: TypeAlias = list[Any] | list[list[Any]]

LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
LRSchedulerPLType: TypeAlias = LRSchedulerTypeUnion
LRSchedulerType: TypeAlias = type[LRScheduler] | type[ReduceLROnPlateau]


@dataclass
class LRSchedulerConfig:
    """A learning-rate scheduler and when it is stepped.

    Attributes:
        scheduler: The scheduler.
        name: What LearningRateMonitor calls it; by default after the optimizer.
        interval: "epoch" or "step" (an optimizer's step, so that accumulated batches count once).
        frequency: Step it every that many intervals.
        reduce_on_plateau: Whether it is stepped with the value of `monitor`.
        monitor: Name of a logged value, for ReduceLROnPlateau.
        strict: Whether a missing `monitor` is an error rather than a warning.
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


class LRSchedulerConfigType(TypedDict, total=False):
    """A dict that stands for an `LRSchedulerConfig`."""

    scheduler: Required[LRSchedulerTypeUnion]
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """A dict that `configure_optimizers` may return, without a scheduler."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict):
    """A dict that `configure_optimizers` may return, with a scheduler."""

    optimizer: Optimizer
    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType
    monitor: NotRequired[str]


OptimizerLRScheduler: TypeAlias = (
    Optimizer
    | Sequence[Optimizer]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfig]]
    | OptimizerConfig
    | OptimizerLRSchedulerConfig
    | Sequence[OptimizerConfig]
    | Sequence[OptimizerLRSchedulerConfig]
    | None
)
"""What `configure_optimizers` returns."""
