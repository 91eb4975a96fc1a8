"""Code that plugs into a run at its hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from lightlite.callbacks.batch_size_finder import BatchSizeFinder
from lightlite.callbacks.callback import Callback
from lightlite.callbacks.checkpoint import Checkpoint
from lightlite.callbacks.device_stats_monitor import DeviceStatsMonitor
from lightlite.callbacks.early_stopping import EarlyStopping
from lightlite.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
from lightlite.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from lightlite.callbacks.lambda_function import LambdaCallback
from lightlite.callbacks.lr_finder import LearningRateFinder
from lightlite.callbacks.lr_monitor import LearningRateMonitor
from lightlite.callbacks.model_checkpoint import ModelCheckpoint
from lightlite.callbacks.model_summary import ModelSummary
from lightlite.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from lightlite.callbacks.prediction_writer import BasePredictionWriter
from lightlite.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
from lightlite.callbacks.rich_model_summary import RichModelSummary
from lightlite.callbacks.spike import SpikeDetection
from lightlite.callbacks.stochastic_weight_avg import StochasticWeightAveraging
from lightlite.callbacks.throughput_monitor import ThroughputMonitor
from lightlite.callbacks.timer import Timer
from lightlite.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from lightlite.errors import missing_attribute

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]


if not TYPE_CHECKING:  # or type checkers would take every name for one that exists

    def __getattr__(name: str) -> NoReturn:
        raise missing_attribute(__name__, name)
