"""Files of one's own loop: what goes in, what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightlite.errors import CheckpointError, CheckpointNotFoundError
from lightlite.fabric import Fabric

from .loops import Net, equal, one_device, weights


def trained(fabric: Fabric, seed: int) -> dict[str, Any]:
    """A module, an optimizer and a scheduler after one step."""
    torch.manual_seed(seed)
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": seed, "note": ["a", 0.5]}


def test_everything_with_a_state_comes_back_in_place_and_plain_values_in_the_dict(tmp_path: Path) -> None:
    fabric = one_device()
    one, other = trained(fabric, 1), trained(fabric, 2)
    fabric.save(tmp_path / "new" / "state.ckpt", {**one, "more": 7})
    assert fabric.load(tmp_path / "new" / "state.ckpt", other) == {"more": 7}
    assert equal(weights(one["model"]), weights(other["model"]))
    assert str(one["optimizer"].state_dict()) == str(other["optimizer"].state_dict())
    assert other["scheduler"].last_epoch == 1
    assert (other["step"], other["note"]) == (1, ["a", 0.5])


def test_the_file_is_plain_and_holds_bare_names(tmp_path: Path) -> None:
    fabric = one_device(precision="16-mixed")
    fabric.save(tmp_path / "state.ckpt", {**trained(fabric, 1), "scaler": fabric.scaler})
    content = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert content["model"].keys() == Net().state_dict().keys()
    assert fabric.scaler is not None
    assert content["scaler"] == fabric.scaler.state_dict()
    assert fabric.load(tmp_path / "state.ckpt").keys() == content.keys()


def test_a_filter_chooses_entries_of_one_state(tmp_path: Path) -> None:
    fabric = one_device()
    state = trained(fabric, 1)
    fabric.save(tmp_path / "biases.ckpt", state, filter={"model": lambda name, value: name.endswith("bias")})
    content = fabric.load(tmp_path / "biases.ckpt")
    assert list(content["model"]) == ["first.bias", "norm.bias", "last.bias"]
    assert content["optimizer"].keys() == {"state", "param_groups"}
    with pytest.raises(ValueError, match=r"names \['models'\], but state has 'model', 'optimizer'"):
        fabric.save(tmp_path / "x", state, filter={"models": lambda name, value: True})
    with pytest.raises(TypeError, match="give a dict from a name in state to a function"):
        fabric.save(tmp_path / "x", state, filter={"model": "bias"})  # type: ignore[dict-item]


def test_a_raw_file_is_loaded_into_a_module_or_an_optimizer(tmp_path: Path) -> None:
    fabric = one_device()
    one, other = trained(fabric, 1), trained(fabric, 2)
    torch.save(one["model"].state_dict(), tmp_path / "model.pt")
    torch.save(one["optimizer"].state_dict(), tmp_path / "optimizer.pt")
    fabric.load_raw(tmp_path / "model.pt", other["model"])
    fabric.load_raw(tmp_path / "optimizer.pt", other["optimizer"])
    assert equal(weights(one["model"]), weights(other["model"]))
    assert str(one["optimizer"].state_dict()) == str(other["optimizer"].state_dict())


def test_a_name_or_a_weight_that_is_missing_is_an_error_unless_not_strict(tmp_path: Path) -> None:
    fabric = one_device()
    path = tmp_path / "state.ckpt"
    fabric.save(path, {"step": 1, "model": nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="has no 'epoch'; it holds 'step', 'model'"):
        fabric.load(path, {"epoch": 0})
    state: dict[str, Any] = {"epoch": 0, "step": 0}
    assert fabric.load(path, state, strict=False).keys() == {"model"}
    assert state == {"epoch": 0, "step": 1}
    with pytest.raises(TypeError, match=r"was given a Net as state; give a dict by name, as in \{'model': model\}"):
        fabric.load(path, fabric.setup(Net()))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"size mismatch"):
        fabric.load(path, {"model": nn.Linear(2, 2)})


def test_what_only_code_could_restore_and_what_is_not_there_are_errors(tmp_path: Path) -> None:
    fabric = one_device()
    with pytest.raises(CheckpointError, match=r"\['thing'\] is <object .* a checkpoint cannot hold"):
        fabric.save(tmp_path / "state.ckpt", {"thing": object()})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint at"):
        fabric.load(tmp_path / "state.ckpt")
