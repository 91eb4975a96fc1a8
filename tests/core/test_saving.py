"""Checkpoints are written while training goes on, and by whatever `Trainer(plugins=…)` says."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

import lightlite as pl
from lightlite import storage
from lightlite.callbacks import ModelCheckpoint
from lightlite.errors import CheckpointError, MisconfigurationException
from lightlite.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from .models import TRAINING_ALONE, Net, assert_same_bits, quiet_trainer, regression_loader, weights

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Held(TorchCheckpointIO):
    """Writes when it is let; fails where it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.may_write = threading.Event()
        self.fails = fails
        self.calls: list[tuple[str, str]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.may_write.wait(60)
        if self.fails:
            raise OSError(28, "no space left")
        self.calls.append(("save", Path(path).name))
        super().save_checkpoint(checkpoint, path)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", Path(path).name))
        super().remove_checkpoint(path)


def test_what_is_written_is_the_state_of_the_moment_it_was_saved(tmp_path: Path) -> None:
    held = Held()
    writer = AsyncCheckpointIO(held)
    weight, counts = torch.ones(3), {"seen": [1]}
    writer.save_checkpoint({"weight": weight, "view": weight[1:], "counts": counts}, tmp_path / "x.ckpt")
    weight.fill_(7)
    counts["seen"].append(2)
    assert not (tmp_path / "x.ckpt").exists()
    held.may_write.set()
    writer.wait()

    read = storage.read(tmp_path / "x.ckpt")
    assert read["weight"].tolist() == [1, 1, 1]
    assert read["counts"] == {"seen": [1]}
    assert read["view"].untyped_storage().data_ptr() == read["weight"].untyped_storage().data_ptr()


def test_a_second_save_waits_for_the_first_and_takes_its_memory(tmp_path: Path) -> None:
    held = Held()
    writer = AsyncCheckpointIO(held)
    writer.save_checkpoint({"weight": torch.ones(3)}, tmp_path / "1.ckpt")
    first = writer._buffers._used[0].data_ptr()
    threading.Timer(0.2, held.may_write.set).start()
    writer.save_checkpoint({"weight": torch.zeros(3)}, tmp_path / "2.ckpt")
    assert (tmp_path / "1.ckpt").exists()
    assert writer._buffers._used[0].data_ptr() == first
    writer.teardown()
    assert storage.read(tmp_path / "1.ckpt")["weight"].sum() == 3
    assert storage.read(tmp_path / "2.ckpt")["weight"].sum() == 0


def test_training_goes_on_while_a_file_is_written(tmp_path: Path) -> None:
    held = Held()

    class LettingGo(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            found.append(sorted(path.name for path in tmp_path.glob("*.ckpt")))
            if batch_idx == 2:
                held.may_write.set()

    found: list[list[str]] = []
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}", save_last="link")
    plugins = [AsyncCheckpointIO(held)]
    trainer = quiet_trainer(tmp_path, plugins=plugins, callbacks=[LettingGo(), checkpoint], enable_checkpointing=True)
    trainer.fit(Net(), regression_loader(6))

    assert found[2] == []  # the save of step 2 is on its way
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=6.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=6.ckpt"
    assert held.calls == [
        ("save", "step=2.ckpt"),
        ("save", "step=4.ckpt"),
        ("remove", "step=2.ckpt"),
        ("save", "step=6.ckpt"),
        ("remove", "step=4.ckpt"),
    ]


def test_a_checkpoint_that_was_saved_by_the_way_resumes_like_any_other(tmp_path: Path) -> None:
    weights = []
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        pl.seed_everything(1)
        checkpoint = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, async_save=asynchronous)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=checkpoint, enable_checkpointing=True)
        trainer.fit(Net(), regression_loader(4, shuffle=True))
        model = Net()
        trainer = quiet_trainer(tmp_path, max_epochs=2)
        with pytest.warns(UserWarning, match="state of callbacks"):
            trainer.fit(model, regression_loader(4, shuffle=True), ckpt_path=folder / "epoch=0-step=3.ckpt")
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_a_failing_write_is_raised_before_long(tmp_path: Path) -> None:
    held = Held(fails=True)
    held.may_write.set()

    class Counting(pl.Callback):
        steps = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.steps += 1

    counting = Counting()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=100)
    plugins = AsyncCheckpointIO(held)
    trainer = quiet_trainer(
        tmp_path, plugins=plugins, callbacks=[counting, checkpoint], enable_checkpointing=True, max_epochs=5000,
        log_every_n_steps=10_000_000,
    )  # fmt: skip
    with pytest.raises(OSError, match="no space left"):
        trainer.fit(Net(), regression_loader(8))
    assert 100 <= counting.steps < 200


def test_what_was_saved_last_is_on_disk_when_the_program_ends(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from lightlite.plugins import AsyncCheckpointIO; "
        "AsyncCheckpointIO().save_checkpoint({'weight': torch.ones(5_000_000)}, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.ckpt")], check=True)
    assert storage.read(tmp_path / "x.ckpt")["weight"].sum() == 5_000_000


def test_it_can_be_sent_to_other_ranks(tmp_path: Path) -> None:
    writer = AsyncCheckpointIO()
    writer.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    copy = cloudpickle.loads(cloudpickle.dumps(writer))
    copy.save_checkpoint({"a": 2}, tmp_path / "y.ckpt")
    copy.teardown()
    writer.teardown()
    assert [storage.read(tmp_path / name)["a"] for name in ("x.ckpt", "y.ckpt")] == [1, 2]


@pytest.mark.parametrize("removes", [True, False])
def test_a_writer_waits_for_who_takes_its_new_file_for_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removes: bool
) -> None:
    make, sweepers = tempfile.mkstemp, []

    def swept_at_once(**where: Any) -> tuple[int, str]:
        handle, path = make(**where)
        if not sweepers:
            other = os.open(path, os.O_RDONLY)
            fcntl.flock(other, fcntl.LOCK_EX)

            def finish() -> None:
                if removes:
                    os.unlink(path)
                os.close(other)

            sweepers.append(threading.Timer(0.3, finish))
            sweepers[0].start()
        return handle, path

    monkeypatch.setattr(tempfile, "mkstemp", swept_at_once)
    storage.write({"a": 1}, tmp_path / "x.ckpt")
    sweepers[0].join()
    assert storage.read(tmp_path / "x.ckpt")["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_plugin_of_ones_own_reads_and_writes(tmp_path: Path) -> None:
    class InMemory(CheckpointIO):
        def __init__(self) -> None:
            self.kept: dict[str, Any] = {}

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            Path(path).touch()
            self.kept[str(path)] = (checkpoint, storage_options)

        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
            checkpoint: dict[str, Any] = self.kept[str(path)][0]
            return checkpoint

        def remove_checkpoint(self, path: Any) -> None:
            del self.kept[str(path)]

    memory = InMemory()
    trainer = quiet_trainer(tmp_path, plugins=memory, max_epochs=1)
    trainer.fit(Net(), regression_loader(2))
    trainer.save_checkpoint(tmp_path / "x.ckpt", storage_options={"fast": True})
    assert memory.kept[str(tmp_path / "x.ckpt")][1] == {"fast": True}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Net(), regression_loader(2), ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 4


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="give one CheckpointIO"):
        quiet_trainer(tmp_path, plugins=[TorchCheckpointIO(), AsyncCheckpointIO()])
    with pytest.raises(MisconfigurationException, match="Precision, ClusterEnvironment or CheckpointIO"):
        quiet_trainer(tmp_path, plugins="async")
    with pytest.raises(TypeError, match="TorchCheckpointIO has no options"):
        TorchCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={"fast": True})
    writer = AsyncCheckpointIO()
    with pytest.raises(CheckpointError, match="checkpoint\\['x'\\] is <object"):
        writer.save_checkpoint({"x": object()}, tmp_path / "x.ckpt")


def test_last_steps_over_damaged_checkpoints_and_says_so(tmp_path: Path) -> None:
    def resumed_from(**options: Any) -> str | None:
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}", save_last=True)
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=checkpoint, enable_checkpointing=True)
        trainer.fit(Net(), regression_loader(4), **options)
        return None if trainer.ckpt_path is None else Path(trainer.ckpt_path).name

    resumed_from()
    assert resumed_from(ckpt_path="last") == "last.ckpt"
    for name, instead in (("last.ckpt", "step=4.ckpt"), ("step=4.ckpt", "step=2.ckpt")):
        damaged = tmp_path / name
        damaged.write_bytes(damaged.read_bytes()[:-100])
        with pytest.warns(UserWarning, match=f"steps over the newest checkpoint, .*{name} is truncated"):
            assert resumed_from(ckpt_path="last") == instead
        if name == "last.ckpt":
            damaged.unlink()


@pytest.mark.filterwarnings(TRAINING_ALONE)
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_checkpoints_are_written_to_and_found_at_urls(tmp_path: Path, scheme: str) -> None:
    folder = f"memory:/{tmp_path}" if scheme == "memory" else f"file://{tmp_path}"

    def trainer(epochs: int) -> pl.Trainer:
        keeper = ModelCheckpoint(f"{folder}/kept", save_last=True)
        return quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[keeper], enable_checkpointing=True)

    torch.manual_seed(0)
    whole = Net()
    quiet_trainer(tmp_path, max_epochs=3).fit(whole, regression_loader(2))
    torch.manual_seed(0)
    first = trainer(1)
    first.fit(Net(), regression_loader(2))
    assert first.checkpoint_callback is not None
    assert str(getattr(first.checkpoint_callback, "last_model_path", "")).endswith("last.ckpt")
    for ckpt_path in ("last", f"{folder}/kept/last.ckpt"):
        resumed = Net()
        again = trainer(3)
        again.fit(resumed, regression_loader(2), ckpt_path=ckpt_path)
        assert again.global_step == 6
        assert_same_bits(weights(resumed), weights(whole))
    loaded = Net.load_from_checkpoint(f"{folder}/kept/last.ckpt")
    assert_same_bits(weights(loaded), weights(whole))


def test_the_memory_for_the_first_save_is_got_beside_the_steps_before_it(tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    free: list[list[int]] = []

    class Looking(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            io.wait()
            free.append(sorted(size for size, kept in io._buffers._free.items() for _ in kept))

    trainer = quiet_trainer(tmp_path, plugins=[io], callbacks=[Looking()])
    trainer.fit(Net(), regression_loader(3))
    assert free == [[], [4, 16], [4, 16]]
