from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest

from lightlite.callbacks import ModelCheckpoint, Timer
from lightlite.errors import MisconfigurationException

from .programs import Net, fit, loader, trainer


class Slow(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)


def test_each_stage_is_measured() -> None:
    timer = Timer()
    assert (timer.start_time(), timer.time_elapsed(), timer.time_remaining()) == (None, 0.0, None)
    run = fit(timer, module=Slow(), max_epochs=1)
    assert 0.2 <= timer.time_elapsed("train") < 5
    assert timer.end_time() > timer.start_time()  # type: ignore[operator]
    assert 0 < timer.time_elapsed("validate") < timer.time_elapsed("train")
    assert timer.start_time("test") is None
    run.test(Net(), loader(1), verbose=False)
    assert timer.time_elapsed("test") > 0


def test_the_fit_stops_when_its_time_is_over() -> None:
    timer = Timer(timedelta(seconds=0.12))
    run = fit(timer, module=Slow(), max_epochs=50)
    assert run.global_step in (2, 3)
    assert timer.time_remaining() < 0  # type: ignore[operator]


def test_with_interval_epoch_the_epoch_is_finished() -> None:
    assert fit(Timer(timedelta(seconds=0.12), interval="epoch"), module=Slow(), max_epochs=50).global_step == 4


def test_the_time_before_a_restart_counts() -> None:
    timer = Timer()
    fit(timer, ModelCheckpoint(dirpath="c", filename="x"), module=Slow(), max_epochs=1)
    resumed = Timer(timedelta(seconds=0.2))
    run = trainer(resumed, ModelCheckpoint(dirpath="d"), max_epochs=50)
    run.fit(Slow(), loader(), loader(1), ckpt_path="c/x.ckpt")
    assert run.global_step <= 5
    assert resumed.time_elapsed() > 0.2


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("01:02:03:04", 93784), ({"minutes": 2}, 120), (timedelta(hours=1), 3600)],
)
def test_a_duration_is_given_in_several_forms(duration: Any, seconds: float) -> None:
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("arguments", [{"duration": "1:2:3"}, {"duration": 5}, {"interval": "batch"}])
def test_another_form_is_refused_with_the_right_ones(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"DD:HH:MM:SS|'step' or 'epoch'"):
        Timer(**arguments)
