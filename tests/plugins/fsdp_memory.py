"""How much memory each of two ranks holds in a fit with ddp and with fsdp: `python tests/plugins/fsdp_memory.py`.

Of a module of `--layers` blocks of `--width` squared parameters, configured on device "meta" for fsdp, with AdamW: the
bytes of parameters and optimizer states that a rank holds, and by how much the process has grown, at rest after the
last step and at most. Large blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_), so that what is measured is
what is needed, and not what the allocator keeps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lightlite as pl


class Wide(pl.LightningModule):
    """Blocks one after the other."""

    def __init__(self, width: int, layers: int, device: str) -> None:
        super().__init__()
        self.width, self.layers, self.on = width, layers, device
        self.blocks: nn.ModuleList | None = None

    def configure_model(self) -> None:
        with torch.device(self.on):
            self.blocks = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(self.layers))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.blocks is not None
        for block in self.blocks:
            batch = batch + torch.tanh(block(batch))
        return batch.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_fit_start(self) -> None:
        gc.collect()

    def on_train_end(self) -> None:
        tensors = [*self.parameters()]
        tensors += [value for state in self.trainer.optimizers[0].state.values() for value in state.values()]
        held = sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in tensors)
        self.zero_grad()
        gc.collect()
        resident = psutil.Process().memory_info().rss
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {"held": held, "resident": resident - self.before, "most": most - self.before}
        Path(f"report{self.global_rank}").write_text(json.dumps(report))

    before = 0


def measure(strategy: str, width: int, layers: int) -> None:
    """One rank's part, started by the launcher."""
    made: Any = strategy
    if strategy == "fsdp":
        from lightlite.strategies import FSDPStrategy

        made = FSDPStrategy(state_dict_type="sharded")
    module = Wide(width, layers, "meta" if strategy == "fsdp" else "cpu")
    trainer = pl.Trainer(
        accelerator="cpu", strategy=made, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    Wide.before = psutil.Process().memory_info().rss
    trainer.fit(module, [torch.ones(4, width)] * 6)


def compare(width: int, layers: int) -> dict[str, list[dict[str, int]]]:
    """What each rank reports, by strategy."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "lightlite.launch", "--devices", "2", "--accelerator", "cpu"]
            arguments = [__file__, "--rank-of", strategy, "--width", str(width), "--layers", str(layers)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([*command, *arguments], cwd=folder, check=True, env=environment, **quiet)
            found[strategy] = [json.loads((Path(folder) / f"report{rank}").read_text()) for rank in range(2)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank-of")
    given = parser.parse_args()
    if given.rank_of:
        measure(given.rank_of, given.width, given.layers)
        return
    found = compare(given.width, given.layers)
    for name in ("held", "resident", "most"):
        ddp, fsdp = (max(report[name] for report in found[strategy]) for strategy in ("ddp", "fsdp"))
        print(f"{name}: ddp {ddp / 2**20:.0f} MiB, fsdp {fsdp / 2**20:.0f} MiB, {fsdp / ddp:.2f} of it")  # noqa: T201


if __name__ == "__main__":
    main()
