"""Bad input is refused before anything is trained: the message names what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import lightlite as pl
from lightlite.callbacks import EarlyStopping, ModelCheckpoint
from lightlite.errors import CheckpointNotFoundError, CorruptCheckpointError, MisconfigurationException

from .models import TRAINING_ALONE, Net, assert_same_bits, quiet_trainer, regression_loader, weights

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)

REFUSED = (MisconfigurationException, TypeError, ValueError)


def refused(folder: Path, *fragments: str, **settings: Any) -> None:
    """Assert that these settings are refused, by a message with each of `fragments` in it."""
    with pytest.raises(REFUSED) as caught:
        quiet_trainer(folder, **settings)
    assert_mentions(caught.value, *fragments)


def assert_mentions(error: BaseException, *fragments: str) -> None:
    missing = [fragment for fragment in fragments if fragment not in str(error)]
    assert not missing, f"{type(error).__name__}: {error} does not mention {missing}"


def described(settings: dict[str, Any]) -> str:
    """The settings as a test's name, the same in every process."""
    plain = (str, int, float, type(None))
    return ",".join(
        f"{name}={value if isinstance(value, plain) else type(value).__name__}" for name, value in settings.items()
    )


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"accelerator": "gpus"}, ["gpus", "cpu", "cuda"]),
        ({"accelerator": 3}, ["3"]),
        ({"strategy": "dpp"}, ["dpp", "ddp"]),
        ({"strategy": 3}, ["3"]),
        ({"precision": "17"}, ["17", "16-mixed", "bf16-mixed", "32"]),
        ({"precision": 8}, ["8", "32"]),
        ({"devices": 0}, ["devices", "0"]),
        ({"devices": "two"}, ["two"]),
        ({"devices": 1.5}, ["1.5"]),
        ({"devices": []}, ["devices", "[]"]),
        ({"num_nodes": 0}, ["num_nodes", "0"]),
        ({"max_epochs": -2}, ["max_epochs", "-2"]),
        ({"max_epochs": "3"}, ["max_epochs", "3"]),
        ({"max_steps": -2}, ["max_steps", "-2"]),
        ({"min_epochs": -1}, ["min_epochs", "-1"]),
        ({"max_time": "yesterday"}, ["max_time", "yesterday"]),
        ({"limit_train_batches": -1}, ["limit_train_batches", "-1"]),
        ({"limit_train_batches": 1.2}, ["limit_train_batches", "1.2"]),
        ({"limit_val_batches": -0.1}, ["limit_val_batches", "-0.1"]),
        ({"limit_test_batches": "all"}, ["limit_test_batches", "all"]),
        ({"limit_predict_batches": 1.5}, ["limit_predict_batches", "1.5"]),
        ({"overfit_batches": -1}, ["overfit_batches", "-1"]),
        ({"fast_dev_run": -1}, ["fast_dev_run", "-1"]),
        ({"fast_dev_run": "yes"}, ["fast_dev_run", "yes"]),
        ({"num_sanity_val_steps": -2}, ["num_sanity_val_steps", "-2"]),
        ({"val_check_interval": -1}, ["val_check_interval", "-1"]),
        ({"val_check_interval": 1.5}, ["val_check_interval", "1.5"]),
        ({"check_val_every_n_epoch": 1.5}, ["check_val_every_n_epoch", "1.5"]),
        ({"check_val_every_n_epoch": None}, ["check_val_every_n_epoch", "val_check_interval"]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, ["val_check_interval", "0.5"]),
        ({"log_every_n_steps": -1}, ["log_every_n_steps", "-1"]),
        ({"accumulate_grad_batches": 0}, ["accumulate_grad_batches", "0"]),
        ({"accumulate_grad_batches": "2"}, ["accumulate_grad_batches", "2"]),
        ({"gradient_clip_val": "much"}, ["gradient_clip_val", "much"]),
        ({"gradient_clip_algorithm": "volume"}, ["gradient_clip_algorithm", "volume", "norm", "value"]),
        ({"reload_dataloaders_every_n_epochs": -1}, ["reload_dataloaders_every_n_epochs", "-1"]),
        ({"callbacks": "early"}, ["callbacks", "early"]),
        ({"callbacks": [3]}, ["3"]),
        ({"callbacks": [EarlyStopping]}, ["EarlyStopping"]),
        ({"logger": "tensorboard"}, ["logger", "tensorboard"]),
        ({"profiler": "fast"}, ["profiler", "fast"]),
        ({"plugins": "unknown_plugin"}, ["unknown_plugin"]),
        (
            {"enable_checkpointing": False, "callbacks": [ModelCheckpoint()]},
            ["enable_checkpointing", "ModelCheckpoint"],
        ),
    ],
    ids=lambda value: described(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], fragments: list[str]) -> None:
    refused(tmp_path, *fragments, **settings)


def test_an_unknown_argument_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_epoch"):
        quiet_trainer(tmp_path, max_epoch=3)


@pytest.mark.parametrize("accelerator", ["cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, accelerator: str) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there[accelerator]:
        pytest.skip(f"{accelerator} is there")
    refused(tmp_path, accelerator, "cpu", accelerator=accelerator)


def test_more_gpus_than_there_are(tmp_path: Path) -> None:
    refused(tmp_path, "99" if torch.cuda.is_available() else "cuda", accelerator="cuda", devices=99)


def test_negative_devices_of_the_cpu(tmp_path: Path) -> None:
    refused(tmp_path, "devices", "-2", accelerator="cpu", devices=-2)


class Incomplete(pl.LightningModule):
    """Neither steps nor optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)


class WithoutOptimizers(Incomplete):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).sum()


@pytest.mark.parametrize(
    ("module", "entry_point", "missing"),
    [
        (Incomplete(), "fit", "training_step"),
        (WithoutOptimizers(), "fit", "configure_optimizers"),
        (Incomplete(), "validate", "validation_step"),
        (Incomplete(), "test", "test_step"),
    ],
)
def test_a_method_that_is_missing_is_named(tmp_path: Path, module: Any, entry_point: str, missing: str) -> None:
    with pytest.raises(MisconfigurationException, match=missing) as caught:
        getattr(quiet_trainer(tmp_path), entry_point)(module, regression_loader(1))
    assert_mentions(caught.value, type(module).__name__)


def test_predicting_needs_predict_step_or_forward(tmp_path: Path) -> None:
    with pytest.raises((MisconfigurationException, NotImplementedError), match=r"forward|predict_step"):
        quiet_trainer(tmp_path).predict(Incomplete(), regression_loader(1))


@pytest.mark.parametrize("entry_point", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("module", "said"), [(torch.nn.Linear(1, 1), "Linear"), ("model", "str"), (Net, "the class Net"), (3, "int")]
)
def test_what_is_no_lightning_module_is_refused_by_type(
    tmp_path: Path, entry_point: str, module: Any, said: str
) -> None:
    with pytest.raises(TypeError, match="an instance of a LightningModule") as caught:
        getattr(quiet_trainer(tmp_path), entry_point)(module, regression_loader(1))
    assert_mentions(caught.value, f"was given {said} as model")


@pytest.mark.parametrize("entry_point", ["fit", "validate", "test", "predict"])
def test_loaders_that_are_missing_are_named(tmp_path: Path, entry_point: str) -> None:
    name = {"fit": "train", "validate": "val"}.get(entry_point, entry_point)
    with pytest.raises(MisconfigurationException, match=f"{name}_dataloader"):
        getattr(quiet_trainer(tmp_path), entry_point)(Net())


@pytest.mark.parametrize("loader", [3, object()], ids=["int", "object"])
@pytest.mark.parametrize("entry_point", ["fit", "validate", "test", "predict"])
def test_a_loader_that_is_no_iterable_is_refused_by_type(tmp_path: Path, entry_point: str, loader: Any) -> None:
    module = Net()
    before = weights(module)
    with pytest.raises((TypeError, MisconfigurationException), match=r"(?i)iterable") as caught:
        getattr(quiet_trainer(tmp_path), entry_point)(module, loader)
    assert_mentions(caught.value, type(loader).__name__)
    assert_same_bits(weights(module), before)


def test_loaders_and_a_datamodule_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"data ?module"):
        quiet_trainer(tmp_path).fit(Net(), regression_loader(1), datamodule=pl.LightningDataModule())


def test_what_is_no_datamodule_is_refused_by_type(tmp_path: Path) -> None:
    with pytest.raises((TypeError, MisconfigurationException, AttributeError), match=r"(?i)data ?module") as caught:
        quiet_trainer(tmp_path).fit(Net(), datamodule="data")
    assert_mentions(caught.value, "str")


def test_a_fraction_of_a_loader_without_length_is_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield torch.ones(4), torch.ones(1)

    trainer = quiet_trainer(tmp_path, limit_train_batches=0.5)
    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        trainer.fit(Net(), DataLoader(Stream()))
    trainer = quiet_trainer(tmp_path, val_check_interval=0.5)
    with pytest.raises(MisconfigurationException, match="val_check_interval"):
        trainer.fit(Net(), DataLoader(Stream()), regression_loader(1))


def test_validating_less_often_than_there_are_batches_says_how(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, val_check_interval=5)
    with pytest.raises(REFUSED, match="val_check_interval") as caught:
        trainer.fit(Net(), regression_loader(2), regression_loader(1))
    assert_mentions(caught.value, "5", "2", "check_val_every_n_epoch=None")


@pytest.mark.parametrize("step", ["training_step"])
@pytest.mark.parametrize("output", ["loss", {"los": 1}, 3, [torch.ones(())]], ids=["str", "dict", "int", "list"])
def test_a_training_step_that_returns_no_loss_is_refused(tmp_path: Path, step: str, output: Any) -> None:
    module = type("Wrong", (Net,), {step: lambda self, batch, batch_idx: output})()
    with pytest.raises(MisconfigurationException, match="training_step") as caught:
        quiet_trainer(tmp_path).fit(module, regression_loader(1))
    assert_mentions(caught.value, "loss")


def test_a_loss_of_several_elements_is_refused(tmp_path: Path) -> None:
    class Vector(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    with pytest.raises(MisconfigurationException, match=r"a loss of shape \(2, 1\); return a scalar"):
        quiet_trainer(tmp_path).fit(Vector(), regression_loader(1))


def test_a_detached_loss_is_refused(tmp_path: Path) -> None:
    class Detached(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch).detach()

    with pytest.raises(MisconfigurationException, match=r"depends on no parameter .* it was detached") as caught:
        quiet_trainer(tmp_path).fit(Detached(), regression_loader(1))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_another_error_of_the_backward_pass_is_passed_on(tmp_path: Path) -> None:
    class Boom(Net):
        def backward(self, loss: Any) -> None:
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        quiet_trainer(tmp_path).fit(Boom(), regression_loader(1))


@pytest.mark.parametrize(("entry_point", "name"), [("fit", "train"), ("validate", "val"), ("predict", "predict")])
def test_a_dataset_in_the_place_of_a_loader_is_warned_of(tmp_path: Path, entry_point: str, name: str) -> None:
    message = rf"the {name} loader is a Dataset, TensorDataset: each of its samples .* DataLoader\(dataset, batch_size"
    with pytest.warns(UserWarning, match=message):
        getattr(quiet_trainer(tmp_path), entry_point)(Net(), regression_loader(1).dataset)


def test_a_class_in_the_place_of_a_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="DataLoader'> of type type, which is no iterable of batches"):
        quiet_trainer(tmp_path).fit(Net(), DataLoader)


@pytest.mark.parametrize("entry_point", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_is_missing_is_named(tmp_path: Path, entry_point: str) -> None:
    path = tmp_path / "nowhere" / "last.ckpt"
    with pytest.raises(CheckpointNotFoundError) as caught:
        getattr(quiet_trainer(tmp_path), entry_point)(Net(), regression_loader(1), ckpt_path=str(path))
    assert isinstance(caught.value, FileNotFoundError)
    assert_mentions(caught.value, str(path), f"nor any *.ckpt in {path.parent}")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Net(), regression_loader(1))
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    return tmp_path / "whole.ckpt"


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_and_nothing_is_changed(
    tmp_path: Path, checkpoint: Path, length: float
) -> None:
    whole = checkpoint.read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(whole[: int(len(whole) * length) if isinstance(length, float) else length])
    module = Net()
    before = weights(module)
    with pytest.raises(CorruptCheckpointError) as caught:
        quiet_trainer(tmp_path, max_epochs=2).fit(module, regression_loader(1), ckpt_path=damaged)
    assert_mentions(caught.value, str(damaged))
    assert_same_bits(weights(module), before)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04K\x03."], ids=["text", "pickle of 3"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError) as caught:
        quiet_trainer(tmp_path).test(Net(), regression_loader(1), ckpt_path=path, verbose=False)
    assert_mentions(caught.value, str(path))


def test_a_checkpoint_of_another_model_names_the_keys(tmp_path: Path, checkpoint: Path) -> None:
    class Bigger(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = torch.nn.Linear(1, 1)

    with pytest.raises(RuntimeError, match=r"second\.weight"):
        quiet_trainer(tmp_path).test(Bigger(), regression_loader(1), ckpt_path=checkpoint, verbose=False)


def test_a_checkpoint_with_code_in_it_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"evil\.ckpt"):
        quiet_trainer(tmp_path).test(Net(), regression_loader(1), ckpt_path=tmp_path / "evil.ckpt", verbose=False)
    assert not (tmp_path / "executed").exists()


def test_early_stopping_on_a_value_that_nobody_logs_lists_what_is_logged(tmp_path: Path) -> None:
    class Logs(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    trainer = quiet_trainer(tmp_path, callbacks=[EarlyStopping("vall_loss")])
    with pytest.raises((RuntimeError, MisconfigurationException), match="vall_loss") as caught:
        trainer.fit(Logs(), regression_loader(1), regression_loader(1))
    assert_mentions(caught.value, "val_loss")


def test_checkpointing_on_a_value_that_nobody_logs_lists_what_is_logged(tmp_path: Path) -> None:
    class Logs(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    callback = ModelCheckpoint(dirpath=tmp_path, monitor="vall_loss")
    trainer = quiet_trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="vall_loss") as caught:
        trainer.fit(Logs(), regression_loader(1), regression_loader(1))
    assert_mentions(caught.value, "val_loss")


def test_a_mode_that_is_unknown_is_refused(tmp_path: Path) -> None:
    for callback in (EarlyStopping, ModelCheckpoint):
        with pytest.raises(MisconfigurationException, match="lowest") as caught:
            callback(monitor="val", mode="lowest")
        assert_mentions(caught.value, "min", "max")


def test_bad_input_leaves_the_trainer_usable(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(MisconfigurationException):
        trainer.fit(Incomplete(), regression_loader(1))
    trainer.fit(Net(), regression_loader(2))
    assert trainer.global_step == 2


class Calling(Net):
    """Calls a function of the module and the hook's name in a hook."""

    def __init__(self, hook: str, call: Callable[[Any], Any]) -> None:
        super().__init__()
        setattr(self, hook, lambda *_: call(self))


@pytest.mark.parametrize(
    ("hook", "call", "fragments"),
    [
        ("on_train_batch_start", lambda module: module.log(3, 1.0), ["name 3", "give a string"]),
        (
            "on_train_epoch_end",
            lambda module: module.log("x", 1.0, on_step=True),
            ["self.log('x', on_step=True, on_epoch=None)", "inside on_train_epoch_end", "leave on_step and on_epoch"],
        ),
        (
            "configure_optimizers",
            lambda module: {
                "optimizer": (sgd := torch.optim.SGD(module.parameters(), lr=0.1)),
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(sgd, 1), "interval": "batch"},
            },
            ["interval='batch'", "'epoch', 'step'"],
        ),
    ],
    ids=["a name that is none", "on_step at an epoch's end", "a scheduler's interval"],
)
def test_wrong_use_within_hooks(tmp_path: Path, hook: str, call: Callable[[Any], Any], fragments: list[str]) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        quiet_trainer(tmp_path).fit(Calling(hook, call), regression_loader(1))
    assert_mentions(caught.value, *fragments)


class Forgetful(pl.callbacks.EMAWeightAveraging):
    """Overrides a hook without calling what it overrides."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (
            lambda folder: quiet_trainer(folder).test(Net(), regression_loader(1), ckpt_path="best"),
            ["Trainer.test(ckpt_path='best')", "no fit of this Trainer has written a checkpoint", "give a path"],
        ),
        (
            lambda folder: quiet_trainer(folder, callbacks=Forgetful()).fit(Net(), regression_loader(1)),
            ["Forgetful has no average", "super().on_fit_start(trainer, pl_module)"],
        ),
        (
            lambda folder: pl.callbacks.ProgressBar().disable(),
            ["ProgressBar lacks disable()"],
        ),
        (
            lambda folder: pl.profilers.PyTorchProfiler(rows=3),
            ["PyTorchProfiler got rows=3", "activities", "with_stack"],
        ),
        (lambda folder: pl.seed_everything(-1), ["-1", "NumPy accepts seeds from 0 to 4294967295"]),
        (
            lambda folder: pl.accelerators.AcceleratorRegistry.register("cpu", pl.accelerators.CPUAccelerator),
            ["'cpu' is registered already", "override=True"],
        ),
        (lambda folder: quiet_trainer(folder, timeout=0), ["timeout=0", "more than 0 seconds", "None"]),
    ],
    ids=["best", "WeightAveraging", "ProgressBar", "PyTorchProfiler", "a seed", "a registry", "timeout"],
)
def test_wrong_use_of_one_feature(tmp_path: Path, call: Callable[[Path], Any], fragments: list[str]) -> None:
    with pytest.raises((MisconfigurationException, NotImplementedError, ValueError)) as caught:
        call(tmp_path)
    assert_mentions(caught.value, *fragments)
