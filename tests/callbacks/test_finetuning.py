from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import FEATURES, TRAINING_ALONE, assert_same_bits, quiet_trainer, regression_loader, weights
from torch import Tensor, nn

import lightlite as pl
from lightlite.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from lightlite.errors import CheckpointError, MisconfigurationException

from .programs import SavesAfter

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Transfer(pl.LightningModule):
    """A backbone with batch normalization, and a head; only what has gradients is given to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.head = nn.Linear(3, 1)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Stages(BaseFinetuning):
    """All of the backbone is frozen at first; its last layer is thawed in epoch 1, the rest in epoch 2."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[-1], optimizer, initial_denom_lr=5)
        elif epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[:-1], optimizer, lr=0.01)


def twin(net: Transfer) -> Transfer:
    other = Transfer()
    other.load_state_dict(net.state_dict())
    return other


def fit(folder: Path, net: Any, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Any:
    trainer = quiet_trainer(folder, **{"callbacks": list(callbacks), "max_epochs": 4, **settings})
    trainer.fit(net, regression_loader(3, 4), ckpt_path=ckpt_path)
    return trainer


def test_stages_are_thawed_as_in_a_hand_written_loop(tmp_path: Path, seeded: int) -> None:
    net = Transfer()
    expected = twin(net)
    first, norm, _, last = expected.backbone
    optimizer = torch.optim.SGD(expected.head.parameters(), lr=0.1, momentum=0.9)
    norm.track_running_stats = False
    for epoch in range(4):
        if epoch == 1:
            optimizer.add_param_group({"params": list(last.parameters()), "lr": 0.1 / 5})
        elif epoch == 2:
            optimizer.add_param_group({"params": [*first.parameters(), *norm.parameters()], "lr": 0.01})
            norm.track_running_stats = True
        for batch in regression_loader(3, 4):
            expected.zero_grad()
            expected.loss(batch).backward()
            optimizer.step()
    trainer = fit(tmp_path, net, Stages())
    assert_same_bits(weights(net), weights(expected))
    assert net.backbone[1].num_batches_tracked == 6
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.02, 0.01]


class Rates(Callback):
    """Keeps all learning rates of each epoch."""

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append([round(group["lr"], 6) for group in trainer.optimizers[0].param_groups])


def test_the_backbones_rate_grows_up_to_the_heads(tmp_path: Path, seeded: int) -> None:
    rates, net = Rates(), Transfer()
    frozen = net.backbone[0].weight.detach().clone()
    seen: list[bool] = []

    class Watches(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(torch.equal(net.backbone[0].weight, frozen))

    backbone = BackboneFinetuning(2, lambda epoch: epoch / 2, backbone_initial_ratio_lr=0.2)
    fit(tmp_path, net, backbone, rates, Watches(), max_epochs=6)
    assert rates.values == [[0.1], [0.1], [0.1, 0.02], [0.1, 0.04], [0.1, 0.1], [0.1, 0.1]]
    assert seen == [True, True, False, False, False, False]
    rates = Rates()
    own = BackboneFinetuning(1, backbone_initial_lr=0.06, should_align=False, train_bn=False)
    fit(tmp_path, net := Transfer(), own, rates, max_epochs=3)
    assert rates.values == [[0.1], [0.1, 0.06], [0.1, 0.12]]
    # Batch normalization is trained from the start, by the optimizer that was given what has gradients.
    assert net.backbone[1].weight.requires_grad


@pytest.mark.parametrize("moment", [(0, None), (1, 1), (1, None), (2, 0), (2, None)])
@pytest.mark.parametrize("make", [Stages, lambda: BackboneFinetuning(1, backbone_initial_ratio_lr=0.2)])
def test_a_resumed_fit_trains_what_had_been_thawed(tmp_path: Path, seeded: int, make: Any, moment: Any) -> None:
    whole, resumed, path = Transfer(), Transfer(), tmp_path / "saved.ckpt"
    fit(tmp_path, whole, make(), SavesAfter(path, *moment))
    trainer = fit(tmp_path, resumed, make(), ckpt_path=path)
    assert_same_bits(weights(resumed), weights(whole))
    assert all(parameter.requires_grad for parameter in resumed.parameters())
    assert trainer.global_step == 12


def test_a_checkpoint_of_lightnings_thaws_the_groups_that_were_added(tmp_path: Path, seeded: int) -> None:
    whole, resumed, path = Transfer(), Transfer(), tmp_path / "saved.ckpt"
    fit(tmp_path, whole, Stages(), SavesAfter(path, 2))
    saved = torch.load(path, weights_only=True)
    state = saved["callbacks"]["Stages"]
    assert [group["params"] for group in state["internal_optimizer_metadata"][0]] == [
        ["head.weight", "head.bias"],
        ["backbone.3.weight", "backbone.3.bias"],
        ["backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"],
    ]
    del state["trained"]
    torch.save(saved, path)
    fit(tmp_path, resumed, Stages(), ckpt_path=path)
    assert_same_bits(weights(resumed), weights(whole))


def test_a_further_fit_goes_on_with_what_was_thawed(tmp_path: Path, seeded: int) -> None:
    net, rates = Transfer(), Rates()
    trainer = fit(tmp_path, net, BackboneFinetuning(1, backbone_initial_ratio_lr=0.2), rates, max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(net, regression_loader(3, 4))
    assert rates.values == [[0.1], [0.1, 0.02], [0.1, 0.04], [0.1, 0.08]]
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_validating_freezes_nothing(tmp_path: Path) -> None:
    net = Transfer()
    trainer = quiet_trainer(tmp_path, callbacks=[Stages()])
    trainer.validate(net, regression_loader(), verbose=False)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_parameters_that_happen_to_be_equal_are_all_trained(tmp_path: Path, seeded: int) -> None:
    net = Transfer()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(6))], lr=1.0)
    with torch.no_grad():
        net.backbone[0].bias.zero_()
    BaseFinetuning.unfreeze_and_add_param_group(net.backbone[0], optimizer)
    assert optimizer.param_groups[1]["params"] == [net.backbone[0].weight, net.backbone[0].bias]
    assert optimizer.param_groups[1]["lr"] == 0.1


def test_what_the_optimizer_has_already_is_left_where_it_is(tmp_path: Path) -> None:
    net = Transfer()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    BaseFinetuning.unfreeze_and_add_param_group(net.head, optimizer)
    assert len(optimizer.param_groups) == 1
    BaseFinetuning.freeze(net.head)
    with pytest.warns(UserWarning, match="2 of the 4 parameters that are to be thawed are in SGD already"):
        BaseFinetuning.unfreeze_and_add_param_group([net.head, net.backbone[0]], optimizer)
    assert optimizer.param_groups[1]["params"] == list(net.backbone[0].parameters())


class Scaled(nn.Sequential):
    """Has a parameter of its own beside its children's."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), nn.BatchNorm1d(1))
        self.scale = nn.Parameter(torch.ones(1))


def test_modules_are_found_in_any_nest() -> None:
    scaled, layer = Scaled(), nn.Linear(1, 1)
    table = nn.ModuleDict({"a": layer})
    flat = BaseFinetuning.flatten_modules([table, (scaled, [layer])])
    assert flat == [layer, scaled, scaled[0], scaled[1]]
    BaseFinetuning.freeze(iter([scaled, table]), train_bn=True)
    trained = list(BaseFinetuning.filter_params([scaled, table]))
    assert [id(parameter) for parameter in trained] == [id(parameter) for parameter in scaled[1].parameters()]
    assert len(list(BaseFinetuning.filter_params([scaled, table], requires_grad=False))) == 5
    assert list(BaseFinetuning.filter_params(scaled, train_bn=False)) == []
    BaseFinetuning.freeze_module(scaled[1])
    assert not scaled[1].track_running_stats
    BaseFinetuning.make_trainable(part for part in (scaled, table))
    assert all(parameter.requires_grad for parameter in (*scaled.parameters(), *table.parameters()))
    assert scaled[1].track_running_stats


class Leaves(Callback):
    """Leaves each rank's weights in a file."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(weights(pl_module), f"rank{trainer.global_rank}.pt")


class Plain(Transfer):
    """Without batch normalization, whose statistics depend on how a batch is dealt out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone[1] = nn.Identity()


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_two_ranks_train_what_was_thawed_as_one_does(tmp_path: Path, seeded: int, from_checkpoint: bool) -> None:
    one, two, path = Plain(), Plain(), tmp_path / "saved.ckpt"
    two.load_state_dict(one.state_dict())
    fit(tmp_path, one, Stages(), SavesAfter(path, 1))
    settings: dict[str, Any] = {"max_epochs": 4, "devices": 2, "callbacks": [Stages(), Leaves()]}
    trainer = quiet_trainer(tmp_path, **settings)
    trainer.fit(two, regression_loader(6, 2), ckpt_path=path if from_checkpoint else None)
    trainer.close()
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-4, atol=1e-5)
    assert_same_bits(*(torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1)))


def test_a_module_without_a_backbone_is_refused(tmp_path: Path) -> None:
    net = Transfer()
    del net.backbone
    with pytest.raises(MisconfigurationException, match=r"Transfer.backbone is not there; set self.backbone"):
        fit(tmp_path, net, BackboneFinetuning())
    net.backbone = [nn.Linear(1, 1)]  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match=r"Transfer.backbone is list"):
        fit(tmp_path, net, BackboneFinetuning())


def test_another_module_than_the_checkpoints_is_refused_by_name(tmp_path: Path) -> None:
    path, other = tmp_path / "saved.ckpt", Transfer()
    fit(tmp_path, Transfer(), Stages(), SavesAfter(path, 1), max_epochs=2)
    other.backbone = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    other.strict_loading = False
    with pytest.raises(CheckpointError, match=r"optimizer trains backbone.3.weight, backbone.3.bias, which Transfer"):
        fit(tmp_path, other, Stages(), ckpt_path=path)


def test_what_is_to_be_written_is_named(tmp_path: Path) -> None:
    class Half(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            pass

    with pytest.raises(NotImplementedError, match="BaseFinetuning has to define freeze_before_training"):
        fit(tmp_path, Transfer(), BaseFinetuning())
    with pytest.raises(NotImplementedError, match="Half has to define finetune_function"):
        fit(tmp_path, Transfer(), Half())
    with pytest.raises(MisconfigurationException, match="Parameter is no module; freeze and thaw modules"):
        BaseFinetuning.freeze([nn.Parameter(torch.ones(1))])  # type: ignore[list-item]
