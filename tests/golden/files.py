"""Which files ModelCheckpoint leaves, and what it tells of them, for each of its options.

Four batches an epoch, three epochs unless said otherwise; `val_loss` is 0.5, 0.3, 0.4, 0.2, 0.6, 0.1 from validation
to validation, and `steps` the number of steps so far. A file's line gives its name and the step whose state it holds, a
link's where it leads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml

from .programs import in_own_folder, loader, net, part, trainer

LOSSES = (0.5, 0.3, 0.4, 0.2, 0.6, 0.1)
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
SCORES = ("best_model_score", "kth_value", "current_score")


def module(pl: Any, fails_at: int | None = None, validates: bool = True) -> Any:
    """A module that logs as told above, and fails at a step if so wanted."""

    class Logging(net(pl)):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == fails_at:
                raise ArithmeticError
            self.log("steps", float(self.global_step + 1))
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.log("at_end", float(self.current_epoch))

        def on_validation_epoch_end(self) -> None:
            loss = LOSSES[self.__dict__.setdefault("validations", 0)]
            self.__dict__["validations"] += not self.trainer.sanity_checking
            self.log_dict({"val_loss": loss, "val/loss": loss})

    if not validates:
        Logging.validation_step = pl.LightningModule.validation_step
    return Logging()


def listed(folder: Path) -> list[str]:
    """Every checkpoint below, with its step."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            lines.append(f"{name} -> {os.readlink(path)}")
        elif path.suffix in (".ckpt", ".pt"):
            content = torch.load(path, weights_only=False)
            kind = "" if "optimizer_states" in content else ", weights only"
            lines.append(f"{name}: step {content['global_step']}{kind}")
    return lines


def relative(path: str, folder: Path) -> str:
    return os.path.relpath(path, folder) if os.path.isabs(path) else path


def told(callback: Any, folder: Path) -> dict[str, Any]:
    """What the callback says of its files."""
    shown: dict[str, Any] = {name: relative(getattr(callback, name), folder) for name in PATHS}
    shown |= {name: round(float(getattr(callback, name)), 3) for name in SCORES if getattr(callback, name) is not None}
    kept = {relative(path, folder): round(float(score), 3) for path, score in callback.best_k_models.items()}
    return {"state_key": callback.state_key, **shown, "best_k_models": kept}


def fit(pl: Any, *callbacks: Any, again: Any = None, **settings: Any) -> Any:
    """Fit a new module, or `again` that one, and return the Trainer."""
    options = {key: settings.pop(key) for key in ("fails_at", "validates") if key in settings}
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(pl, callbacks=list(callbacks), **{"max_epochs": 3, "enable_checkpointing": True, **settings})
    with contextlib.suppress(ArithmeticError):
        run.fit(module(pl, **options) if again is None else again, loader(4), loader(1), ckpt_path=ckpt_path)
    return run


def one(options: dict[str, Any], **settings: Any) -> Callable[[Any], Any]:
    """A case: what one ModelCheckpoint with these options leaves, with these settings of the Trainer."""
    return lambda pl: several(pl, options, **settings)


def several(pl: Any, *options: dict[str, Any], **settings: Any) -> dict[str, Any]:
    folder = Path.cwd()
    callbacks = [part(pl, "callbacks").ModelCheckpoint(**each) for each in options]
    fit(pl, *callbacks, **settings)
    return {"files": listed(folder), **{f"callback {n}": told(each, folder) for n, each in enumerate(callbacks)}}


def logged_by(kind: str, *arguments: str) -> Callable[[Any], Any]:
    """A case: where checkpoints lie beside a logger."""

    def case(pl: Any) -> Any:
        return several(pl, {}, logger=getattr(part(pl, "loggers"), kind)(*arguments))

    return case


def by_default(pl: Any) -> Any:
    """Nothing but a Trainer: its own ModelCheckpoint and logger, twice."""
    for _ in range(2):
        fit(pl, logger=True, max_epochs=1)
    return listed(Path.cwd())


def named(pl: Any) -> Any:
    """A subclass that names its files otherwise."""

    class Named(part(pl, "callbacks").ModelCheckpoint):
        CHECKPOINT_JOIN_CHAR = "_"
        CHECKPOINT_EQUALS_CHAR = "-"
        CHECKPOINT_NAME_LAST = "newest_{epoch}"
        FILE_EXTENSION = ".pt"
        STARTING_VERSION = 7

    for _ in range(2):
        fit(pl, Named(dirpath="c", save_last=True), max_epochs=1)
    return listed(Path.cwd())


def twice(pl: Any, **options: Any) -> Any:
    """Two runs with callbacks of their own, in one folder."""
    for _ in range(2):
        several(pl, {"dirpath": "c", **options}, max_epochs=2)
    return listed(Path.cwd())


def longer(pl: Any, **options: Any) -> Any:
    """One Trainer that fits, and then goes on."""
    callback = part(pl, "callbacks").ModelCheckpoint(dirpath="c", **options)
    again = module(pl)
    run = fit(pl, callback, again=again, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(again, loader(4), loader(1))
    return {"files": listed(Path.cwd()), "callback": told(callback, Path.cwd())}


def resumed(pl: Any, elsewhere: bool = False, **options: Any) -> Any:
    """A second run that goes on from the newest file of the first."""
    fit(pl, part(pl, "callbacks").ModelCheckpoint(dirpath="c", save_last=True, **options), max_epochs=2)
    callback = part(pl, "callbacks").ModelCheckpoint(dirpath="d" if elsewhere else "c", save_last=True, **options)
    going_on = module(pl)
    going_on.__dict__["validations"] = 2
    fit(pl, callback, again=going_on, max_epochs=4, ckpt_path="c/last.ckpt")
    return {"files": listed(Path.cwd()), "callback": told(callback, Path.cwd())}


def as_yaml(pl: Any) -> Any:
    callback = part(pl, "callbacks").ModelCheckpoint(dirpath="c", monitor="val_loss", save_top_k=2)
    fit(pl, callback)
    callback.to_yaml()
    callback.to_yaml("other.yaml")
    texts = [yaml.safe_load(Path(name).read_text()) for name in ("c/best_k_models.yaml", "other.yaml")]
    assert texts[0] == texts[1]
    return {relative(path, Path.cwd()): round(score, 3) for path, score in texts[0].items()}


def formatted(pl: Any) -> dict[str, str]:
    """What `format_checkpoint_name` makes of names."""
    metrics = {
        "epoch": torch.tensor(3),
        "step": torch.tensor(40),
        "val_loss": torch.tensor(0.12345),
        "a/b": torch.tensor(7),
    }
    shown = {}
    for filename in (
        None,
        "x",
        "{epoch}",
        "{epoch:03d}-{step}",
        "{val_loss:.2f}",
        "{val_loss:.1e}_{a/b:.0f}",
        "best-{missing}",
        "{epoch}-{epoch}",
        "epoch={epoch}-{val_loss:.3f}",
        "folder/{step:06d}",
        "{a/b}",
        "{val_loss}",
    ):
        for inserts in (True, False):
            for prefix, version in ((None, None), ("p", 2)):
                made = part(pl, "callbacks").ModelCheckpoint(filename=filename, auto_insert_metric_name=inserts)
                arguments = (
                    f"filename={filename!r}, auto_insert_metric_name={inserts}, prefix={prefix!r}, ver={version}"
                )
                given = {} if prefix is None else {"prefix": prefix}
                shown[arguments] = made.format_checkpoint_name(metrics, ver=version, **given)
    return shown


BEST = {"monitor": "val_loss"}
CASES: dict[str, Callable[[Any], Any]] = {
    "default": one({}),
    "by default, twice": by_default,
    **{
        f"monitor val_loss, mode {mode}, save_top_k {k}": one({**BEST, "mode": mode, "save_top_k": k}, max_epochs=6)
        for mode in ("min", "max")
        for k in (0, 1, 3, -1)
    },
    **{f"save_top_k {k}": one({"save_top_k": k}) for k in (0, -1)},
    **{
        f"save_last {last}, {words}": one({"save_last": last, **options})
        for last in (True, "link", False)
        for words, options in {
            "newest": {},
            "best": {**BEST},
            "none": {"save_top_k": 0},
            "best by steps": {**BEST, "every_n_train_steps": 2},
            "named": {"filename": "m-{epoch}"},
        }.items()
    },
    "save_weights_only": one({"save_weights_only": True, "save_last": True}),
    "every_n_train_steps 1": one({"every_n_train_steps": 1}, max_epochs=1),
    "every_n_train_steps 5, all": one({"every_n_train_steps": 5, "save_top_k": -1}),
    "every_n_train_steps 2, best of a training value": one(
        {"every_n_train_steps": 2, "save_top_k": 2, "monitor": "steps", "mode": "max"}
    ),
    "every_n_train_steps 2, best of a validation value": one({"every_n_train_steps": 2, "save_top_k": -1, **BEST}),
    "every_n_train_steps 3, mid-epoch validation": one(
        {"every_n_train_steps": 3, "save_top_k": -1, **BEST}, val_check_interval=0.5
    ),
    "every_n_train_steps 1, accumulating": one(
        {"every_n_train_steps": 1, "save_top_k": -1}, accumulate_grad_batches=3, max_epochs=2
    ),
    **{f"every_n_epochs {n}": one({"every_n_epochs": n, "save_top_k": -1}) for n in (0, 1, 2, 3, 4)},
    "train_time_interval": one({"train_time_interval": timedelta(0), "save_top_k": -1}, max_epochs=1),
    "train_time_interval, long": one({"train_time_interval": timedelta(days=1), "save_top_k": -1}),
    **{
        f"save_on_train_epoch_end {when}, {words}": one(
            {"save_on_train_epoch_end": when, "save_top_k": -1, **BEST}, **settings
        )
        for when in (None, True, False)
        for words, settings in {
            "one validation an epoch": {},
            "two validations an epoch": {"val_check_interval": 0.5},
            "a validation every two epochs": {"check_val_every_n_epoch": 2, "max_epochs": 4},
            "sanity": {"num_sanity_val_steps": 1, "max_epochs": 1},
        }.items()
    },
    "without validation": one({"save_top_k": -1}, limit_val_batches=0),
    "without validation, a value of the epoch's end": one(
        {"save_top_k": 2, "monitor": "at_end", "mode": "max"}, limit_val_batches=0
    ),
    "validation by batches": one({"save_top_k": -1}, val_check_interval=3, check_val_every_n_epoch=None),
    "max_steps within an epoch": one({"save_top_k": -1, "save_last": True}, max_steps=6),
    "max_steps within an epoch, by steps": one({"every_n_train_steps": 4, "save_last": True}, max_steps=6),
    "no steps": one({"save_last": True}, limit_train_batches=0),
    **{
        f"filename {name!r}, auto_insert_metric_name {inserts}": one(
            {"filename": name, "auto_insert_metric_name": inserts, "monitor": "val/loss"}
        )
        for name in (
            "best",
            "{epoch:02d}-{val_loss:.2f}",
            "m-{val/loss:.3f}",
            "runs/{step}",
            "{missing}",
            "{epoch}-{steps:.0f}",
        )
        for inserts in (True, False)
    },
    "a name that comes again": one({"filename": "same", "save_top_k": -1}),
    "a name that comes again, overwritten": one(
        {"filename": "same", "save_top_k": -1, "enable_version_counter": False}
    ),
    "a name that comes again, best two": one({"filename": "same", "save_top_k": 2, **BEST}, max_epochs=6),
    "dirpath": one({"dirpath": "mine/deep"}),
    "dirpath, with a logger": lambda pl: several(pl, {"dirpath": "mine"}, logger=part(pl, "loggers").CSVLogger("logs")),
    "CSVLogger": logged_by("CSVLogger", "logs"),
    "CSVLogger, named": logged_by("CSVLogger", "logs", "name", "mine"),
    "TensorBoardLogger": logged_by("TensorBoardLogger", "logs", "name", "3"),
    "two loggers": lambda pl: several(
        pl, {}, logger=[part(pl, "loggers").CSVLogger("one", "a"), part(pl, "loggers").CSVLogger("two", "b")]
    ),
    "default_root_dir": one({}, default_root_dir="root"),
    "default_root_dir, with the default logger": one({}, default_root_dir="root", logger=True),
    "save_on_exception": one({"save_on_exception": True}, fails_at=6),
    "save_on_exception, all, last": one({"save_on_exception": True, "save_top_k": -1, "save_last": True}, fails_at=6),
    "an exception": one({"save_last": True}, fails_at=6),
    "several": lambda pl: several(
        pl, {**BEST, "filename": "best-{epoch}"}, {"every_n_train_steps": 6, "filename": "{step}", "save_top_k": -1}
    ),
    "several that are alike": lambda pl: several(pl, {"dirpath": "a"}, {"dirpath": "b", "every_n_epochs": 2}),
    "several of one folder": lambda pl: several(
        pl, {**BEST}, {"monitor": "val_loss", "mode": "max"}, {"monitor": "steps", "mode": "max"}
    ),
    "fast_dev_run": one({"save_last": True}, fast_dev_run=True),
    "names of a subclass, twice": named,
    "twice": twice,
    "twice, last": lambda pl: twice(pl, save_last=True),
    "twice, overwritten": lambda pl: twice(pl, save_last=True, enable_version_counter=False),
    "longer": longer,
    "longer, best": lambda pl: longer(pl, **BEST, save_last=True),
    "resumed": resumed,
    "resumed, best two": lambda pl: resumed(pl, **BEST, save_top_k=2),
    "resumed, all": lambda pl: resumed(pl, save_top_k=-1),
    "resumed elsewhere": lambda pl: resumed(pl, elsewhere=True, **BEST, save_top_k=2),
    "to_yaml": as_yaml,
    "format_checkpoint_name": formatted,
}


def record(pl: Any) -> dict[str, Any]:
    """Every case's files, by the case's name."""
    return {name: in_own_folder(case, pl) for name, case in CASES.items()}
