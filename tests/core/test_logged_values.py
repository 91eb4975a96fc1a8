"""What `self.log` brings to loggers, to `trainer.*_metrics` and to the results of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite.errors import MisconfigurationException

from .models import TRAINING_ALONE, ListLogger, ManyLoadersNet, Net, NumberData, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


def floats(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


class LoggingNet(ManyLoadersNet):
    """Logs the index of the batch in every step, under `values` of {key: arguments of log}."""

    def __init__(self, **values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values

    def log_all(self, batch_idx: int) -> None:
        for name, arguments in self.values.items():
            self.log(name, float(batch_idx), **arguments)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_all(batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_all(batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_all(batch_idx)


def fit_logging(folder: Path, module: pl.LightningModule, loaders: Any, **settings: Any) -> tuple[Any, ListLogger]:
    logger = ListLogger()
    trainer = quiet_trainer(folder, logger=logger, **settings)
    trainer.fit(module, *loaders)
    return trainer, logger


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"x": [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)]}),
        ({"on_step": True, "on_epoch": False}, {"x": [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)]}),
        ({"on_step": False, "on_epoch": True}, {"x": [(1, 0.5), (3, 0.5)]}),
        (
            {"on_step": True, "on_epoch": True},
            {"x_step": [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)], "x_epoch": [(1, 0.5), (3, 0.5)]},
        ),
        ({"logger": False}, {}),
    ],
)
def test_training_values_reach_the_logger(
    tmp_path: Path, arguments: dict[str, Any], expected: dict[str, list[tuple[int, float]]]
) -> None:
    _, logger = fit_logging(tmp_path, LoggingNet(x=arguments), [regression_loader(2)], max_epochs=2)
    assert {name: logger.history(name) for name in logger.names() - {"epoch"}} == expected


def test_every_row_of_training_values_carries_its_epoch(tmp_path: Path) -> None:
    module = LoggingNet(x={"on_step": True, "on_epoch": True})
    _, logger = fit_logging(tmp_path, module, [regression_loader(2)], max_epochs=2)
    epochs = [(step, metrics["epoch"]) for step, metrics in logger.rows if metrics.keys() & {"x_step", "x_epoch"}]
    assert epochs == [(0, 0.0), (1, 0.0), (1, 0.0), (2, 1.0), (3, 1.0), (3, 1.0)]


def test_steps_are_logged_every_n(tmp_path: Path) -> None:
    loaders = [regression_loader(4)]
    _, logger = fit_logging(tmp_path, LoggingNet(x={}), loaders, max_epochs=2, log_every_n_steps=3)
    assert logger.history("x") == [(2, 2.0), (5, 1.0)]


def test_while_gradients_accumulate_the_value_of_the_batch_that_steps_is_logged(tmp_path: Path) -> None:
    _, logger = fit_logging(tmp_path, LoggingNet(x={}), [regression_loader(5)], accumulate_grad_batches=2)
    assert logger.history("x") == [(0, 1.0), (1, 3.0), (2, 4.0)]


def test_a_logged_step_replaces_the_trainers(tmp_path: Path) -> None:
    class OwnStep(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", float(batch_idx))
            self.log("step", float(10 * batch_idx))
            return super().training_step(batch, batch_idx)

    _, logger = fit_logging(tmp_path, OwnStep(), [regression_loader(3)])
    assert logger.history("x") == [(0, 0.0), (10, 1.0), (20, 2.0)]


def test_validation_values_are_means_of_the_epoch_by_default(tmp_path: Path) -> None:
    loaders = [regression_loader(2), regression_loader(3)]
    trainer, logger = fit_logging(tmp_path, LoggingNet(x={}), loaders, max_epochs=1, limit_train_batches=0.5)
    assert (0, 1.0) in logger.history("x")
    assert floats(trainer.callback_metrics)["x"] == 1.0


def test_validation_values_are_logged_at_the_last_training_step(tmp_path: Path) -> None:
    class Validating(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mean", float(batch_idx))
            self.log("both", float(batch_idx), on_step=True, on_epoch=True)

    loaders = [regression_loader(2), regression_loader(2)]
    _, logger = fit_logging(tmp_path, Validating(), loaders, max_epochs=2)
    assert {name: logger.history(name) for name in logger.names() - {"epoch"}} == {
        "mean": [(1, 0.5), (3, 0.5)],
        "both_step": [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)],
        "both_epoch": [(1, 0.5), (3, 0.5)],
    }


def test_the_sanity_validation_logs_nothing(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(floats(trainer.callback_metrics))

    class Validating(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0)

    loaders = [regression_loader(1), regression_loader(2)]
    _, logger = fit_logging(tmp_path, Validating(), loaders, num_sanity_val_steps=2, callbacks=[Watch()])
    assert seen == [{}]
    assert logger.history("x") == [(0, 1.0)]


@pytest.mark.parametrize("entry_point", ["validate", "test"])
def test_evaluation_alone_logs_and_returns_values(tmp_path: Path, entry_point: str) -> None:
    logger = ListLogger()
    trainer = quiet_trainer(tmp_path, logger=logger)
    module = LoggingNet(x={}, both={"on_step": True, "on_epoch": True})
    results = getattr(trainer, entry_point)(module, regression_loader(2), verbose=False)
    assert [floats(result) for result in results] == [{"x": 0.5, "both_epoch": 0.5}]
    assert all(type(value) is float for value in results[0].values())
    assert logger.history("x") == [(0, 0.5)]
    assert logger.history("both_step") == [(0, 0.0), (1, 1.0)]
    assert floats(trainer.callback_metrics).items() >= {"x": 0.5, "both": 0.5, "both_epoch": 0.5}.items()


@pytest.mark.parametrize("entry_point", ["validate", "test"])
def test_each_of_several_loaders_gets_its_suffix_and_its_dictionary(tmp_path: Path, entry_point: str) -> None:
    logger = ListLogger()
    trainer = quiet_trainer(tmp_path, logger=logger)
    module = LoggingNet(x={}, both={"on_step": True, "on_epoch": True})
    loaders = [regression_loader(2), regression_loader(3)]
    results = getattr(trainer, entry_point)(module, loaders, verbose=False)
    assert [floats(result) for result in results] == [
        {"x/dataloader_idx_0": 0.5, "both_epoch/dataloader_idx_0": 0.5},
        {"x/dataloader_idx_1": 1.0, "both_epoch/dataloader_idx_1": 1.0},
    ]
    assert logger.names() - {"epoch"} == {
        "x/dataloader_idx_0",
        "x/dataloader_idx_1",
        "both_step/dataloader_idx_0",
        "both_step/dataloader_idx_1",
        "both_epoch/dataloader_idx_0",
        "both_epoch/dataloader_idx_1",
    }


def test_the_suffix_of_the_loader_can_be_left_out(tmp_path: Path) -> None:
    class OneKeyPerLoader(ManyLoadersNet):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log(f"x{dataloader_idx}", float(batch_idx), add_dataloader_idx=False)

    loaders = [regression_loader(2), regression_loader(3)]
    results = quiet_trainer(tmp_path).validate(OneKeyPerLoader(), loaders, verbose=False)
    assert [floats(result) for result in results] == [{"x0": 0.5}, {"x1": 1.0}]


def test_without_the_suffix_one_name_for_several_loaders_is_refused(tmp_path: Path) -> None:
    class OneKey(ManyLoadersNet):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("x", 1.0, add_dataloader_idx=False)

    with pytest.raises(
        MisconfigurationException, match=r"'x', add_dataloader_idx=False.*as in f'x_\{dataloader_idx\}'"
    ):
        quiet_trainer(tmp_path).validate(OneKey(), [regression_loader(1), regression_loader(1)], verbose=False)


def test_values_of_evaluations_after_a_fit_are_logged_at_its_last_step(tmp_path: Path) -> None:
    logger = ListLogger()
    trainer = quiet_trainer(tmp_path, logger=logger, max_epochs=2)
    module = LoggingNet(x={})
    trainer.fit(module, regression_loader(2))
    logger.rows.clear()
    trainer.test(module, regression_loader(1), verbose=False)
    assert logger.history("x") == [(4, 0.0)]
    assert logger.history("epoch") == [(4, 2.0)]


def test_metrics_of_the_trainer_after_a_fit(tmp_path: Path) -> None:
    class Everything(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("both", float(batch_idx), on_step=True, on_epoch=True)
            self.log("bar", float(batch_idx), prog_bar=True, logger=False)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx), prog_bar=True)

        def on_train_epoch_end(self) -> None:
            self.log("end", 3.0)

    trainer, _ = fit_logging(tmp_path, Everything(), [regression_loader(2), regression_loader(2)])
    assert floats(trainer.callback_metrics) == {
        "both": 0.5,
        "both_step": 1.0,
        "both_epoch": 0.5,
        "bar": 1.0,
        "val": 0.5,
        "end": 3.0,
    }
    assert floats(trainer.logged_metrics) == {"both_step": 1.0, "both_epoch": 0.5, "val": 0.5, "end": 3.0}
    assert floats(trainer.progress_bar_metrics) == {"bar": 1.0, "val": 0.5}
    assert all(isinstance(value, torch.Tensor) for value in trainer.callback_metrics.values())


def test_the_plain_name_is_the_step_in_an_epoch_and_the_mean_after_it(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["x"]))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics["x"]))

    module = LoggingNet(x={"on_step": True, "on_epoch": True})
    trainer = quiet_trainer(tmp_path, callbacks=[Watch()])
    trainer.fit(module, regression_loader(3))
    assert seen == [0.0, 1.0, 2.0, 1.0]


def test_validation_values_are_there_for_hooks_at_the_end_of_validation(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(floats(trainer.callback_metrics))

    class Validating(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx))

        def on_validation_epoch_end(self) -> None:
            self.log("end", 7.0)

    trainer = quiet_trainer(tmp_path, callbacks=[Watch()])
    trainer.fit(Validating(), regression_loader(1), regression_loader(3))
    assert seen == [{"val": 1.0, "end": 7.0}]


def test_a_new_run_forgets_the_values_of_the_one_before(tmp_path: Path) -> None:
    trainer, _ = fit_logging(tmp_path, LoggingNet(x={}), [regression_loader(1)])
    trainer.test(LoggingNet(y={}), regression_loader(1), verbose=False)
    assert floats(trainer.callback_metrics) == {"y": 0.0}


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [
        ("mean", 1.5),
        (torch.mean, 1.5),
        ("sum", 6.0),
        (torch.sum, 6.0),
        (sum, 6.0),
        ("min", 0.0),
        (torch.min, 0.0),
        (min, 0.0),
        ("max", 3.0),
        (torch.max, 3.0),
        (max, 3.0),
    ],
)
def test_reductions_over_an_epoch(tmp_path: Path, reduce_fx: Any, expected: float) -> None:
    module = LoggingNet(x={"reduce_fx": reduce_fx})
    results = quiet_trainer(tmp_path).validate(module, regression_loader(4), verbose=False)
    assert results == [{"x": expected}]
    module = LoggingNet(x={"reduce_fx": reduce_fx, "on_step": False, "on_epoch": True})
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, regression_loader(4))
    assert floats(trainer.callback_metrics) == {"x": expected}


class MeanNet(pl.LightningModule):
    """Logs the mean of each batch of numbers; the mean over all samples is what is right."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train", batch.mean(), on_step=False, on_epoch=True, **self.arguments)
        return self.weight * 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch.mean(), **self.arguments)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
@pytest.mark.parametrize("samples", [10, 11])
def test_a_smaller_last_batch_weighs_less(tmp_path: Path, samples: int, batch_size: int) -> None:
    loader = DataLoader(NumberData(samples), batch_size=batch_size)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(MeanNet(), loader, loader)
    assert floats(trainer.callback_metrics) == pytest.approx({"train": (samples - 1) / 2, "val": (samples - 1) / 2})


def test_batch_size_given_is_the_weight(tmp_path: Path) -> None:
    class Weighted(MeanNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx), batch_size=3 if batch_idx else 1)

    results = quiet_trainer(tmp_path).validate(Weighted(), DataLoader(NumberData(2)), verbose=False)
    assert results == [{"val": 0.75}]


@pytest.mark.parametrize(
    ("collate", "size"),
    [
        (lambda samples: {"text": ["a"] * len(samples), "x": torch.stack(samples)}, "x"),
        (lambda samples: (torch.stack(samples), "label"), 0),
        (lambda samples: {"deep": [{"x": torch.stack(samples)}]}, None),
    ],
)
def test_the_size_of_a_batch_is_found_in_nests(tmp_path: Path, collate: Any, size: Any) -> None:
    class Nested(MeanNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            numbers = batch["deep"][0]["x"] if size is None else batch[size]
            self.log("val", numbers.mean())

    loader = DataLoader(NumberData(5), batch_size=2, collate_fn=collate)
    assert quiet_trainer(tmp_path).validate(Nested(), loader, verbose=False) == [{"val": 2.0}]


def test_integers_are_averaged_as_numbers_not_floored(tmp_path: Path) -> None:
    class Integers(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("number", batch_idx)
            self.log("tensor", torch.tensor(batch_idx))
            self.log("flag", batch_idx == 0)

    results = quiet_trainer(tmp_path).validate(Integers(), regression_loader(2), verbose=False)
    assert results == [{"number": 0.5, "tensor": 0.5, "flag": 0.5}]


def test_hooks_at_the_end_of_epochs_log_once_an_epoch(tmp_path: Path) -> None:
    class Ends(Net):
        def on_train_epoch_start(self) -> None:
            self.log("train_start", float(self.current_epoch))

        def on_train_epoch_end(self) -> None:
            self.log("train_end", float(self.current_epoch))

        def on_validation_epoch_end(self) -> None:
            self.log("val_end", float(self.current_epoch))

    _, logger = fit_logging(tmp_path, Ends(), [regression_loader(2), regression_loader(1)], max_epochs=2)
    for name in ("train_start", "train_end", "val_end"):
        assert logger.history(name) == [(1, 0.0), (3, 1.0)]


def test_callbacks_log_too(tmp_path: Path) -> None:
    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("from_callback", float(batch_idx))
            pl_module.log("through_module", float(batch_idx))

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log_dict({"a": 1.0, "b": 2.0})

    trainer, logger = fit_logging(
        tmp_path, Net(), [regression_loader(2), regression_loader(1)], max_epochs=1, callbacks=[Log()]
    )
    assert logger.history("from_callback") == logger.history("through_module") == [(0, 0.0), (1, 1.0)]
    assert floats(trainer.callback_metrics).items() >= {"a": 1.0, "b": 2.0}.items()


@pytest.mark.parametrize(
    "value", [1, 1.0, True, torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(1), torch.tensor(1.0).double()]
)
def test_numbers_and_tensors_of_one_element_can_be_logged(tmp_path: Path, value: Any) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", value, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer, logger = fit_logging(tmp_path, Logs(), [regression_loader(1)])
    assert logger.history("x_step") == logger.history("x_epoch") == [(0, 1.0)]
    assert trainer.callback_metrics["x"].shape == ()


def test_a_logged_loss_does_not_keep_its_graph(tmp_path: Path) -> None:
    class LogsLoss(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    trainer, _ = fit_logging(tmp_path, LogsLoss(), [regression_loader(1)])
    assert trainer.callback_metrics["loss"].requires_grad is False


def test_a_logged_tensor_changed_afterwards_keeps_its_value(tmp_path: Path) -> None:
    class InPlace(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            total = torch.tensor(1.0)
            self.log("x", total)
            total.add_(100)

    assert quiet_trainer(tmp_path).validate(InPlace(), regression_loader(3), verbose=False) == [{"x": 1.0}]


@pytest.mark.parametrize("value", ["text", [1.0], None, {"a": 1.0}, object()])
def test_what_is_no_number_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("my_key", value)

    with pytest.raises((ValueError, TypeError, MisconfigurationException), match="my_key"):
        fit_logging(tmp_path, Logs(), [regression_loader(1)])


def test_a_tensor_of_several_elements_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("my_key", torch.zeros(2, 3))

    with pytest.raises((ValueError, MisconfigurationException), match="my_key") as caught:
        fit_logging(tmp_path, Logs(), [regression_loader(1)])
    assert "(2, 3)" in str(caught.value)


def test_a_key_logged_with_other_arguments_is_refused(tmp_path: Path) -> None:
    class Changes(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("my_key", 1.0, reduce_fx="max" if batch_idx else "mean")

    with pytest.raises(MisconfigurationException, match="my_key"):
        quiet_trainer(tmp_path).validate(Changes(), regression_loader(2), verbose=False)


@pytest.mark.parametrize("arguments", [{"reduce_fx": "median"}, {"reduce_fx": 3}])
def test_an_unknown_reduction_is_refused_with_those_allowed(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"(?s)(?=.*(median|3))(?=.*mean)"):
        fit_logging(tmp_path, LoggingNet(x=arguments), [regression_loader(1)])


def test_a_value_for_neither_the_step_nor_the_epoch_is_refused(tmp_path: Path) -> None:
    module = LoggingNet(my_key={"on_step": False, "on_epoch": False})
    with pytest.raises(MisconfigurationException, match=r"on_step.*on_epoch"):
        fit_logging(tmp_path, module, [regression_loader(1)])


def test_on_step_at_the_end_of_an_epoch_is_refused(tmp_path: Path) -> None:
    class Ends(Net):
        def on_train_epoch_end(self) -> None:
            self.log("my_key", 1.0, on_step=True)

    with pytest.raises(MisconfigurationException, match="on_step"):
        fit_logging(tmp_path, Ends(), [regression_loader(1)])


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_end", "on_validation_end"])
def test_logging_where_no_epoch_runs_is_refused_naming_the_key_or_the_hook(tmp_path: Path, hook: str) -> None:
    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        self.log("my_key", 1.0)

    module = type("Logs", (Net,), {hook: log})()
    with pytest.raises(MisconfigurationException, match=f"{hook}|my_key"):
        fit_logging(tmp_path, module, [regression_loader(1), regression_loader(1)])


def test_logging_in_predict_step_is_refused(tmp_path: Path) -> None:
    class Logs(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.log("my_key", 1.0)

    with pytest.raises(MisconfigurationException, match=r"my_key|predict"):
        quiet_trainer(tmp_path).predict(Logs(), regression_loader(1))


def test_logging_without_a_trainer_warns_and_goes_on() -> None:
    module = LoggingNet(x={})
    with pytest.warns(UserWarning, match="log"):
        module.validation_step(None, 0)


def test_log_dict_passes_its_arguments_on(tmp_path: Path) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"a": float(batch_idx), "b": 1.0}, on_step=False, on_epoch=True, prog_bar=True)
            return super().training_step(batch, batch_idx)

    trainer, logger = fit_logging(tmp_path, Logs(), [regression_loader(3)])
    assert logger.history("a") == [(2, 1.0)]
    assert floats(trainer.progress_bar_metrics) == {"a": 1.0, "b": 1.0}


def test_a_metric_object_is_logged_by_what_it_computes(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class WithMetric(Net):
        def __init__(self) -> None:
            super().__init__()
            self.average = torchmetrics.MeanMetric()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.average(float(batch_idx))
            self.log("average", self.average)

    _, logger = fit_logging(tmp_path, WithMetric(), [regression_loader(1), regression_loader(3)], max_epochs=2)
    assert logger.history("average") == [(0, 1.0), (1, 1.0)]


def test_a_metric_that_is_only_updated_has_no_value_of_the_step(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class WithMetrics(Net):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.updated = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.called(float(batch_idx))
            self.updated.update(float(batch_idx))
            self.log("called", self.called, on_step=True, on_epoch=True)
            self.log("updated", self.updated, on_step=True, on_epoch=True)
            return self.loss(batch)

    trainer, logger = fit_logging(tmp_path, WithMetrics(), (regression_loader(2),), max_epochs=1)

    assert [sorted(metrics) for _, metrics in logger.rows] == [
        ["called_step", "epoch"],
        ["called_step", "epoch"],
        ["called_epoch", "epoch", "updated_epoch"],
    ]
    assert floats(trainer.callback_metrics)["updated"] == 0.5
