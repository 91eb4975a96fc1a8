from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_memory import compare
from fsdp_models import Blocks, fit, samples, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite import storage
from lightlite.callbacks import Callback, ModelCheckpoint
from lightlite.errors import CheckpointError
from lightlite.plugins.fsdp import FSDPStrategy

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader", "ignore:.*holds the state of callbacks")


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


class Held(Callback):
    """Notes how many bytes of parameters and optimizer states this rank holds, and which parts are units."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tensors = [*pl_module.parameters()]
        for optimizer in trainer.optimizers:
            tensors += [value for state in optimizer.state.values() for value in state.values()]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        held = sum(tensor.nbytes for tensor in local)
        units = sum(isinstance(part, FSDPModule) for part in pl_module.modules())
        pl_module.held = max(pl_module.trainer.strategy.all_gather(torch.tensor(held)).tolist())  # type: ignore[operator]
        pl_module.units = units  # type: ignore[assignment]


@pytest.mark.parametrize("devices", [2, 3])
def test_losses_are_those_of_ddp_at_a_share_of_the_memory(tmp_path: Path, devices: int) -> None:
    found = {}
    for strategy in ("ddp", "fsdp"):
        made = trainer(tmp_path, strategy, devices, callbacks=[Held()], gradient_clip_val=0.5, max_epochs=3)
        found[strategy] = fit(made, Blocks(normalizes=True)), made.predict(dataloaders=DataLoader(samples(25), 5))
    (ddp, expected), (fsdp, predicted) = found["ddp"], found["fsdp"]
    for ours, theirs in zip(fsdp.losses, ddp.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(fsdp.losses) == 3
    assert_same(fsdp.state_dict(), ddp.state_dict(), 1e-6)
    torch.testing.assert_close(torch.cat(predicted), torch.cat(expected), rtol=0, atol=1e-6)
    assert (ddp.units, fsdp.units) == (0, 3)
    assert fsdp.held <= 0.6 * ddp.held
    assert [type(part) for part in fsdp.modules()] == [type(part) for part in ddp.modules()]
    assert all(type(parameter) is nn.Parameter for parameter in fsdp.parameters())
    copy.deepcopy(fsdp)(torch.ones(2, 6)).sum().backward()  # it is an ordinary module again


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A fit on two ranks for each kind of checkpoint, and its folder: every third step, and the last."""
    found: dict[str, Any] = {}
    for kind in ("full", "sharded"):
        folder = tmp_path_factory.mktemp(kind)
        keeper = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True)
        strategy = FSDPStrategy(state_dict_type=kind)  # type: ignore[arg-type]
        made = trainer(folder, strategy, callbacks=[keeper], enable_checkpointing=True)
        found[kind] = folder, fit(made, Blocks()).state_dict()
        assert sorted(path.name for path in folder.iterdir()) == [
            "last.ckpt", "step=3.ckpt", "step=6.ckpt", "step=9.ckpt"
        ]  # fmt: skip
    return found


def test_both_kinds_of_checkpoint_are_saved_without_a_change_to_the_fit(trained: dict[str, Any]) -> None:
    assert (trained["full"][0] / "step=3.ckpt").is_file()
    assert (trained["sharded"][0] / "step=3.ckpt").is_dir()
    assert_same(trained["full"][1], trained["sharded"][1])


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize(("strategy", "devices"), [("fsdp", 2), ("fsdp", 1), ("fsdp", 3), ("single", 1), ("ddp", 2)])
def test_a_fit_goes_on_from_a_checkpoint_on_any_number_of_ranks(
    tmp_path: Path, trained: dict[str, Any], kind: str, strategy: str, devices: int
) -> None:
    folder, expected = trained[kind]
    made = trainer(tmp_path, strategy, devices)
    resumed = fit(made, Blocks(), folder / "step=3.ckpt")
    assert made.global_step == 10
    assert_same(resumed.state_dict(), expected, 0.0 if (strategy, devices) == ("fsdp", 2) else 1e-6)


def test_a_checkpoint_of_ddp_goes_on_with_fsdp(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(trainer(tmp_path, "ddp", callbacks=[keeper], enable_checkpointing=True), Blocks()).state_dict()
    resumed = fit(trainer(tmp_path, "fsdp"), Blocks(), tmp_path / "step=6.ckpt").state_dict()
    assert_same(resumed, whole, 1e-6)


class FailsToLoad(Callback):
    """Has something against each checkpoint."""

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        raise ValueError("not this one")


def test_what_a_failed_call_was_to_load_is_forgotten(tmp_path: Path, trained: dict[str, Any]) -> None:
    made = trainer(tmp_path, "fsdp", 1, callbacks=[FailsToLoad()])
    with pytest.raises(ValueError, match="not this one"):
        fit(made, Blocks(), trained["full"][0] / "last.ckpt")
    module = Blocks()
    module.configure_model()
    own = copy.deepcopy(module.state_dict())
    made.validate(module, DataLoader(samples(3), 1), verbose=False)
    assert_same(module.state_dict(), own)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_is_validated_and_loaded(tmp_path: Path, trained: dict[str, Any], kind: str) -> None:
    folder, expected = trained[kind]
    for where in (None, "cpu", {"cuda:0": "cpu"}, lambda storage, _: storage):
        loaded = Blocks.load_from_checkpoint(folder / "last.ckpt", map_location=where)
        assert_same(loaded.state_dict(), expected)
    data = DataLoader(samples(3), 1)
    scores = [
        trainer(tmp_path, strategy, devices).validate(Blocks(), data, folder / "last.ckpt", verbose=False)[0]
        for strategy, devices in (("single", 1), ("fsdp", 2))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


PLAIN = """
import sys, torch, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

folder, out = sys.argv[1:]
dcp_to_torch_save(folder, out)
whole = torch.load(out)["state_dict"]
state = {"state_dict": {name: torch.zeros_like(value) for name, value in whole.items()}}
dcp.load(state, checkpoint_id=folder)
assert all(torch.equal(state["state_dict"][name], value) for name, value in whole.items())
assert not any(name.startswith("lightlite") for name in sys.modules)
"""


def test_shards_are_read_by_pytorch_alone(tmp_path: Path, trained: dict[str, Any]) -> None:
    folder, expected = trained["sharded"]
    out = tmp_path / "whole.pt"
    subprocess.run([sys.executable, "-c", PLAIN, folder / "last.ckpt", out], check=True)
    assert_same(dict(torch.load(out)["state_dict"]), dict(expected))


def damaged(folder: Path, copy: Path, file: str, change: Any) -> Path:
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(change(path.read_bytes()) if path.name == file else path.read_bytes())
    return copy


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"])
def test_a_damaged_folder_is_no_checkpoint(tmp_path: Path, trained: dict[str, Any], file: str) -> None:
    sound = trained["sharded"][0] / "last.ckpt"
    assert storage.damage(sound) is None
    for name, change in (("truncated", lambda content: content[: len(content) // 2]), ("flipped", flipped)):
        copied = damaged(sound, tmp_path / name, file, change)
        assert storage.damage(copied)
        with pytest.raises(CheckpointError):
            storage.read(copied)


def test_a_folder_that_would_run_code_runs_none(tmp_path: Path, trained: dict[str, Any]) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    copied = damaged(
        trained["sharded"][0] / "last.ckpt", tmp_path / "copy", ".metadata", lambda _: pickle.dumps(Malicious())
    )
    with pytest.raises(CheckpointError, match=r"names posix\.system, which is not looked up"):
        storage.read(copied)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_names_files_elsewhere_reads_none_of_them(tmp_path: Path, trained: dict[str, Any]) -> None:
    copied = damaged(
        trained["sharded"][0] / "last.ckpt",
        tmp_path / "copy",
        ".metadata",
        lambda content: content.replace(b"__0_0.distcp", b"../../secret"),
    )
    with pytest.raises(CheckpointError, match=r"names '\.\./\.\./secret', which is no file of its own folder"):
        storage.read(copied)


class FailsToWrite(Callback):
    """Saves where rank one's shards cannot be written, over a checkpoint that is there."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "one.ckpt"
        trainer.save_checkpoint(path)
        before = sorted(path.iterdir())
        trainer.save_checkpoint(path)
        assert sorted(path.iterdir()) == before
        io = trainer.strategy.checkpoint_io

        def write(tensors: Any, folder: str) -> None:
            if trainer.global_rank == 1:
                raise OSError("no space left")

        with pytest.raises(CheckpointError, match=r"OSError: no space left\. What was there before is there still"):
            io.save_shards({"state_dict": {}}, path, write)
        with pytest.raises(CheckpointError, match="every rank writes into one folder"):
            trainer.save_checkpoint("memory://one.ckpt")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    left = tmp_path / ".one.ckpt.abc.ckpt-tmp"
    left.mkdir()  # what a killed writer leaves
    made = trainer(tmp_path, FSDPStrategy(state_dict_type="sharded"), callbacks=[FailsToWrite()], max_epochs=1)
    module = fit(made, Blocks())
    assert [path.name for path in tmp_path.iterdir()] == ["one.ckpt"]
    assert_same(Blocks.load_from_checkpoint(tmp_path / "one.ckpt").state_dict(), module.state_dict())


def test_what_an_optimizer_has_is_saved_within_the_fit(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1)
    module = fit(made, Blocks())
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert_same(Blocks.load_from_checkpoint(tmp_path / "weights.ckpt").state_dict(), module.state_dict())
    with pytest.raises(CheckpointError, match="spread over ranks that have parted; save within the fit"):
        made.save_checkpoint(tmp_path / "all.ckpt")


def test_the_program_that_measures_memory_runs() -> None:
    found = compare(width=64, layers=2)
    ddp, fsdp = ([report["held"] for report in found[strategy]] for strategy in ("ddp", "fsdp"))
    assert ddp == [3 * 4 * 2 * (64 * 64 + 64) + 4 * 4] * 2
    assert max(fsdp) <= 0.6 * max(ddp)
