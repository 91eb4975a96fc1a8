from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from lightlite.callbacks import EarlyStopping, ModelCheckpoint
from lightlite.callbacks.early_stopping import EarlyStoppingReason
from lightlite.errors import MisconfigurationException

from .programs import Net, Unvalidated, fit, loader, trainer


@pytest.mark.parametrize(
    ("options", "losses", "epochs", "reason"),
    [
        ({"patience": 2}, (0.5, 0.3, 0.4, 0.4, 0.1), 4, "PATIENCE_EXHAUSTED"),
        ({"patience": 1, "min_delta": 0.1}, (0.5, 0.45, 0.1), 2, "PATIENCE_EXHAUSTED"),
        ({"patience": 1, "mode": "max"}, (0.1, 0.2, 0.2, 0.3), 3, "PATIENCE_EXHAUSTED"),
        ({"stopping_threshold": 0.25}, (0.5, 0.3, 0.2, 0.1), 3, "STOPPING_THRESHOLD"),
        ({"divergence_threshold": 1.0}, (0.5, 2.0, 0.1), 2, "DIVERGENCE_THRESHOLD"),
        ({}, (0.5, math.nan, 0.1), 2, "NON_FINITE_METRIC"),
        ({"check_finite": False, "patience": 2}, (math.nan, math.inf, 0.1), 2, "PATIENCE_EXHAUSTED"),
        ({"patience": 3}, (0.5, 0.4, 0.3, 0.2, 0.1), 5, "NOT_STOPPED"),
    ],
)
def test_the_fit_stops_when_it_should(
    options: dict[str, Any], losses: tuple[float, ...], epochs: int, reason: str
) -> None:
    callback = EarlyStopping("val_loss", **options)
    run = fit(callback, module=Net(losses), max_epochs=5)
    assert (run.current_epoch, callback.stopping_reason) == (epochs, EarlyStoppingReason[reason])
    assert callback.stopped_epoch == (0 if reason == "NOT_STOPPED" else epochs - 1)
    assert (callback.stopping_reason_message is None) == (reason == "NOT_STOPPED")


def test_it_looks_after_each_validation_where_there_are_several_an_epoch() -> None:
    callback = EarlyStopping("val_loss", patience=2)
    run = fit(callback, module=Net((0.5, 0.6, 0.7)), val_check_interval=0.5)
    assert run.global_step == 6
    assert callback.wait_count == 2


def test_it_looks_after_each_epoch_where_there_is_no_validation() -> None:
    run = fit(EarlyStopping("steps", patience=1), module=Unvalidated(), val_check_interval=0.5, max_epochs=5)
    assert run.current_epoch == 2


def test_a_value_of_training_can_be_watched() -> None:
    run = fit(EarlyStopping("steps", patience=1, check_on_train_epoch_end=True), max_epochs=5)
    assert run.current_epoch == 2


def test_a_missing_value_is_an_error_that_lists_what_was_logged() -> None:
    with pytest.raises(RuntimeError, match=r"monitor='loss'.*steps, train_loss, val/loss, val_loss"):
        fit(EarlyStopping("loss"))


def test_a_missing_value_is_passed_over_where_that_was_asked_for() -> None:
    assert fit(EarlyStopping("loss", strict=False)).current_epoch == 3
    with pytest.warns(RuntimeWarning, match="monitor='loss'"):
        fit(EarlyStopping("loss", strict=False, verbose=True))


def test_it_tells_what_it_sees(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(EarlyStopping("val_loss", patience=1, verbose=True), module=Net((0.5, 0.25, 0.3)))
    told = [record.message for record in caplog.records if "val_loss" in record.message]
    assert told == [
        "val_loss improved. The best value is 0.500 now.",
        "val_loss improved by 0.250 >= min_delta = 0.0. The best value is 0.250 now.",
        "val_loss was no better 1 times; the best value was 0.250. The fit stops.",
    ]


def test_it_goes_on_counting_after_a_restart() -> None:
    checkpoint = ModelCheckpoint(dirpath="c", filename="x")
    fit(EarlyStopping("val_loss", patience=3), checkpoint, module=Net((0.1, 0.2, 0.3)))
    callback = EarlyStopping("val_loss", patience=3)
    state = torch.load("c/x.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert (state["wait_count"], round(float(state["best_score"]), 3), state["patience"]) == (2, 0.1, 3)
    run = trainer(callback, ModelCheckpoint(dirpath="d"), max_epochs=9)
    run.fit(Net((0.4,)), loader(), loader(1), ckpt_path="c/x.ckpt")
    assert run.current_epoch == 4


def test_its_state_is_kept_under_lightnings_name() -> None:
    assert EarlyStopping("val_loss").state_key == "EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"


def test_a_wrong_mode_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="mode='avg'"):
        EarlyStopping("val_loss", mode="avg")
