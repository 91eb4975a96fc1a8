from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import Tensor

import lightlite as pl
from lightlite.callbacks import Callback, LambdaCallback, ModelCheckpoint, ModelSummary, Timer
from lightlite.errors import MisconfigurationException

from .programs import Net, fit, loader, trainer

STAGES = ("train", "validation", "test", "predict")
HOOKS = {
    "setup": "stage",
    "teardown": "stage",
    "on_fit_start": "",
    "on_fit_end": "",
    "on_sanity_check_start": "",
    "on_sanity_check_end": "",
    **{f"on_{stage}_{when}": "" for stage in STAGES for when in ("start", "end", "epoch_start", "epoch_end")},
    "on_train_batch_start": "batch batch_idx",
    "on_train_batch_end": "outputs batch batch_idx",
    **{f"on_{stage}_batch_start": "batch batch_idx dataloader_idx" for stage in STAGES[1:]},
    **{f"on_{stage}_batch_end": "outputs batch batch_idx dataloader_idx" for stage in STAGES[1:]},
    "on_exception": "exception",
    "on_save_checkpoint": "checkpoint",
    "on_load_checkpoint": "checkpoint",
    "on_before_backward": "loss",
    "on_after_backward": "",
    "on_before_optimizer_step": "optimizer",
    "on_before_zero_grad": "optimizer",
}


def test_a_callback_has_the_documented_hooks_and_none_does_anything() -> None:
    callback = Callback()
    for name, arguments in HOOKS.items():
        parameters = list(inspect.signature(getattr(callback, name)).parameters)
        assert parameters == ["trainer", "pl_module", *arguments.split()], name
        assert getattr(callback, name)(*parameters) is None
    methods = {name for name, value in vars(Callback).items() if inspect.isfunction(value) and name[0] != "_"}
    assert methods == {*HOOKS, "state_dict", "load_state_dict", "log", "log_dict"}


def test_the_state_key_names_class_and_arguments() -> None:
    class Outer:
        class Mine(Callback):
            pass

    assert Outer.Mine().state_key == f"{Outer.__qualname__}.Mine"
    assert Outer.Mine()._generate_state_key(a=1, b="x") == f"{Outer.__qualname__}.Mine{{'a': 1, 'b': 'x'}}"


def test_a_callback_can_log_as_a_module_does() -> None:
    class Logs(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("index", float(batch_idx), on_step=False, on_epoch=True)

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log_dict({"a": 1.0, "b": 2.0})

    run = fit(Logs(), max_epochs=1)
    logged = {name: float(run.callback_metrics[name]) for name in ("index", "a", "b")}
    assert logged == {"index": 1.5, "a": 1.0, "b": 2.0}


def test_logging_outside_of_a_run_says_where_to_log() -> None:
    with pytest.raises(MisconfigurationException, match=r"Trainer\(callbacks=\[\.\.\.\]\)"):
        Timer().log("a", 1)


def test_given_functions_are_called_at_their_hooks() -> None:
    seen: list[Any] = []
    fit(
        LambdaCallback(
            setup=lambda trainer, module, stage: seen.append(stage),
            on_train_epoch_end=lambda trainer, module: seen.append(trainer.current_epoch),
            on_fit_end=None,
        ),
        max_epochs=2,
    )
    assert seen == ["fit", 0, 1]


def test_a_function_for_no_hook_is_refused_with_the_hooks_there_are() -> None:
    with pytest.raises(MisconfigurationException, match=r"on_epoch_end=.*on_train_epoch_end"):
        LambdaCallback(on_epoch_end=print)


def test_the_model_is_summarized_as_the_fit_begins(capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    module = Net()
    fit(ModelSummary(), module=module, max_epochs=1, enable_model_summary=True)
    table = next(record.message for record in caplog.records if "Name" in record.message)
    assert table.splitlines()[1:4] == [
        "  | Name  | Type   | Params | Mode",
        "-----------------------------------",
        "0 | layer | Linear | 5      | train",
    ]
    caplog.clear()
    fit(ModelSummary(max_depth=0), max_epochs=1, enable_model_summary=True)
    assert not [record for record in caplog.records if "Name" in record.message]


class Keeps(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


def test_a_callbacks_state_survives_a_restart() -> None:
    fit(Keeps(), pl.callbacks.ModelCheckpoint(dirpath="c", filename="x"), max_epochs=1)
    callback = Keeps()
    run = trainer(callback, pl.callbacks.ModelCheckpoint(dirpath="d"), max_epochs=2)
    run.fit(Net(), loader(), loader(1), ckpt_path="c/x.ckpt")
    assert callback.batches == 8


def test_two_callbacks_whose_states_could_not_be_told_apart_are_refused() -> None:
    def having(*callbacks: Callback) -> pl.Trainer:
        return pl.Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks))

    having(ModelCheckpoint(monitor="a"), ModelCheckpoint(monitor="b"), Callback(), Callback())
    with pytest.raises(
        MisconfigurationException, match=r"two callbacks with the state_key .ModelCheckpoint\{'monitor'"
    ):
        having(ModelCheckpoint(save_last=True), ModelCheckpoint(save_top_k=-1))
