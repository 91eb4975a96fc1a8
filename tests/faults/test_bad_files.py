"""Whatever is wrong with a checkpoint file, it is said, nothing in it is executed, and nothing was changed by then."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import make

import lightlite as pl
from lightlite import storage
from lightlite.errors import CheckpointError
from tests.core.models import Net, quiet_trainer, regression_loader


def saved(folder: Path) -> Path:
    """A sound checkpoint."""
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(Net(), regression_loader(2), regression_loader(1))
    trainer.save_checkpoint(folder / "sound.ckpt")
    return folder / "sound.ckpt"


class Watching(pl.Callback):
    """Notes whether training began."""

    began = False

    def on_train_start(self, *args: Any) -> None:
        self.began = True


@pytest.mark.filterwarnings("ignore:.*state of callbacks")
def test_a_bad_file_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    sound = saved(tmp_path)
    evidence = tmp_path / "evidence"
    for name, says in make(sound, tmp_path / "bad", evidence).items():
        if name == "forbidden.ckpt" and os.geteuid() == 0:
            continue  # root may read everything
        model = Net()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        watching = Watching()
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=watching)
        with pytest.raises(CheckpointError) as caught:
            trainer.fit(model, regression_loader(2), regression_loader(1), ckpt_path=tmp_path / "bad" / name)
        assert says in str(caught.value), name
        assert name in str(caught.value)
        assert not watching.began, name
        assert not evidence.exists(), name
        if name != "no-optimizer.ckpt":
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
        assert trainer.global_step == 0, name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_file_of_somebody_elses_is_named() -> None:
    code = """
import os, sys
from lightlite import storage
storage.write({"a": 1}, sys.argv[1])
storage.read(sys.argv[1])  # imports what reading needs
os.chmod(sys.argv[1], 0)
os.setuid(65534)
storage.read(sys.argv[1])
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = f"{folder}/x.ckpt"
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert f"CheckpointError: the checkpoint {path} may not be read by this user" in done.stderr


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    content = {"state_dict": {"weight": torch.arange(50.0)}, "epoch": 3}
    storage.write(content, path)
    sound = path.read_bytes()
    noticed = 0
    for place in range(0, len(sound), 7):
        flipped = bytearray(sound)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            read = storage.read(path)
        except CheckpointError:
            noticed += 1
        else:
            assert read["epoch"] == 3
            assert torch.equal(read["state_dict"]["weight"], content["state_dict"]["weight"])  # type: ignore[index]
    assert noticed > 50


def test_what_a_killed_writer_left_is_swept_away_but_not_what_another_is_writing(tmp_path: Path) -> None:
    (tmp_path / f".x.ckpt.abc{storage.UNFINISHED}").write_bytes(b"half")
    with storage._temporary(tmp_path / "y.ckpt") as (_, busy):
        storage.write({"a": 1}, tmp_path / "z.ckpt")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([Path(busy).name, "z.ckpt"])
    assert [path.name for path in tmp_path.iterdir()] == ["z.ckpt"]


def test_a_full_disk_is_named_and_what_was_there_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    storage.write({"a": 1}, path)
    code = (
        "import resource, sys, torch; from lightlite import storage; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "storage.write({'a': torch.zeros(1_000_000)}, sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert f"CheckpointError: the checkpoint {path} could not be written: " in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]
    assert storage.read(path) == {"a": 1}
