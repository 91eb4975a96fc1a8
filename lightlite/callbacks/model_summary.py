"""Shows what the module consists of, as a fit begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightlite.callbacks.callback import Callback
from lightlite.utilities.model_summary import ModelSummary as Summary
from lightlite.utilities.model_summary import format_table, format_totals
from lightlite.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class ModelSummary(Callback):
    """Shows a table of the module's submodules, by the logger "lightlite", as a fit begins.

    Args:
        max_depth: How many levels of submodules to list: 1 for the module's own, -1 for all, 0 for no table at all.
        summarize_kwargs: Handed to `summarize`, which a subclass may override.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table, on rank zero."""
        if not self._max_depth or not (trainer.is_global_zero or trainer.strategy.spreads):
            return
        summary = Summary(pl_module, self._max_depth)  # which runs the module, where there is an example
        if not trainer.is_global_zero:
            return
        self.summarize(
            list(summary.columns().items()),
            summary.total_parameters,
            summary.trainable_parameters,
            summary.model_size,
            summary.total_training_modes,
            total_flops=summary.total_flops,
            **self._summarize_kwargs,
        )

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Show a summary; override it to show it elsewhere.

        Args:
            summary_data: The table's columns: title and cells.
            total_parameters: How many numbers all parameters are.
            trainable_parameters: Those that are trained.
            model_size: The parameters' size in MB.
            total_training_modes: How many submodules are in "train" and in "eval" mode.
            total_flops: Floating-point operations of a forward of the example; 0 without an example.
            summarize_kwargs: What the callback was given.
        """
        totals = format_totals(total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
        rank_zero_info(f"\n{format_table(dict(summary_data), totals)}")
