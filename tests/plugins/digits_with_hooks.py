"""How well the digits example does with each communication hook, on CPU ranks; `test_comm_hooks.py` runs a part.

python tests/plugins/digits_with_hooks.py --epochs 20 --devices 2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
    fp16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

import lightlite as pl
from lightlite.plugins.ddp import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "examples"))
from digits import ConvNet, Digits


def power(**options: Any) -> dict[str, Any]:
    state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=10, **options)
    return {"ddp_comm_state": state, "ddp_comm_hook": powerSGD_hook}


def hooks() -> dict[str, dict[str, Any]]:
    """Arguments of DDPStrategy, by what they are called."""
    local = PostLocalSGDState(None, None, start_localSGD_iter=50, post_local_gradient_allreduce=False)
    return {
        "no hook": {},
        "fp16": {"ddp_comm_hook": fp16_compress_hook},
        "bf16": {"ddp_comm_hook": bf16_compress_hook},
        "PowerSGD": power(),
        "PowerSGD within fp16": {**power(), "ddp_comm_wrapper": fp16_compress_wrapper},
        "local SGD, every 4 steps": {
            "ddp_comm_state": local,
            "ddp_comm_hook": post_localSGD_hook,
            "model_averaging_period": 4,
        },
    }


def accuracy(options: dict[str, Any], epochs: int, devices: int) -> float:
    """The share of the test images that is told right after training."""
    pl.seed_everything(0)
    data = Digits(64, seed=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(**options),
        max_epochs=epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = ConvNet()
    model.on_train_epoch_end = lambda: None  # type: ignore[method-assign]
    trainer.fit(model, datamodule=data)
    return float(trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=2)
    args = parser.parse_args()
    for name, options in hooks().items():
        started = time.monotonic()
        reached = accuracy(options, args.epochs, args.devices)
        sys.stdout.write(f"{name:26s} {reached:.2%}   {time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()
