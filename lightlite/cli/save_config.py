"""Keeps the configuration of a run beside what the run wrote."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightlite.callbacks import Callback
from lightlite.cli.parser import LightningArgumentParser, Namespace
from lightlite.hooks import is_overridden
from lightlite.utilities import files

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class SaveConfigCallback(Callback):
    """Writes the configuration into `trainer.log_dir` when a run begins; given as `--config`, it is the same run.

    Args:
        parser: What parsed it.
        config: The configuration.
        config_filename: The file's name.
        overwrite: Whether a file of that name may be overwritten.
        multifile: Whether parts that came from files of their own are written to files of their own.
        save_to_log_dir: Whether to write the file at all; False for a subclass whose `save_config` does something else.

    Raises:
        ValueError: For `save_to_log_dir=False` where nothing else is done either.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        self.parser, self.config = parser, config
        self.config_filename, self.overwrite, self.multifile = config_filename, overwrite, multifile
        self.save_to_log_dir, self.already_saved = save_to_log_dir, False
        if not save_to_log_dir and not is_overridden("save_config", self, SaveConfigCallback):
            raise ValueError(
                f"{type(self).__name__}(save_to_log_dir=False) would save nothing: override save_config in a subclass, "
                "or turn saving off by LightningCLI(save_config_callback=None)"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, the first time that a run of this process begins."""
        if self.already_saved:
            return
        if self.save_to_log_dir:
            self._write(trainer)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True

    def _write(self, trainer: Trainer) -> None:
        folder = trainer.log_dir
        assert folder is not None
        path = os.path.join(folder, self.config_filename)
        exists = trainer.is_global_zero and files.exists(path)
        if trainer.strategy.broadcast(exists) and not self.overwrite:
            raise RuntimeError(
                f"{path} is there already, from an earlier run, and is not overwritten; delete it, log to another "
                'folder, or give LightningCLI(save_config_kwargs={"overwrite": True}), or save_config_callback=None '
                "to save no configuration"
            )
        if trainer.is_global_zero:
            files.make_folder(folder)
            self.parser.save(self.config, path, skip_unset=False, overwrite=self.overwrite, multifile=self.multifile)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Override to save `self.config` somewhere else too, as in a logger. Called on rank zero only.

        `self.parser.dump(self.config, skip_unset=False)` is its text.

        Args:
            trainer: The trainer, of whose collective calls none may be made here: the other ranks do not take part.
            pl_module: The module.
            stage: "fit", "validate", "test" or "predict".
        """
