from __future__ import annotations

import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from lightlite.loggers import CSVLogger
from lightlite.loggers.csv_logs import ExperimentWriter
from lightlite.loggers.logger import DummyExperiment


def text(path: str | Path) -> str:
    return Path(path).read_bytes().decode()


def test_values_land_in_a_row_per_step_with_sorted_columns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="try", flush_logs_every_n_steps=2)
    assert (logger.version, logger.log_dir) == (0, str(tmp_path / "try" / "version_0"))
    logger.log_metrics({"b": torch.tensor(2.0), "a": 1.0}, step=0)
    assert not (tmp_path / "try/version_0/metrics.csv").exists()
    logger.log_metrics({"a": 1.5}, step=1)
    assert text(tmp_path / "try/version_0/metrics.csv") == "a,b,step\r\n1.0,2.0,0\r\n1.5,,1\r\n"


def test_a_new_value_adds_a_column_to_the_rows_before(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="one")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"val_loss": 0.5, "epoch": 0}, step=0)
    logger.log_metrics({"loss": 0.9}, step=1)
    logger.finalize("success")
    expected = "epoch,loss,step,val_loss\r\n,1.0,0,\r\n0,,0,0.5\r\n,0.9,1,\r\n"
    assert text(tmp_path / "lightning_logs/one/metrics.csv") == expected


def test_rows_without_a_step_are_numbered(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    for _ in range(3):
        logger.log_metrics({"a": 1})
    assert text(logger.experiment.metrics_file_path).split() == ["a,step", "1,0", "1,1", "1,2"]


def test_saving_appends_instead_of_writing_anew(tmp_path: Path) -> None:
    writer = ExperimentWriter(str(tmp_path))
    writer.log_metrics({"a": 1}, step=0)
    writer.save()
    identity = Path(writer.metrics_file_path).stat().st_ino
    writer.log_metrics({"a": 2}, step=1)
    writer.save()
    assert Path(writer.metrics_file_path).stat().st_ino == identity
    assert text(writer.metrics_file_path).split() == ["a,step", "1,0", "2,1"]


def test_a_version_that_exists_is_continued_without_its_torn_last_line(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "version_3"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_bytes(b"a,step\r\n0.5,0\r\n0.2")
    logger = CSVLogger(tmp_path, version=3)
    logger.log_metrics({"a": 0.25}, step=1)
    logger.log_metrics({"b": 1.0}, step=2)
    logger.save()
    assert text(folder / "metrics.csv") == "a,b,step\r\n0.5,,0\r\n0.25,,1\r\n,1.0,2\r\n"


def test_the_prefix_stands_before_every_name_but_the_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="run", flush_logs_every_n_steps=1)
    logger.log_metrics({"a": 1}, step=4)
    assert text(logger.experiment.metrics_file_path).split() == ["run-a,step", "1,4"]


def test_hyperparameters_become_plain_yaml(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams(Namespace(lr=0.1, layers=(1, 2), act=torch.nn.ReLU, inner={"path": tmp_path, "none": None}))
    logger.log_hyperparams({"seed": 3})
    logger.save()
    assert yaml.safe_load(text(tmp_path / "lightning_logs/version_0/hparams.yaml")) == {
        "lr": 0.1,
        "layers": [1, 2],
        "act": "torch.nn.modules.activation.ReLU",
        "inner": {"path": str(tmp_path), "none": None},
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("name", "version", "folder"),
    [("n", "foo", "n/foo"), ("", 3, "version_3"), (None, 4, "version_4"), ("a/b", 0, "a/b/version_0")],
)
def test_folders_are_named_as_documented(tmp_path: Path, name: str | None, version: int | str, folder: str) -> None:
    assert CSVLogger(tmp_path, name=name, version=version).log_dir == str(tmp_path / folder)


def test_versions_count_on(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs" / "version_9").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_x").mkdir()
    assert [CSVLogger(tmp_path).version for _ in range(2)] == [10, 11]


def test_runs_started_at_once_get_different_versions(tmp_path: Path) -> None:
    code = "from lightlite.loggers import CSVLogger; print(CSVLogger('.').version)"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert sorted(run.communicate()[0].strip() for run in runs) == ["0", "1", "2", "3"]


def test_a_copy_for_another_rank_keeps_the_version_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    copy = pickle.loads(pickle.dumps(logger))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (copy.version, copy.log_dir) == (0, logger.log_dir)
    assert isinstance(copy.experiment, DummyExperiment)
    copy.log_metrics({"a": 1.0}, step=0)
    copy.save()
    assert not (Path(copy.log_dir) / "metrics.csv").exists()


def test_other_ranks_take_rank_zeros_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_zero, on_one = CSVLogger(tmp_path), CSVLogger(tmp_path)
    said: list[object] = []
    on_zero.share(lambda value: said.append(value) or value)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    on_one.share(lambda _: said[0])
    assert on_one.version == on_zero.version == 0


def test_logging_to_a_url_works_like_logging_to_a_folder() -> None:
    import fsspec

    logger = CSVLogger("memory://logs", version=0, flush_logs_every_n_steps=1)
    logger.log_metrics({"a": 1}, step=0)
    logger.log_metrics({"a": 2}, step=1)
    with fsspec.open("memory://logs/lightning_logs/version_0/metrics.csv", "r") as file:
        assert file.read().split() == ["a,step", "1,0", "2,1"]
