"""WandbLogger against the real library, offline: what stands in the run's file. `wandb_program.py` is what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightlite.errors import MisconfigurationException
from lightlite.loggers import WandbLogger

PROGRAM = Path(__file__).with_name("wandb_program.py")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("wandb")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        cwd=folder,
        env={**variables, "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(folder), "WANDB_CONFIG_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads((folder / "told.json").read_text()), "folder": folder}


def test_a_run_of_the_trainer_has_its_values_steps_and_hyperparameters(told: dict[str, Any]) -> None:
    run = told["a_run_of_the_trainer"]
    step = "trainer/global_step"
    assert [(row[step], row["p-loss"]) for row in run["history"] if "p-loss" in row] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert [(row[step], row["p-score"]) for row in run["history"] if "p-score" in row] == [(1, 0), (3, -1)]
    assert run["config"] == {"lr": 0.5, "net": {"width": 8, "act": "relu"}}
    assert run["run"] == ["run1", "try", "first"]


def test_name_version_and_folder_are_project_id_and_save_dir(told: dict[str, Any]) -> None:
    folder = told["folder"] / "a_run_of_the_trainer"
    run = told["a_run_of_the_trainer"]
    assert run["facts"] == ["try", "run1", str(folder), "run1", True]
    assert run["checkpoint"] == str(folder / "try" / "run1" / "checkpoints" / "epoch=1-step=4.ckpt")


def test_two_ranks_make_one_run_and_know_its_id(told: dict[str, Any]) -> None:
    found = told["two_ranks"]
    assert found["runs"] == 1
    assert Path(found["checkpoint"]).parts[-4:-1] == ("lightning_logs", found["version"], "checkpoints")


def test_text_images_and_nested_hyperparameters_are_recorded(told: dict[str, Any]) -> None:
    run = told["media"]
    first, second = run["history"][:2]
    assert (first["text/ncols"], first["text/nrows"], first["trainer/global_step"]) == (2, 1, 3)
    assert (second["images/count"], second["images/captions"]) == (2, ["black", "white"])
    assert [Path(name).suffix for name in run["files"]] == [".png", ".png", ".json"]
    assert run["config"] == {"act": "torch.nn.modules.activation.ReLU", "deep": {"er": [1, 2]}}


def test_a_model_is_watched_until_it_is_not(told: dict[str, Any]) -> None:
    assert told["media"]["watched"] == [1, 0]
    recorded = {name for row in told["media"]["history"] for name in row}
    assert any(name.startswith("gradients/weight") for name in recorded)
    assert any(name.startswith("parameters/weight") for name in recorded)


def test_an_open_run_is_used_with_a_warning(told: dict[str, Any]) -> None:
    same, message = told["media"]["reused"]
    assert same is True
    assert "is open already; for a run of its own, call wandb.finish() before" in message


def test_wrong_media_are_told_by_number_and_type(told: dict[str, Any]) -> None:
    assert told["media"]["wrong"] == [
        "images='a.png' is a str; give a list",
        "caption has 2 items for 1 images; give one for each",
    ]


def test_checkpoints_become_artifacts_at_the_end_or_as_they_are_written(told: dict[str, Any]) -> None:
    at_the_end, all_of_them = (
        told[name]["artifacts"] for name in ("artifacts_at_the_end", "artifacts_as_they_are_written")
    )
    assert [(name, sorted(aliases)) for name, aliases, _ in at_the_end] == [("model-run2", ["best", "latest"])]
    files = [metadata["original_filename"] for _, _, metadata in all_of_them]
    assert files == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
    metadata = at_the_end[0][2]
    assert metadata["score"] == -1.0
    assert (metadata["ModelCheckpoint"]["monitor"], metadata["ModelCheckpoint"]["mode"]) == ("score", "min")


def test_checkpoints_cannot_be_uploaded_offline() -> None:
    with pytest.raises(MisconfigurationException, match=r"offline=True, log_model='all'.*leave out one of the two"):
        WandbLogger(offline=True, log_model="all")
    with pytest.raises(MisconfigurationException, match="log_model='best'"):
        WandbLogger(log_model="best")


def test_a_missing_wandb_is_said_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlite.loggers.logger.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        WandbLogger()
