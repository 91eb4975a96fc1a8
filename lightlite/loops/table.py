"""The table that `validate` and `test` print."""

from __future__ import annotations

import shutil
import sys


def print_metrics(per_loader: list[dict[str, float]], stage: str) -> None:
    """Print the values of each loader, a row for a name and a column for a loader.

    Args:
        per_loader: For each loader, value by key.
        stage: Heads the table: "validate" or "test".
    """
    names = list(dict.fromkeys(key.partition("/dataloader_idx_")[0] for metrics in per_loader for key in metrics))
    if not names:
        return
    columns = [[_value(metrics, name, index) for name in names] for index, metrics in enumerate(per_loader)]
    heads = [f"loader {index}" for index in range(len(per_loader))] if len(per_loader) > 1 else ["value"]
    widths = [max(map(len, [head, *cells])) for head, cells in zip(heads, columns, strict=True)]
    left = max(len(stage), *map(len, names))
    rows = ["  ".join([stage.ljust(left), *(head.rjust(width) for head, width in zip(heads, widths, strict=True))])]
    rows.append("-" * len(rows[0]))
    for row, name in enumerate(names):
        cells = (cells[row].rjust(width) for cells, width in zip(columns, widths, strict=True))
        rows.append("  ".join([name.ljust(left), *cells]))
    limit = shutil.get_terminal_size().columns
    sys.stdout.write("\n".join(row if len(row) <= limit else row.rstrip() for row in rows) + "\n")
    sys.stdout.flush()


def _value(metrics: dict[str, float], name: str, index: int) -> str:
    value = metrics.get(name, metrics.get(f"{name}/dataloader_idx_{index}"))
    return "" if value is None else f"{value:.6g}"
