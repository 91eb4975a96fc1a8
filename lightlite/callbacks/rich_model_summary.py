"""Shows what the module consists of, by rich."""

from __future__ import annotations

from typing import Any

from lightlite.callbacks.model_summary import ModelSummary
from lightlite.callbacks.progress.rich_progress import require_rich
from lightlite.utilities.model_summary import format_totals

_NUMBERS = ("Params", "FLOPs", "In sizes", "Out sizes")


class RichModelSummary(ModelSummary):
    """Shows a table of the module's submodules by rich, as a fit begins.

    Args:
        max_depth: How many levels of submodules to list: 1 for the module's own, -1 for all, 0 for no table at all.
        summarize_kwargs: `header_style`, rich's style of the titles ("bold magenta").

    Raises:
        ModuleNotFoundError: Without rich.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        require_rich("RichModelSummary")
        super().__init__(max_depth, **summarize_kwargs)

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
        """Show a summary; see `ModelSummary.summarize`."""
        import rich
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style=summarize_kwargs.get("header_style", "bold magenta"))
        for title, _ in summary_data:
            table.add_column(
                title,
                style="dim" if title == " " else "",
                justify="right" if title in _NUMBERS else "left",
                no_wrap=title == "Name",
            )
        for row in zip(*(cells for _, cells in summary_data), strict=True):
            table.add_row(*map(Text, row))
        totals = format_totals(total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
        console = rich.get_console()
        console.print(table)
        for number, label in totals:
            console.print(Text.assemble((label, "bold"), f": {number}"))
