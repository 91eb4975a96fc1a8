"""What shows how far a run has come."""

from __future__ import annotations

from lightlite.callbacks.progress.progress_bar import ProgressBar
from lightlite.callbacks.progress.rich_progress import RichProgressBar
from lightlite.callbacks.progress.tqdm_progress import TQDMProgressBar

__all__ = ["ProgressBar", "RichProgressBar", "TQDMProgressBar"]
