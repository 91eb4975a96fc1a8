"""Shows what the module consists of, as a fit begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightlite.callbacks.callback import Callback
from lightlite.utilities.model_summary import ModelSummary as Summary
from lightlite.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class ModelSummary(Callback):
    """Shows a table of the module's submodules, by the logger "lightlite", as a fit begins.

    Args:
        max_depth: How many levels of submodules to list: 1 for the module's own, -1 for all, 0 for no table at all.
    """

    def __init__(self, max_depth: int = 1) -> None:
        self._max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table, on rank zero."""
        if self._max_depth and trainer.is_global_zero:
            self.show(Summary(pl_module, self._max_depth))

    def show(self, summary: Summary) -> None:
        """Show a summary; override it to show it elsewhere.

        Args:
            summary: `str()` of it is the table.
        """
        rank_zero_info(f"\n{summary}")
