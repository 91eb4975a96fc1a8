"""Every hook fires in Lightning 2.x's documented order: one golden list per entry point."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint

from .models import TRAINING_ALONE, ManyLoadersNet, Net, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)

STAGES = ("fit", "validate", "test", "predict")
PHASES = ("train", "validation", "test", "predict")
PARTS = ("", "_epoch", "_batch")
LOOP_HOOKS = [f"on_{phase}{part}_{end}" for phase in PHASES for part in PARTS for end in ("start", "end")]
SHARED_HOOKS = [
    "on_fit_start",
    "on_fit_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "setup",
    "teardown",
    *LOOP_HOOKS,
]
LOADER_HOOKS = ["train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"]
TRANSFER_HOOKS = ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]
CALLBACK_HOOKS = [*SHARED_HOOKS, "on_sanity_check_start", "on_sanity_check_end", "state_dict", "load_state_dict"]
DATAMODULE_HOOKS = ["prepare_data", "setup", "teardown", "state_dict", *LOADER_HOOKS]
MODULE_HOOKS = [
    *SHARED_HOOKS,
    *TRANSFER_HOOKS,
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "configure_model",
    "configure_optimizers",
    "lr_scheduler_step",
    "on_predict_model_eval",
    "on_test_model_eval",
    "on_test_model_train",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_validation_model_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
    "predict_step",
    "prepare_data",
    "test_step",
    "training_step",
    "validation_step",
]


def observed(base: type, who: str, hooks: list[str], observe: Callable[..., None]) -> Any:
    """A subclass of `base` in which each of `hooks` calls `observe("who.hook", instance, arguments)` and goes on."""

    def override(name: str) -> Callable[..., Any]:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            observe(f"{who}.{name}", self, {**dict(zip(parameters, args, strict=False)), **kwargs})
            return getattr(super(subclass, self), name)(*args, **kwargs)

        signature = inspect.signature(getattr(base, name))
        parameters = list(signature.parameters)[1:]
        hook.__name__, hook.__signature__ = name, signature  # type: ignore[attr-defined]
        return hook

    subclass = type(f"Observed{base.__name__}", (base,), {name: override(name) for name in hooks})
    return subclass


class Data(pl.LightningDataModule):
    """Four training batches, one batch for everything else."""

    def train_dataloader(self) -> Any:
        return regression_loader(4)

    def val_dataloader(self) -> Any:
        return regression_loader(1)

    def test_dataloader(self) -> Any:
        return regression_loader(1)

    def predict_dataloader(self) -> Any:
        return regression_loader(1)


class NetWithScheduler(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class AdversarialNet(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.2)]


class Recording:
    """An observed module, callback and datamodule, and the `events` they were called with, in one list."""

    def __init__(self, module_type: type = NetWithScheduler) -> None:
        self.events: list[str] = []
        self.module = observed(module_type, "module", MODULE_HOOKS, self._observe)()
        self.callback = observed(pl.Callback, "callback", CALLBACK_HOOKS, self._observe)()
        self.data = observed(Data, "datamodule", DATAMODULE_HOOKS, self._observe)()

    def _observe(self, event: str, owner: Any, arguments: dict[str, Any]) -> None:
        stages = [name for name in STAGES if arguments.get("stage") == name]
        self.events.append(f"{event}({stages[0]})" if stages else event)

    def run(self, entry_point: str, folder: Path, ckpt_path: Any = None, **settings: Any) -> list[str]:
        callbacks = [self.callback, *settings.pop("callbacks", [])]
        trainer = quiet_trainer(folder, callbacks=callbacks, **settings)
        getattr(trainer, entry_point)(self.module, datamodule=self.data, ckpt_path=ckpt_path)
        return self.events


def both(*hooks: str) -> list[str]:
    """Each hook, of the callbacks first and of the module then."""
    return [f"{who}.{hook}" for hook in hooks for who in ("callback", "module")]


def prologue(stage: str) -> list[str]:
    return [
        "module.configure_callbacks",
        "datamodule.prepare_data",
        "module.prepare_data",
        f"datamodule.setup({stage})",
        f"callback.setup({stage})",
        f"module.setup({stage})",
        "module.configure_model",
    ]


def epilogue(stage: str) -> list[str]:
    return [f"datamodule.teardown({stage})", f"callback.teardown({stage})", f"module.teardown({stage})"]


TRANSFER = [f"module.{hook}" for hook in TRANSFER_HOOKS]
FORWARD = ["module.training_step"]
ZERO_GRAD = [*both("on_before_zero_grad"), "module.optimizer_zero_grad"]
BACKWARD = [*both("on_before_backward"), "module.backward", *both("on_after_backward")]
BEFORE_STEP = [*both("on_before_optimizer_step"), "module.configure_gradient_clipping"]
SCHEDULER = ["module.lr_scheduler_step"]


def train_batch(*inside: list[str]) -> list[str]:
    return [*TRANSFER, *both("on_train_batch_start"), *itertools.chain(*inside), *both("on_train_batch_end")]


STEP = [["module.optimizer_step"], FORWARD, ZERO_GRAD, BACKWARD, BEFORE_STEP]
TRAIN_BATCH = train_batch(*STEP)
LAST_TRAIN_BATCH = train_batch(*STEP, SCHEDULER)


def evaluation(phase: str) -> list[str]:
    """An evaluation of one batch, without the change of modes."""
    return [
        *both(f"on_{phase}_start", f"on_{phase}_epoch_start"),
        *TRANSFER,
        *both(f"on_{phase}_batch_start"),
        f"module.{phase}_step",
        *both(f"on_{phase}_batch_end", f"on_{phase}_epoch_end", f"on_{phase}_end"),
    ]


SANITY_VALIDATION = [
    "callback.on_sanity_check_start",
    "datamodule.val_dataloader",
    "module.on_validation_model_eval",
    *evaluation("validation"),
    "module.on_validation_model_train",
    "callback.on_sanity_check_end",
]
VALIDATION = [
    "module.on_validation_model_zero_grad",
    "module.on_validation_model_eval",
    *evaluation("validation"),
    "module.on_validation_model_train",
]


def test_fit_with_sanity_validation_over_two_epochs(tmp_path: Path) -> None:
    events = Recording().run(
        "fit", tmp_path, max_epochs=2, limit_train_batches=2, num_sanity_val_steps=1, gradient_clip_val=1.0
    )
    epoch = [
        *both("on_train_epoch_start"),
        *TRAIN_BATCH,
        *LAST_TRAIN_BATCH,
        *VALIDATION,
        *both("on_train_epoch_end"),
    ]
    assert events == [
        *prologue("fit"),
        "module.configure_optimizers",
        *both("on_fit_start"),
        *SANITY_VALIDATION,
        "datamodule.train_dataloader",
        *both("on_train_start"),
        *epoch,
        *epoch,
        *both("on_train_end", "on_fit_end"),
        *epilogue("fit"),
    ]


def test_fit_that_accumulates_two_batches_over_three(tmp_path: Path) -> None:
    events = Recording().run("fit", tmp_path, limit_train_batches=3, accumulate_grad_batches=2, limit_val_batches=0)
    assert events == [
        *prologue("fit"),
        "module.configure_optimizers",
        *both("on_fit_start"),
        "datamodule.train_dataloader",
        *both("on_train_start", "on_train_epoch_start"),
        *train_batch(FORWARD, ZERO_GRAD, BACKWARD),
        *train_batch(["module.optimizer_step"], FORWARD, BACKWARD, BEFORE_STEP),
        *train_batch(["module.optimizer_step"], FORWARD, ZERO_GRAD, BACKWARD, BEFORE_STEP, SCHEDULER),
        *both("on_train_epoch_end", "on_train_end", "on_fit_end"),
        *epilogue("fit"),
    ]


def test_fit_that_validates_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    events = Recording().run("fit", tmp_path, val_check_interval=0.5)
    assert events == [
        *prologue("fit"),
        "module.configure_optimizers",
        *both("on_fit_start"),
        "datamodule.train_dataloader",
        "datamodule.val_dataloader",
        *both("on_train_start", "on_train_epoch_start"),
        *TRAIN_BATCH,
        *TRAIN_BATCH,
        *VALIDATION,
        *TRAIN_BATCH,
        *LAST_TRAIN_BATCH,
        *VALIDATION,
        *both("on_train_epoch_end", "on_train_end", "on_fit_end"),
        *epilogue("fit"),
    ]


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    events = Recording(AdversarialNet).run("fit", tmp_path, limit_train_batches=1, limit_val_batches=0)
    one_optimizer = [*BACKWARD, *both("on_before_optimizer_step")]
    assert events == [
        *prologue("fit"),
        "module.configure_optimizers",
        *both("on_fit_start"),
        "datamodule.train_dataloader",
        *both("on_train_start", "on_train_epoch_start"),
        *train_batch(FORWARD, one_optimizer, one_optimizer),
        *both("on_train_epoch_end", "on_train_end", "on_fit_end"),
        *epilogue("fit"),
    ]


@pytest.mark.parametrize(("entry_point", "phase"), [("validate", "validation"), ("test", "test")])
def test_evaluation_alone(tmp_path: Path, entry_point: str, phase: str) -> None:
    events = Recording().run(entry_point, tmp_path)
    assert events == [
        *prologue(entry_point),
        f"datamodule.{'val' if entry_point == 'validate' else 'test'}_dataloader",
        f"module.on_{phase}_model_eval",
        *evaluation(phase),
        f"module.on_{phase}_model_train",
        *epilogue(entry_point),
    ]


def test_predict(tmp_path: Path) -> None:
    assert Recording().run("predict", tmp_path) == [
        *prologue("predict"),
        "datamodule.predict_dataloader",
        "module.on_predict_model_eval",
        *evaluation("predict"),
        *epilogue("predict"),
    ]


def test_saving_and_loading_a_checkpoint(tmp_path: Path) -> None:
    settings = {"limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": True}
    first = Recording()
    saved = first.run("fit", tmp_path, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="end")], **settings)
    names = ("state_dict", "on_save_checkpoint", "on_train_epoch_end", "on_train_end")
    assert [event for event in saved if event.partition(".")[2] in names] == [
        *both("on_train_epoch_end"),
        "callback.state_dict",
        "datamodule.state_dict",
        *both("on_save_checkpoint"),
        *both("on_train_end"),
    ]
    second = Recording()
    loaded = second.run("fit", tmp_path, ckpt_path=tmp_path / "end.ckpt", max_epochs=2, **settings)
    start = loaded.index("module.configure_model")
    assert loaded[start : start + 7] == [
        "module.configure_model",
        "module.on_load_checkpoint",
        "callback.on_load_checkpoint",
        "module.configure_optimizers",
        *both("on_fit_start"),
        "datamodule.train_dataloader",
    ]


def test_a_datamodule_that_overrides_the_transfer_of_batches_goes_before_the_module(tmp_path: Path) -> None:
    recording = Recording()
    recording.data = observed(Data, "datamodule", TRANSFER_HOOKS, recording._observe)()
    events = recording.run("predict", tmp_path)
    transfers = [event for event in events if event.partition(".")[2] in TRANSFER_HOOKS]
    assert transfers == [f"datamodule.{hook}" for hook in TRANSFER_HOOKS]


def test_callbacks_run_in_their_order_and_those_of_the_module_come_after(tmp_path: Path) -> None:
    order: list[str] = []

    class Named(pl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        @property
        def state_key(self) -> str:
            return self.name

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            order.append(self.name)

    class ModuleCallback(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            order.append("module's")

    class NetWithCallback(Net):
        def configure_callbacks(self) -> Any:
            return ModuleCallback()

    trainer = quiet_trainer(tmp_path, callbacks=[Named("first"), Named("second")])
    trainer.fit(NetWithCallback(), regression_loader(1))
    assert order == ["first", "second", "module's"]


def test_a_callback_of_the_module_replaces_the_trainers_of_the_same_type(tmp_path: Path) -> None:
    started: list[str] = []

    class Named(pl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            started.append(self.name)

    class NetWithCallback(Net):
        def configure_callbacks(self) -> Any:
            return [Named("module's")]

    quiet_trainer(tmp_path, callbacks=[Named("trainer's")]).fit(NetWithCallback(), regression_loader(1))
    assert started == ["module's"]


def test_checkpoint_callbacks_run_last(tmp_path: Path) -> None:
    class Other(pl.Callback):
        pass

    trainer = quiet_trainer(tmp_path, callbacks=[ModelCheckpoint(dirpath=tmp_path), Other()], enable_checkpointing=True)
    assert [type(callback).__name__ for callback in trainer.callbacks][-1] == "ModelCheckpoint"


@pytest.mark.parametrize("failing", ["training_step", "on_train_batch_end", "validation_step"])
def test_an_exception_reaches_on_exception_and_the_caller_unchanged(tmp_path: Path, failing: str) -> None:
    seen: list[BaseException] = []

    class Boom(Exception):
        pass

    class Observer(pl.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append(exception)

    def explode(self: Any, *args: Any) -> None:
        raise Boom(failing)

    module = type("Failing", (Net,), {failing: explode})()
    with pytest.raises(Boom, match=failing) as caught:
        quiet_trainer(tmp_path, callbacks=[Observer()]).fit(module, regression_loader(1), regression_loader(1))
    assert seen == [caught.value]


class Counters:
    """`rows` of (hook, current_epoch, global_step, batch_idx or None) for the callback's or the module's hooks."""

    def __init__(self, hooks: list[str]) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.callback = observed(pl.Callback, "callback", hooks, self._observe)()

    def _observe(self, event: str, owner: Any, arguments: dict[str, Any]) -> None:
        trainer = arguments["trainer"]
        assert arguments["pl_module"].current_epoch == trainer.current_epoch
        assert arguments["pl_module"].global_step == trainer.global_step
        name = event.partition(".")[2]
        self.rows.append((name, trainer.current_epoch, trainer.global_step, arguments.get("batch_idx")))


def test_counters_at_every_hook_of_a_fit(tmp_path: Path) -> None:
    hooks = [hook for hook in LOOP_HOOKS if "train" in hook or "validation" in hook]
    counters = Counters([*hooks, "on_fit_start", "on_before_optimizer_step", "on_fit_end"])
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[counters.callback])
    trainer.fit(Net(), regression_loader(2), regression_loader(1))

    def epoch(number: int, before: int) -> list[tuple[Any, ...]]:
        after = before + 2
        return [
            ("on_train_epoch_start", number, before, None),
            ("on_train_batch_start", number, before, 0),
            ("on_before_optimizer_step", number, before, None),
            ("on_train_batch_end", number, before + 1, 0),
            ("on_train_batch_start", number, before + 1, 1),
            ("on_before_optimizer_step", number, before + 1, None),
            ("on_train_batch_end", number, after, 1),
            ("on_validation_start", number, after, None),
            ("on_validation_epoch_start", number, after, None),
            ("on_validation_batch_start", number, after, 0),
            ("on_validation_batch_end", number, after, 0),
            ("on_validation_epoch_end", number, after, None),
            ("on_validation_end", number, after, None),
            ("on_train_epoch_end", number, after, None),
        ]

    assert counters.rows == [
        ("on_fit_start", 0, 0, None),
        ("on_train_start", 0, 0, None),
        *epoch(0, 0),
        *epoch(1, 2),
        ("on_train_end", 2, 4, None),
        ("on_fit_end", 2, 4, None),
    ]
    assert (trainer.current_epoch, trainer.global_step) == (2, 4)


def test_global_step_counts_optimizer_steps_not_batches(tmp_path: Path) -> None:
    counters = Counters(["on_train_batch_end"])
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2, callbacks=[counters.callback])
    trainer.fit(Net(), regression_loader(5))
    assert [(row[3], row[2]) for row in counters.rows] == [(0, 0), (1, 1), (2, 1), (3, 2), (4, 3)]
    assert trainer.global_step == 3


def test_batch_hooks_are_given_the_batch_the_outputs_and_the_indices(tmp_path: Path) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def observe(event: str, owner: Any, arguments: dict[str, Any]) -> None:
        seen[event.partition(".")[2]] = arguments

    hooks = [hook for hook in LOOP_HOOKS if "_batch_" in hook]
    callback = observed(pl.Callback, "callback", hooks, observe)()
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    module, loader = ManyLoadersNet(), regression_loader(1)
    trainer.fit(module, loader, [loader, loader])
    trainer.test(module, loader)
    trainer.predict(module, loader)
    x, y = next(iter(loader))
    for arguments in seen.values():
        assert torch.equal(arguments["batch"][0], x)
        assert torch.equal(arguments["batch"][1], y)
        assert arguments["batch_idx"] == 0
    assert seen["on_validation_batch_end"]["dataloader_idx"] == 1
    assert seen["on_train_batch_end"]["outputs"]["loss"].requires_grad is False
    assert seen["on_validation_batch_end"]["outputs"].shape == ()
    assert seen["on_predict_batch_end"]["outputs"].shape == (2, 1)
