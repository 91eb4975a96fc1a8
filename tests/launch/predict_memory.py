"""What predicting many rows costs in resident memory, rank by rank.

    python tests/launch/predict_memory.py --rows 1000000 --columns 256 --ranks 2

The rows are made batch by batch, so the outputs are all that there is to hold: rows x columns x 4 bytes, of which
each rank's own share is its part. Printed is how rank 0's resident memory grows: to the highest point within the
call (`peak`, looked at in every batch and after collecting), to its end (`after`), and once every row has been read
(`read`). `private` is the part of `after` that no file stands behind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightlite as pl


class Rows(Dataset[Tensor]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(indices, dtype=torch.float32)]


def first(batches: list[Tensor]) -> Tensor:
    return batches[0]


class Widens(pl.LightningModule):
    """Predicts, for each row, `columns` times its number; watches this process's memory."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.peak = columns, 0

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.peak = max(self.peak, resident())
        return batch[:, None].expand(-1, self.columns).contiguous()


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def private() -> int:
    """Bytes of anonymous memory."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def measure(rows: int, columns: int, ranks: int, batch_size: int, folder: Path) -> dict[str, float]:
    """Predict once for practice and once for the record.

    Returns:
        "peak", "after", "private" and "read": growth on rank 0, in bytes; "outputs": size of all outputs, in bytes;
        "seconds" that the call took.
    """
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.predict(Widens(columns), loader(2 * ranks * batch_size, batch_size))
    module = Widens(columns)
    before, own, began = resident(), private(), time.monotonic()
    predictions: Any = trainer.predict(module, loader(rows, batch_size))
    seconds = time.monotonic() - began
    after, own_after = resident(), private()
    total = sum(float(output[:, -1].double().sum()) for output in predictions)
    assert sum(len(output) for output in predictions) == rows
    assert total == rows * (rows - 1) / 2 or rows > 2**24
    read = resident()
    trainer.close()
    return {
        "peak": max(module.peak, after) - before,
        "after": after - before,
        "private": own_after - own,
        "read": read - before,
        "outputs": rows * columns * 4,
        "seconds": seconds,
    }


def loader(rows: int, batch_size: int) -> DataLoader[Tensor]:
    return DataLoader(Rows(rows), batch_size=batch_size, collate_fn=first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.rows, arguments.columns, arguments.ranks, arguments.batch_size, Path(folder))
    seconds = figures.pop("seconds")
    megabytes = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in figures.items())
    sys.stdout.write(f"{arguments.rows} rows on {arguments.ranks} ranks in {seconds:.1f} s: {megabytes}\n")


if __name__ == "__main__":
    main()
