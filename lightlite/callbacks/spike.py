"""Stop where the loss leaps."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightlite.callbacks.callback import Callback, StepOutput
from lightlite.errors import MisconfigurationException
from lightlite.utilities import files

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class TrainingSpikeException(RuntimeError):
    """The loss leapt.

    Attributes:
        batch_idx: The batch that it did in.
    """

    def __init__(self, batch_idx: int, *args: Any) -> None:
        super().__init__(f"Training spike detected in batch {batch_idx}", *args)
        self.batch_idx = batch_idx

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.batch_idx,))


class SpikeDetection(Callback):
    """Ends the fit with a TrainingSpikeException where the loss of a batch leaps away from its running mean.

    The batch, and the one before it, which may have spoilt the weights, are written to a file as a JSON list, for who
    starts anew without them. With several ranks, a leap on one of them ends the fit on all. It reads the loss, and asks
    the other ranks, after every batch.

    Args:
        mode: "min" (default) where a lower loss is better; else "max".
        window: How many batches the running mean is of; default 10.
        warmup: Index of the first batch of an epoch that is looked at; default 1.
        atol: A leap is at least this far from the mean; None for any.
        rtol: A leap is at least this many times the mean away from it; None for any. Default 2.0.
        exclude_batches_path: The file, or its folder; by default "skip_batches.json" in the trainer's root folder.
        finite_only: Whether a loss that is not finite is a leap (default); if not, it is passed over.

    Raises:
        MisconfigurationException: For another mode, and a window below 1.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"SpikeDetection(mode={mode!r}); give 'min' or 'max'")
        if window < 1:
            raise MisconfigurationException(f"SpikeDetection(window={window!r}); give an int >= 1")
        self.mode, self.warmup, self.atol, self.rtol = mode, warmup, atol, rtol
        self.exclude_batches_path = exclude_batches_path
        self.finite_only = finite_only
        self.last_val = 0.0
        self.bad_batches: list[int] = []
        self._recent: deque[float] = deque(maxlen=window)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle on the file."""
        path = os.fspath(self.exclude_batches_path or trainer.default_root_dir)
        self.exclude_batches_path = path if path.endswith(".json") else os.path.join(path, "skip_batches.json")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss.

        Raises:
            TrainingSpikeException: For a leap on any rank.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        absent = batch is None and loss is None  # this rank has no part in a stream's last global batch
        if absent:
            loss = torch.tensor(math.nan)
        if not isinstance(loss, torch.Tensor):
            raise MisconfigurationException(
                f"SpikeDetection found no loss in what training_step returned, {outputs!r}; return the loss as a "
                "tensor, or under 'loss'"
            )
        value = float(loss)
        leaps = not absent and batch_idx >= self.warmup and self._leaps(value)
        if trainer.strategy.reduce_boolean_decision(leaps, all=False):
            self._note(trainer, batch_idx)
            raise TrainingSpikeException(batch_idx)
        if math.isfinite(value):
            self._recent.append(value)
            self.last_val = value

    def _leaps(self, value: float) -> bool:
        if not math.isfinite(value):
            return self.finite_only
        better = value <= self.last_val if self.mode == "min" else value >= self.last_val
        if better or not self._recent:
            return False
        mean = sum(self._recent) / len(self._recent)
        distance = abs(value - mean)
        return (self.atol is None or distance >= abs(self.atol)) and (
            self.rtol is None or distance >= abs(self.rtol * mean)
        )

    def _note(self, trainer: Trainer, batch_idx: int) -> None:
        self.bad_batches += [batch_idx - 1, batch_idx]
        if trainer.is_global_zero:
            path = str(self.exclude_batches_path)
            files.make_folder(os.path.dirname(path) or ".")
            files.write_text(path, json.dumps(self.bad_batches, indent=4))

    def state_dict(self) -> dict[str, Any]:
        """The settings, the batches noted, and the losses that the mean is of."""
        return {
            "last_val": self.last_val,
            "mode": self.mode,
            "warmup": self.warmup,
            "atol": self.atol,
            "rtol": self.rtol,
            "bad_batches": self.bad_batches,
            "bad_batches_path": self.exclude_batches_path,
            "recent": list(self._recent),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned; Lightning's has no losses that could be read."""
        for name in ("last_val", "mode", "warmup", "atol", "rtol", "bad_batches"):
            setattr(self, name, state_dict[name])
        self.exclude_batches_path = state_dict["bad_batches_path"]
        self._recent.extend(state_dict.get("recent", []))
