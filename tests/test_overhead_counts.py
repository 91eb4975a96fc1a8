"""What a training step may cost, in things that can be counted exactly: calls into lightlite, values read back."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightlite as pl
from lightlite import callbacks
from lightlite.entries import FOLD_EVERY, Entry, Place

PACKAGE = str(Path(pl.__file__).parent)
BARE: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Window:
    """What is watched between the training steps with index `first` and `last`."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def at(self, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.open()
        elif batch_idx == self.last:
            self.close()

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class CallsIntoLightlite(Window):
    """Python functions of lightlite that were called, by file and name."""

    def open(self) -> None:
        self.calls: Counter[str] = Counter()
        sys.setprofile(self._note)

    def close(self) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls[f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_code.co_name}"] += 1


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__format__")


class ValuesReadBack(Window):
    """Reads of a tensor's value into Python, by name; on a GPU each of them waits for the device."""

    def open(self) -> None:
        self.reads: Counter[str] = Counter()
        reads = self.reads

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = getattr(func, "__name__", "")
                if name in READS:
                    reads[name] += 1
                return func(*args, **(kwargs or {}))

        self._watch = Watch()
        self._watch.__enter__()

    def close(self) -> None:
        self._watch.__exit__(None, None, None)


WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "repeat_interleave")


class Waits(ValuesReadBack):
    """The same, and operators that need a value on the host, wherever they are called from: torch's own code too."""

    def open(self) -> None:
        super().open()
        reads = self.reads

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func.overloadpacket.__name__
                if name in WAITS:
                    reads[f"aten::{name}"] += 1
                return func(*args, **(kwargs or {}))

        self._operators = Operators()
        self._operators.__enter__()

    def close(self) -> None:
        self._operators.__exit__(None, None, None)
        super().close()


class Net(pl.LightningModule):
    def __init__(self, window: Window, **log: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)
        self.window = window
        self.log_options = log

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.window.at(batch_idx)
        x, y = batch
        loss = F.cross_entropy(self.layer(x), y)
        if self.log_options:
            self.log("loss", loss, **self.log_options)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 32), torch.randint(2, (8,))) for _ in range(count)]


@pytest.mark.parametrize(("log", "most"), [({}, 10), ({"on_step": True}, 12)], ids=["bare", "one log"])
def test_a_training_step_makes_few_python_calls_into_lightlite(log: dict[str, Any], most: int) -> None:
    window = CallsIntoLightlite(10, 20)
    pl.Trainer(**BARE).fit(Net(window, **log), batches(30))

    per_step = {name: count / 10 for name, count in window.calls.items()}
    assert sum(per_step.values()) <= most, per_step


@pytest.mark.parametrize(
    "log", [{"on_step": True}, {"on_epoch": True}, {"on_step": True, "on_epoch": True, "prog_bar": True}]
)
def test_no_value_is_read_back_from_a_tensor_between_two_log_points(log: dict[str, Any]) -> None:
    window = ValuesReadBack(11, 18)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, log_every_n_steps=10, enable_progress_bar=False)
    trainer.fit(Net(window, **log), batches(30))

    assert window.reads == {}


FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a progress bar": {"enable_progress_bar": True},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 2},
    "bfloat16": {"precision": "bf16-mixed"},
    "averaged weights": {"callbacks": [callbacks.WeightAveraging(use_buffers=True)]},
    "stochastic weight averaging": {"callbacks": [callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
    "a checkpoint that is not due": {"callbacks": [callbacks.ModelCheckpoint(monitor="loss", every_n_train_steps=50)]},
    "early stopping": {"callbacks": [callbacks.EarlyStopping("loss", check_on_train_epoch_end=True)]},
    "learning rates": {"callbacks": [callbacks.LearningRateMonitor("step")]},
    "a timer": {"callbacks": [callbacks.Timer(interval="step", duration={"hours": 1})]},
    "throughput": {"callbacks": [callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]))]},
    "an average of weights alone": {"callbacks": [callbacks.WeightAveraging(use_buffers=False)]},
}


@pytest.mark.filterwarnings("ignore:.*has no flops_per_batch")
@pytest.mark.parametrize("feature", FEATURES)
def test_no_feature_waits_for_the_device_between_two_log_points(feature: str) -> None:
    window = Waits(11, 18)
    settings = {"enable_progress_bar": False, "log_every_n_steps": 10, **FEATURES[feature]}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, **settings)
    trainer.fit(Net(window, on_step=True, on_epoch=True, prog_bar=True), batches(30))

    assert window.reads == {}


def test_an_evaluation_waits_for_the_device_at_its_end_only() -> None:
    class Tested(Net):
        def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.window.at(batch_idx)
            self.log("loss", F.cross_entropy(self.layer(batch[0]), batch[1]), on_step=True, on_epoch=True)

    window = Waits(1, 8)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.test(Tested(window), batches(10), verbose=False)

    assert window.reads == {}


def test_values_are_put_together_without_a_copy_to_or_from_the_device() -> None:
    copies: list[str] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = [value for value in args if isinstance(value, Tensor)]
            if given and isinstance(result, Tensor) and result.device not in {value.device for value in given}:
                copies.append(func.overloadpacket.__name__)
            return result

    place = Place("training_step", "loss", None, False)
    entry = Entry(place, (), False, True, False, True, "mean", False)
    with Copies():
        for step in range(FOLD_EVERY):
            entry.add(torch.ones((), device="meta"), 8.0 if step % 10 else 5.0)
        assert entry.values == []
        assert copies == []
        torch.ones(2).to("meta")
        assert copies == ["_to_copy"]


@pytest.mark.parametrize(
    "read", [lambda x: torch.equal(x, x), lambda x: x[x > 0], lambda x: F.relu(x).item(), torch.nonzero]
)
def test_the_watch_for_waits_sees_one(read: Callable[[Tensor], Any]) -> None:
    window = Waits(0, 1)
    window.at(0)
    read(torch.ones(()))
    window.at(1)

    assert window.reads.total() >= 1


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, bool, float, int, "{:.1f}".format, math.isfinite]
)
def test_the_watch_for_values_read_back_sees_one(read: Callable[[Tensor], Any]) -> None:
    window = ValuesReadBack(0, 1)
    window.at(0)
    read(torch.ones(()))
    window.at(1)

    assert window.reads.total() >= 1
