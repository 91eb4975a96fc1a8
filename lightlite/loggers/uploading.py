"""What the loggers share that keep checkpoints on a server: which files are new, and what is told of each."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lightlite.errors import MisconfigurationException
from lightlite.loggers.logger import Logger, as_number

if TYPE_CHECKING:
    from lightlite.callbacks.model_checkpoint import ModelCheckpoint

SETTINGS = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only", "_every_n_train_steps")
"""Of a ModelCheckpoint, told beside every file."""


class UploadingLogger(Logger):
    """A logger that uploads the files of ModelCheckpoint.

    Args:
        log_model: "all": every checkpoint, when it is written; True: those that are left at the end, or every one
            where ModelCheckpoint keeps all (`save_top_k=-1`); False: none.

    Raises:
        MisconfigurationException: For another value of `log_model`.
    """

    def __init__(self, log_model: Any) -> None:
        if log_model not in (True, False, "all"):
            raise MisconfigurationException(f"log_model={log_model!r}; give True, False or 'all'")
        self._log_model = log_model
        self._uploaded: dict[str, float] = {}
        self._waiting: dict[int, ModelCheckpoint] = {}

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Upload what is new, now or at the end."""
        if self._log_model == "all" or (self._log_model and checkpoint_callback.save_top_k == -1):
            self._upload_new(checkpoint_callback)
        elif self._log_model:
            self._waiting[id(checkpoint_callback)] = checkpoint_callback

    def _upload_waiting(self) -> None:
        for callback in self._waiting.values():
            self._upload_new(callback)
        self._waiting = {}

    def _upload_new(self, callback: ModelCheckpoint) -> None:
        """Upload the callback's files, oldest first, that were not, or that were written again since."""
        scores = {
            callback.last_model_path: callback.current_score,
            callback.best_model_path: callback.best_model_score,
            **callback.best_k_models,
        }
        times = sorted((os.path.getmtime(path), path) for path in scores if os.path.isfile(path))
        for time, path in times:
            if time > self._uploaded.get(path, 0.0):
                self._upload(
                    path,
                    metadata={
                        "score": as_number(scores[path]),
                        "original_filename": os.path.basename(path),
                        self._settings_key(callback): {name: getattr(callback, name, None) for name in SETTINGS},
                    },
                    aliases=["latest", "best"] if path == callback.best_model_path else ["latest"],
                )
                self._uploaded[path] = time

    def _settings_key(self, callback: ModelCheckpoint) -> str:
        return type(callback).__name__

    @abstractmethod
    def _upload(self, path: str, metadata: dict[str, Any], aliases: list[str]) -> None:
        """Send one file to the server."""
