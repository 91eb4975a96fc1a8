"""Save where a fit was when it failed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightlite.callbacks.checkpoint import Checkpoint
from lightlite.errors import MisconfigurationException
from lightlite.utilities import files
from lightlite.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class OnExceptionCheckpoint(Checkpoint):
    """Writes a checkpoint when training ends by an exception, KeyboardInterrupt included, to go on from.

    An earlier file of the name is replaced; a fit that comes to its end removes it. With several ranks, the one that
    rank zero had reached is written, with no word from the others, which may be gone.

    Args:
        dirpath: Folder of the file, or a URL.
        filename: Its name, without ".ckpt".

    Raises:
        MisconfigurationException: For an empty name.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise MisconfigurationException(
                f"OnExceptionCheckpoint(filename={filename!r}); give a name without extension, such as 'on_exception'"
            )
        self.dirpath, self.filename = dirpath, filename
        self._training = False

    @property
    def ckpt_path(self) -> str:
        """The file."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing is worth saving yet."""
        self._training = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is."""
        self._training = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save."""
        if self._training:
            trainer.save_checkpoint(self.ckpt_path)
            rank_zero_info(f"saved {self.ckpt_path} because of {type(exception).__name__}: {exception}")
        self._training = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the file after a fit that went well."""
        if stage == "fit" and trainer.is_global_zero:
            files.remove(self.ckpt_path)
        self._training = False
