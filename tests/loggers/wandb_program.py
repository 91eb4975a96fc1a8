"""Run by test_wandb.py in a process of its own, for wandb's service ends with the process: logs, and tells what came.

It prints JSON: by case, what the test is to look at.
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import wandb
from torch import Tensor, nn
from wandb.proto import wandb_internal_pb2

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.loggers import WandbLogger

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
LAST_PARTS = (1, 4)


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a run's file, which has LevelDB's log format: blocks, and in them parts of records."""
    content, position, whole = path.read_bytes(), FILE_HEADER, b""
    while position + RECORD_HEADER <= len(content):
        if BLOCK - position % BLOCK < RECORD_HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += RECORD_HEADER
        whole += content[position : position + length]
        position += length
        if kind in LAST_PARTS:
            yield whole
            whole = b""


def told(folder: Path) -> dict[str, Any]:
    """What the newest run in a folder has recorded."""
    path = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    found: dict[str, Any] = {"history": [], "config": {}, "artifacts": [], "files": sorted(names(path.parent))}
    for payload in payloads(path):
        record = wandb_internal_pb2.Record.FromString(payload)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found["history"].append({key: json.loads(value) for key, value in items.items() if key[0] != "_"})
        for update in (record.run.config.update, record.config.update):
            found["config"].update({item.key: json.loads(item.value_json) for item in update if item.key[0] != "_"})
        if record.HasField("run"):
            found["run"] = [record.run.run_id, record.run.project, record.run.display_name]
        artifact = record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        if artifact.type == "model":
            found["artifacts"].append([artifact.name, list(artifact.aliases), json.loads(artifact.metadata)])
    return found


def names(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.glob("files/media/**/*") if path.is_file())


class Net(pl.LightningModule):
    def __init__(self, lr: float = 0.5, net: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", float(batch_idx))
        self.log("score", -float(self.trainer.current_epoch), on_step=False, on_epoch=True)
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(logger: WandbLogger, callback: ModelCheckpoint, **arguments: Any) -> None:
    trainer = pl.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **arguments},
        logger=logger,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(net={"width": 8, "act": "relu"}), [torch.ones(2, 2)] * 2)


def a_run_of_the_trainer(folder: Path) -> dict[str, Any]:
    logger = WandbLogger("first", folder, offline=True, id="run1", project="try", prefix="p", tags=["t"])
    callback = ModelCheckpoint()
    fit(logger, callback)
    copy = pickle.loads(pickle.dumps(logger))
    facts = [logger.name, logger.version, logger.save_dir, copy.version, copy._experiment is None]
    wandb.finish()
    return {"facts": facts, "checkpoint": callback.best_model_path}


def two_ranks(folder: Path) -> dict[str, Any]:
    logger, callback = WandbLogger(save_dir=folder, offline=True), ModelCheckpoint()
    fit(logger, callback, devices=2, max_epochs=1)
    version = logger.version
    wandb.finish()
    runs = len(list(folder.glob("wandb/offline-run-*")))
    return {"runs": runs, "version": version, "checkpoint": callback.best_model_path}


def media(folder: Path) -> dict[str, Any]:
    logger = WandbLogger(save_dir=folder, offline=True)
    logger.log_text("text", columns=["a", "b"], data=[["x", "y"]], step=3)
    logger.log_image("images", [torch.zeros(3, 4, 4), torch.ones(3, 4, 4)], step=3, caption=["black", "white"])
    logger.log_hyperparams({"act": nn.ReLU, "deep": {"er": (1, 2)}})
    model = nn.Linear(2, 1)
    logger.watch(model, log="all", log_freq=1)
    model(torch.ones(1, 2)).sum().backward()
    watched = model.weight._backward_hooks is not None and len(model.weight._backward_hooks)
    logger.unwatch(model)
    left = len(model.weight._backward_hooks or ())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second = WandbLogger(save_dir=folder, offline=True)
        same = second.experiment is logger.experiment
    wrong = []
    for arguments in ({"images": "a.png"}, {"images": ["a.png"], "caption": ["x", "y"]}):
        try:
            logger.log_image("wrong", **arguments)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            wrong.append(str(error))
    wandb.finish()
    messages = [str(entry.message) for entry in caught if "WandbLogger" in str(entry.message)]
    return {"watched": [watched, left], "wrong": wrong, "reused": [same, *messages]}


def artifacts_at_the_end(folder: Path) -> dict[str, Any]:
    return artifacts(folder, log_model=True)


def artifacts_as_they_are_written(folder: Path) -> dict[str, Any]:
    return artifacts(folder, log_model="all")


def artifacts(folder: Path, log_model: Any) -> dict[str, Any]:
    logger = WandbLogger(save_dir=folder, mode="offline", log_model=log_model, id="run2")
    fit(logger, ModelCheckpoint(monitor="score", mode="min", save_top_k=1))
    wandb.finish()
    return {}


if __name__ == "__main__":
    top = Path(sys.argv[1])
    cases = (a_run_of_the_trainer, two_ranks, media, artifacts_at_the_end, artifacts_as_they_are_written)
    returned = {case.__name__: case(top / case.__name__) for case in cases}
    wandb.teardown()  # the service may still be writing
    (top / "told.json").write_text(json.dumps({name: {**told(top / name), **returned[name]} for name in returned}))
