"""What EarlyStopping, LearningRateMonitor, Timer and BasePredictionWriter do, for their options."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from .logged import list_logger
from .programs import Stream, in_own_folder, loader, net, part, trainer

FALLING = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
RISING = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
FLAT = (0.5, 0.4, 0.4, 0.4, 0.4, 0.4)
NOT_FINITE = (0.5, 0.4, math.nan, 0.3, 0.2, 0.1)


def stopping(values: tuple[float, ...], of: str = "val", flags: dict[str, Any] | None = None, **options: Any) -> Any:
    """A case: how an EarlyStopping ends a fit of six epochs of two batches in which these values are logged."""

    def case(pl: Any) -> dict[str, Any]:
        class Logging(net(pl)):
            seen = 0

            def on_validation_epoch_end(self) -> None:
                self.log("val", values[self.seen])
                type(self).seen += not self.trainer.sanity_checking

            def on_train_epoch_end(self) -> None:
                self.log("train", values[self.current_epoch])

        callback = part(pl, "callbacks").EarlyStopping(monitor=of, **options)
        run = trainer(pl, callbacks=[callback], **{"max_epochs": 6, **(flags or {})})
        error = ""
        try:
            run.fit(Logging(), loader(2), loader(1))
        except RuntimeError:
            error = "RuntimeError"
        state = callback.state_dict()
        return {
            "epochs": run.current_epoch,
            "steps": run.global_step,
            "should_stop": run.should_stop,
            "error": error,
            "reason": callback.stopping_reason.name,
            "has a message": bool(callback.stopping_reason_message),
            "state_key": callback.state_key,
            "state": {**state, "best_score": shown(state["best_score"]), "stopping_reason_message": ""},
        }

    return case


def shown(value: Any) -> Any:
    return round(float(value), 4) if isinstance(value, torch.Tensor) else value


def one(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def groups(module: Any) -> Any:
    weight, bias = module.layer.parameters()
    return torch.optim.Adam([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.2, "name": "bias"}])


def by_epoch(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]


def by_step(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step", "name": "mine"}]


def two_of_one(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [optimizer], [StepLR(optimizer, 1, gamma=0.5), StepLR(optimizer, 2, gamma=0.5)]


def rates(configure: Callable[[Any], Any], flags: dict[str, Any] | None = None, **options: Any) -> Any:
    """A case: what a LearningRateMonitor hands the logger in two epochs of four batches."""

    def case(pl: Any) -> dict[str, Any]:
        logger = list_logger(pl)
        callback = part(pl, "callbacks").LearningRateMonitor(**options)
        module = type("Net", (net(pl),), {"configure_optimizers": configure})()
        run = trainer(pl, callbacks=[callback], logger=logger, **{"max_epochs": 2, **(flags or {})})
        run.fit(module, loader(4))
        return {
            "rows": [
                f"step {step}: {', '.join(f'{key}={value:.4g}' for key, value in sorted(metrics.items()))}"
                for step, metrics in logger.rows
            ],
            "callback_metrics": {key: shown(value) for key, value in sorted(run.callback_metrics.items())},
            "lrs": {key: [round(rate, 4) for rate in values] for key, values in callback.lrs.items()},
            "momentum": callback.last_momentum_values,
            "weight_decay": callback.last_weight_decay_values,
        }

    return case


def timed(flags: dict[str, Any] | None = None, **options: Any) -> Any:
    """A case: how a Timer ends a fit, and which stages it has timed."""

    def case(pl: Any) -> dict[str, Any]:
        callback = part(pl, "callbacks").Timer(verbose=False, **options)
        run = trainer(pl, callbacks=[callback], **{"max_epochs": 2, **(flags or {})})
        module = net(pl)()
        run.fit(module, loader(3), loader(1))
        epochs, steps = run.current_epoch, run.global_step
        run.validate(module, loader(1), verbose=False)
        run.test(module, loader(1), verbose=False)
        stages = ("train", "validate", "test", "sanity_check", "predict")
        left = callback.time_remaining()
        return {
            "epochs": epochs,
            "steps": steps,
            "started": [stage for stage in stages if callback.start_time(stage) is not None],
            "ended": [stage for stage in stages if callback.end_time(stage) is not None],
            "time left": None if left is None else left > 0,
            "state": {key: sorted(value) for key, value in callback.state_dict().items()},
        }

    return case


def written(interval: str, loaders: Callable[[], Any], **flags: Any) -> Any:
    """A case: what a BasePredictionWriter is given."""

    def case(pl: Any) -> list[str]:
        lines: list[str] = []

        class Writer(part(pl, "callbacks").BasePredictionWriter):
            def write_on_batch_end(
                self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *place: int
            ) -> None:
                batch_idx, dataloader_idx = place
                lines.append(f"batch {batch_idx} of loader {dataloader_idx}: {shapes(prediction)}, {batch_indices}")

            def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
                lines.append(f"epoch: {shapes(predictions)}, {batch_indices}")

        run = trainer(pl, callbacks=[Writer(interval)], **flags)
        returned = run.predict(net(pl)(), loaders())
        return [*lines, f"returned {shapes(returned)}"]

    return case


def shapes(predictions: Any) -> Any:
    if isinstance(predictions, torch.Tensor):
        return list(predictions.shape)
    return predictions and [shapes(part) for part in predictions]


def refused(*calls: Callable[[Any], Any]) -> Callable[[Any], list[str]]:
    """A case: for each call of the callbacks' package, whether it raises, and what."""

    def case(pl: Any) -> list[str]:
        lines = []
        for call in calls:
            try:
                call(part(pl, "callbacks"))
                lines.append("accepted")
            except Exception as error:
                lines.append(type(error).__name__)
        return lines

    return case


def two_loaders() -> Any:
    return [loader(2), loader(1, batch_size=3)]


def stream() -> Any:
    return torch.utils.data.DataLoader(Stream(3), batch_size=2)


CASES: dict[str, Callable[[Any], Any]] = {
    "stop: no better": stopping(FLAT, patience=2),
    "stop: no better, patience 0": stopping(FLAT, patience=0),
    "stop: no better, max": stopping(FALLING, patience=2, mode="max"),
    "stop: better": stopping(FALLING, patience=2),
    "stop: better, but by too little": stopping(FALLING, patience=2, min_delta=0.15),
    "stop: not finite": stopping(NOT_FINITE),
    "stop: not finite, not checked": stopping(NOT_FINITE, check_finite=False, patience=2),
    "stop: good enough": stopping(FALLING, stopping_threshold=0.25),
    "stop: bad enough": stopping(RISING, divergence_threshold=0.35),
    "stop: bad enough, max": stopping(FALLING, divergence_threshold=0.25, mode="max", patience=9),
    "stop: a value of the training epoch": stopping(RISING, of="train", patience=1, check_on_train_epoch_end=True),
    "stop: a value of the training epoch, by itself": stopping(
        RISING, of="train", patience=1, flags={"limit_val_batches": 0}
    ),
    "stop: two validations an epoch": stopping(RISING, patience=2, flags={"val_check_interval": 1, "max_epochs": 3}),
    "stop: a validation every two epochs": stopping(RISING, patience=1, flags={"check_val_every_n_epoch": 2}),
    "stop: after min_epochs": stopping(RISING, patience=1, flags={"min_epochs": 4}),
    "stop: after min_steps": stopping(RISING, patience=1, flags={"min_steps": 9}),
    "stop: sanity validation does not count": stopping(RISING, patience=1, flags={"num_sanity_val_steps": 1}),
    "stop: nothing logged": stopping(RISING, of="other"),
    "stop: nothing logged, not strict": stopping(RISING, of="other", strict=False),
    "stop: fast_dev_run": stopping(RISING, of="other", flags={"fast_dev_run": True}),
    **{
        f"rates: {words}, logging_interval {interval!r}": rates(configure, logging_interval=interval)
        for interval in (None, "step", "epoch")
        for words, configure in {
            "one optimizer": one,
            "groups": groups,
            "by epoch": by_epoch,
            "by step, named": by_step,
            "two schedulers of one": two_of_one,
        }.items()
    },
    "rates: momentum and weight decay": rates(one, log_momentum=True, log_weight_decay=True),
    "rates: betas and weight decay": rates(groups, log_momentum=True, log_weight_decay=True),
    "rates: every 3 steps": rates(one, {"log_every_n_steps": 3}),
    "rates: accumulating": rates(by_step, {"accumulate_grad_batches": 2}),
    "rates: no optimizer": rates(lambda module: None),
    "time: none given": timed(),
    "time: over at once, by step": timed(duration=timedelta(0)),
    "time: over at once, by epoch": timed(duration=timedelta(seconds=1e-9), interval="epoch"),
    "time: over at once, but min_steps": timed({"min_steps": 4}, duration=timedelta(seconds=1e-9)),
    "time: plenty": timed(duration="01:00:00:00"),
    "time: plenty, as a dict": timed(duration={"hours": 1}),
    **{
        f"writer: {interval}, {words}": written(interval, loaders)
        for interval in ("batch", "epoch", "batch_and_epoch")
        for words, loaders in {"one loader": lambda: loader(2), "two loaders": two_loaders, "a stream": stream}.items()
    },
    "writer: a limit": written("batch_and_epoch", lambda: loader(3), limit_predict_batches=2),
    "writer: shuffled": written(
        "epoch",
        lambda: torch.utils.data.DataLoader(
            loader(2).dataset, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0)
        ),
    ),
    "refused: ModelCheckpoint": refused(
        lambda c: c.ModelCheckpoint(mode="avg"),
        lambda c: c.ModelCheckpoint(save_top_k=-2),
        lambda c: c.ModelCheckpoint(save_top_k=2),
        lambda c: c.ModelCheckpoint(every_n_epochs=-1),
        lambda c: c.ModelCheckpoint(every_n_train_steps=-1),
        lambda c: c.ModelCheckpoint(every_n_epochs=1, every_n_train_steps=1),
        lambda c: c.ModelCheckpoint(every_n_epochs=1, train_time_interval=timedelta(1)),
        lambda c: c.ModelCheckpoint(every_n_epochs=0, every_n_train_steps=0),
    ),
    "refused: others": refused(
        lambda c: c.EarlyStopping("x", mode="auto"),
        lambda c: c.LearningRateMonitor(logging_interval="batch"),
        lambda c: c.Timer(interval="batch"),
        lambda c: c.BasePredictionWriter("day"),
        lambda c: c.EarlyStopping(),
    ),
}


def record(pl: Any) -> dict[str, Any]:
    """What the callbacks do, by the case's name."""
    with contextlib.redirect_stdout(None):
        return {name: in_own_folder(case, pl) for name, case in CASES.items()}
