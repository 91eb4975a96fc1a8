"""Code that plugs into a run at its hooks."""

from __future__ import annotations

from lightlite.callbacks.callback import Callback
from lightlite.callbacks.checkpoint import Checkpoint
from lightlite.callbacks.early_stopping import EarlyStopping
from lightlite.callbacks.lambda_function import LambdaCallback
from lightlite.callbacks.lr_monitor import LearningRateMonitor
from lightlite.callbacks.model_checkpoint import ModelCheckpoint
from lightlite.callbacks.model_summary import ModelSummary
from lightlite.callbacks.prediction_writer import BasePredictionWriter
from lightlite.callbacks.progress import ProgressBar, TQDMProgressBar
from lightlite.callbacks.timer import Timer

__all__ = [
    "BasePredictionWriter",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "ProgressBar",
    "TQDMProgressBar",
    "Timer",
]
