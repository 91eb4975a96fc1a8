"""What becomes of `self.log`: under which keys and at which steps values reach a logger, and where callbacks find them.

A value's name is written "x". "x_step 0=1 1=2; x_epoch 1=1.5" means that the logger was handed 1.0 as "x_step" at step
0, and so on; a value is how often its hook was called before, plus 1. "callbacks x x_step" are the keys of
`trainer.callback_metrics` at the end, "logged" those of `trainer.logged_metrics`, "bar" those of
`trainer.progress_bar_metrics`. "refused" means that `self.log` raised.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .hooks import CALLBACK_HOOKS, MODULE_HOOKS
from .programs import in_own_folder, loader, net, observed, part, trainer

WORDS = {None: "None", True: "True", False: "False"}
OPTIONS = {
    f"on_step={WORDS[on_step]}, on_epoch={WORDS[on_epoch]}": {"on_step": on_step, "on_epoch": on_epoch}
    for on_step, on_epoch in itertools.product(WORDS, WORDS)
}
REDUCTIONS = {
    "mean": {"reduce_fx": "mean"},
    "sum": {"reduce_fx": "sum"},
    "min": {"reduce_fx": "min"},
    "max": {"reduce_fx": "max"},
    "torch.mean": {"reduce_fx": torch.mean},
    "torch.sum": {"reduce_fx": torch.sum},
    "torch.max": {"reduce_fx": torch.max},
}
BOTH = {"on_step": True, "on_epoch": True}
NOT_LOGGING = {"state_dict", "load_state_dict", "configure_callbacks", "on_save_checkpoint", "on_load_checkpoint"}
EVALUATION = [
    f"{before}{stage}{after}"
    for stage in ("validation", "test")
    for before, after in (("", "_step"), ("on_", "_batch_end"), ("on_", "_epoch_end"))
]


def list_logger(pl: Any) -> Any:
    """A logger of the framework that keeps its `rows`: (step, metrics)."""

    class ListLogger(part(pl, "loggers").Logger):
        name, version = "list", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, {key: float(value) for key, value in metrics.items()}))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return ListLogger()


class Logging:
    """A module and a callback that log from each of these hooks, under a name for the hook and the options.

    Args:
        pl: The framework.
        hooks: The hooks to log from.
        options: Arguments of `self.log`, by what to call them.
        by_callback: Whether it is the callback that logs.
    """

    def __init__(self, pl: Any, hooks: list[str], options: dict[str, Any], by_callback: bool = False) -> None:
        self._pl, self._hooks, self._options = pl, hooks, options
        self._calls: Counter[str] = Counter()
        self._refused: dict[tuple[str, str], str] = {}
        self.logger = list_logger(pl)
        module = net(pl) if by_callback else observed(net(pl), hooks, self._log)
        callback = observed(pl.Callback, hooks, self._log) if by_callback else pl.Callback
        self.module, self.callback = module(), callback()
        self._owner = self.callback if by_callback else self.module

    def _log(self, hook: str, arguments: dict[str, Any]) -> None:
        self._calls[hook] += 1
        for words, options in self._options.items():
            try:
                self._owner.log(f"{hook}|{words}|", float(self._calls[hook]), prog_bar=True, batch_size=1, **options)
            except Exception:
                self._refused[hook, words] = "refused"

    def run(self, *entry_points: str, loaders: int = 1, **settings: Any) -> dict[str, Any]:
        """What became of each hook's values, by the options, in the fit or whatever else is to be run."""
        run = trainer(self._pl, logger=self.logger, callbacks=[self.callback], **settings)
        for entry_point in entry_points or ("fit",):
            several = [loader(2) for _ in range(loaders)]
            given = {"train_dataloaders": loader(3), "val_dataloaders": several}
            if entry_point != "fit":
                given = (
                    {"dataloaders": several} if entry_point == "predict" else {"dataloaders": several, "verbose": False}
                )
            getattr(run, entry_point)(self.module, **given)
        shown = {hook: {words: self._fate(run, hook, words) for words in self._options} for hook in self._hooks}
        return {
            hook: next(iter(fates.values())) if len(set(fates.values())) == 1 else fates
            for hook, fates in shown.items()
        }

    def _fate(self, run: Any, hook: str, words: str) -> str:
        if (hook, words) in self._refused or not self._calls[hook]:
            return self._refused.get((hook, words), "not called")
        name = f"{hook}|{words}|"
        history: dict[str, list[str]] = {}
        for step, metrics in self.logger.rows:
            for key, value in metrics.items():
                if key.startswith(name):
                    history.setdefault(key, []).append(f"{step}={value:g}")
        told = [f"{key} {' '.join(values)}" for key, values in sorted(history.items())]
        for word, metrics in (
            ("callbacks", run.callback_metrics),
            ("logged", run.logged_metrics),
            ("bar", run.progress_bar_metrics),
        ):
            keys = sorted(key for key in metrics if key.startswith(name))
            told.append(" ".join([word, *keys]) if keys else f"{word} nothing")
        return "; ".join(told).replace(name, "x")


MODULE = [*(hook for hook in MODULE_HOOKS if hook not in NOT_LOGGING), "train_dataloader", "val_dataloader"]
CALLBACK = [hook for hook in CALLBACK_HOOKS if hook not in NOT_LOGGING]
STEPS = ["training_step", "on_train_batch_end", "on_train_epoch_end", "validation_step", "on_validation_epoch_end"]


def log(
    hooks: list[str], *entry_points: str, options: dict[str, Any] = OPTIONS, by_callback: bool = False, **settings: Any
) -> Callable[[Any], Any]:
    """A case: what a module logs from these hooks, with these settings of the Trainer."""
    return lambda pl: Logging(pl, hooks, options, by_callback).run(*entry_points, **settings)


def rows(pl: Any, **settings: Any) -> list[str]:
    """Everything that a logger is handed, in order, and what the Trainer shows at some hooks, by keys."""
    logger = list_logger(pl)
    lines: list[str] = []

    class Rows(net(pl)):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", float(self.global_step), on_epoch=True, prog_bar=True)
            self.log_dict({"a": 1.0, "b": 2.0})
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val", float(batch_idx), prog_bar=True)
            self.log("each", float(batch_idx), on_step=True)

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("test", float(batch_idx))

    def show(hook: str, arguments: dict[str, Any]) -> None:
        run = arguments["trainer"]
        lines.extend(handed())
        shown = {
            "callbacks": run.callback_metrics,
            "logged": run.logged_metrics,
            "bar": run.progress_bar_metrics,
        }
        told = [" ".join([word, *sorted(metrics)]) for word, metrics in shown.items()]
        lines.append(f"{hook}: {'; '.join(told)}")

    def handed() -> list[str]:
        new = [
            f"step {step}: {', '.join(f'{key}={value:g}' for key, value in sorted(metrics.items()))}"
            for step, metrics in logger.rows
        ]
        logger.rows.clear()
        return new

    moments = [
        "on_train_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_train_end",
        "on_test_end",
    ]
    run = trainer(pl, logger=logger, callbacks=[observed(pl.Callback, moments, show)()], **settings)
    module = Rows()
    run.fit(module, loader(3), loader(2))
    lines += [*handed(), "== validate"]
    run.validate(module, loader(2), verbose=False)
    lines += [*handed(), "== test"]
    run.test(module, [loader(1), loader(1)], verbose=False)
    return [*lines, *handed()]


CASES: dict[str, Callable[[Any], Any]] = {
    "a module, in fit": log(MODULE, max_epochs=2, num_sanity_val_steps=1),
    "a module, in validate and test": log(EVALUATION, "validate", "test"),
    "a module, in predict": log(["predict_step", *(hook for hook in MODULE if "on_predict" in hook)], "predict"),
    "a callback, in fit": log(CALLBACK, max_epochs=1, num_sanity_val_steps=1, by_callback=True),
    "every 2 steps": log(STEPS, max_epochs=2, log_every_n_steps=2),
    "every 50 steps": log(STEPS, max_epochs=2, log_every_n_steps=50),
    "never": log(STEPS, max_epochs=2, log_every_n_steps=0),
    "accumulating 2 batches": log(STEPS, max_epochs=2, accumulate_grad_batches=2),
    "accumulating 2 batches, every 2 steps": log(STEPS, max_epochs=2, accumulate_grad_batches=2, log_every_n_steps=2),
    "validation after each batch": log(STEPS, max_epochs=2, val_check_interval=1),
    "max_steps within an epoch": log(STEPS, max_epochs=2, max_steps=4),
    "two loaders": log(EVALUATION, "fit", "validate", "test", loaders=2),
    "two loaders, without their index": log(
        EVALUATION,
        "validate",
        "test",
        loaders=2,
        options={words: {**options, "add_dataloader_idx": False} for words, options in OPTIONS.items()},
    ),
    "reductions": log(
        ["training_step", "validation_step", "on_train_epoch_end"],
        options={
            f"{words}{', on_step' if more else ''}": {**options, **more}
            for words, options in REDUCTIONS.items()
            for more in ({}, BOTH)
        },
        max_epochs=2,
    ),
    "not to loggers": log(
        STEPS, options={"logger=False": {"logger": False, **BOTH}, "logger=False, alone": {"logger": False}}
    ),
    "rows": lambda pl: rows(pl, max_epochs=2, num_sanity_val_steps=1),
    "rows, every 2 of accumulated steps": lambda pl: rows(
        pl, max_epochs=2, log_every_n_steps=2, accumulate_grad_batches=2
    ),
}


def record(pl: Any) -> dict[str, Any]:
    """Every case's fates, by the case's name."""
    return {name: in_own_folder(case, pl) for name, case in CASES.items()}
