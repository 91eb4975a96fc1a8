"""Modules on device "meta", of more than one unit, by hand, in other precisions; gradients; callbacks; Fabric."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import fsdp_models
import pytest
import torch
from fsdp_models import Blocks, fit, samples, trainer
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightlite.distributed import Ranks
from lightlite.errors import CheckpointError, MisconfigurationException, MismatchedCheckpointError
from lightlite.fabric import Fabric
from lightlite.plugins import sharding
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.fsdp import FSDPStrategy
from lightlite.plugins.model_parallel import ModelParallelStrategy
from lightlite.plugins.precision import FullPrecision

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no val loader", "ignore:there is a val loader", "ignore:.*holds the state of callbacks"
)
cloudpickle.register_pickle_by_value(fsdp_models)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


def test_a_module_on_meta_starts_as_one_that_is_not(tmp_path: Path) -> None:
    found = {
        (strategy, on_meta): fit(trainer(tmp_path, strategy, devices), Blocks(normalizes=True, on_meta=on_meta))
        for strategy, devices, on_meta in (("ddp", 2, False), ("fsdp", 2, False), ("fsdp", 2, True))
    }
    for module in found.values():
        assert_same(module.state_dict(), found["ddp", False].state_dict(), 1e-6)
    # It is whole on rank zero, which is enough to go on with.
    made = trainer(tmp_path)
    data = DataLoader(samples(3), 1)
    scores = [made.validate(module, data, verbose=False)[0]["val_loss"] for module in found.values()]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)


def test_a_module_on_meta_that_is_saved_in_shards_is_nowhere_whole(tmp_path: Path) -> None:
    strategy = FSDPStrategy(state_dict_type="sharded")
    made = trainer(tmp_path, strategy, callbacks=[ModelCheckpoint(tmp_path, "last")], enable_checkpointing=True)
    module = fit(made, Blocks(on_meta=True))
    assert all(parameter.is_meta for parameter in module.parameters())
    data = DataLoader(samples(3), 1)
    with pytest.raises(MisconfigurationException, match=r"weights of this Blocks .* are lost.*; give ckpt_path"):
        made.validate(module, data, verbose=False)
    scored = made.validate(module, data, tmp_path / "last.ckpt", verbose=False)
    expected = trainer(tmp_path, "single", 1).validate(
        Blocks.load_from_checkpoint(tmp_path / "last.ckpt"), data, verbose=False
    )
    assert scored[0] == pytest.approx(expected[0], abs=1e-6)
    with pytest.raises(CheckpointError, match="the weights are lost, and cannot be saved any more"):
        made.save_checkpoint(tmp_path / "lost.ckpt", weights_only=True)


def test_a_checkpoint_of_another_width_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, "single", 1, callbacks=[ModelCheckpoint(tmp_path, "last")], enable_checkpointing=True)
    fit(made, Blocks())
    with pytest.raises(MismatchedCheckpointError, match=r"does not hold Blocks's weights:(.|\n)*size mismatch"):
        fit(trainer(tmp_path), Blocks(width=8), tmp_path / "last.ckpt")


class Table(nn.Module):
    """Has a buffer that is computed, and says how unless `silent`."""

    def __init__(self, silent: bool) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(6.0), persistent=False)
        self.scale = nn.Parameter(torch.ones(6))
        if not silent:
            self.reset_parameters = self.reset  # type: ignore[assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale + self.steps

    def reset(self) -> None:
        self.steps.copy_(torch.arange(6.0))
        nn.init.ones_(self.scale)


def prepared(ranks: Ranks, module: nn.Module, **options: Any) -> FSDPStrategy:
    strategy = FSDPStrategy(**options)
    strategy.precision = FullPrecision()
    strategy.connect(CPUAccelerator(), torch.device("cpu"), ranks)
    strategy.setup(module, training=False)
    return strategy


def of_tables(ranks: Ranks) -> Any:
    torch.manual_seed(ranks.rank)
    with torch.device("meta"):
        tied = nn.Sequential(nn.Embedding(5, 6), Table(silent=False), nn.Linear(6, 5, bias=False))
        silent = Table(silent=True)
    tied[2].weight = tied[0].weight
    strategy = prepared(ranks, tied)
    assert tied[2].weight is tied[0].weight
    assert isinstance(tied[0].weight, DTensor)
    whole = {name: sharding.local(value).clone() if not isinstance(value, DTensor) else value.full_tensor()
             for name, value in [*tied.named_parameters(), *tied.named_buffers()]}  # fmt: skip
    output = strategy.evaluation_step("forward")(torch.tensor([1, 2])).sum().item()
    strategy.teardown()
    assert tied[2].weight is tied[0].weight
    assert tied[0].weight.is_meta == (ranks.rank > 0)
    try:
        strategy.setup(silent, training=False)
    except MisconfigurationException as error:
        return whole, output, str(error)
    return None


def test_meta_tensors_are_set_by_their_module_from_rank_zeros_random_state() -> None:
    torch.manual_seed(0)
    expected = nn.Embedding(5, 6).weight
    for whole, output, error in run_ranks(2, of_tables):
        torch.testing.assert_close(whole["0.weight"], expected.detach(), rtol=0, atol=0)
        assert torch.equal(whole["1.steps"], torch.arange(6.0))
        looked_up = expected.detach()[torch.tensor([1, 2])] * 1.0 + torch.arange(6.0)
        assert output == pytest.approx(float((looked_up @ expected.detach().T).sum()), abs=1e-5)
        assert error.startswith("scale, steps is on device 'meta', but Table does not say how its values are made")


def units(policy: Any, by_hand: bool = False) -> list[str]:
    module = nn.ModuleDict({
        "blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)),
        "body": nn.Sequential(nn.Linear(4, 40), nn.ReLU()),
        "head": nn.Linear(4, 2),
    })  # fmt: skip
    chosen = sharding.choose_units(module, policy, by_hand)
    names = {id(part): name for name, part in module.named_modules()}
    return [names[id(part)] for part in chosen]


def test_policies_choose_units_inner_ones_first() -> None:
    assert units(None) == ["body.0", "blocks.1", "blocks.0"]
    assert units(None, by_hand=True) == ["head", "body.0", "body", "blocks.1", "blocks.0"]
    assert units(40) == ["body.0", "blocks.1", "blocks.0"]
    assert units({nn.Sequential}) == ["body", "blocks.1", "blocks.0"]
    assert units(ModuleWrapPolicy({nn.Sequential})) == ["body", "blocks.1", "blocks.0"]
    assert units(partial(size_based_auto_wrap_policy, min_num_params=200)) == ["body.0"]
    assert units(lambda part: isinstance(part, nn.Linear) and part.out_features == 2) == ["head"]
    with pytest.raises(MisconfigurationException, match=r"auto_wrap_policy='all'; give None, a set of classes"):
        units("all")


class Tied(Blocks):
    """Two of its parts share a weight."""

    def configure_model(self) -> None:
        if self.blocks is None:
            super().configure_model()
            self.blocks[2][0].weight = self.blocks[0][0].weight  # type: ignore[index]


def test_a_parameter_of_two_units_is_named(tmp_path: Path) -> None:
    words = (
        r"blocks\.0\.0\.weight and blocks\.2\.0\.weight are one parameter, .*; give the strategy an auto_wrap_policy"
    )
    with pytest.raises(MisconfigurationException, match=words):
        fit(trainer(tmp_path), Tied())
    fit(trainer(tmp_path, FSDPStrategy(auto_wrap_policy={nn.Embedding})), Tied())


class Scaled(Blocks):
    """Has a parameter without dimensions."""

    def configure_model(self) -> None:
        if self.blocks is None:
            super().configure_model()
            self.scale = nn.Parameter(torch.tensor(1.0))


def test_a_module_that_cannot_be_spread_is_left_as_it_was(tmp_path: Path) -> None:
    module = Scaled()
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match=r"scale: a parameter without dimensions.*the shape \(1,\)"):
            fit(trainer(tmp_path, FSDPStrategy(activation_checkpointing_policy={nn.Sequential}), 1), module)
    assert not any(part._forward_pre_hooks for part in module.modules())
    module.scale = nn.Parameter(torch.ones(1))
    fit(trainer(tmp_path, FSDPStrategy(activation_checkpointing_policy={nn.Sequential}), 1), module)


def test_units_are_gathered_one_after_the_other_to_freeze_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded_blocks()
    strategy = prepared(Ranks(), module)
    parameters = dict(module.named_parameters())
    gathered, unshard = [], FSDPModule.unshard

    def noting(unit: Any) -> None:
        unshard(unit)
        gathered.append(sum(not isinstance(parameter, DTensor) for parameter in module.parameters()))

    for name, parameter in parameters.items():
        parameter.requires_grad_("blocks.1" not in name)
    with monkeypatch.context() as patched:
        patched.setattr(FSDPModule, "unshard", noting)
        strategy.before_training_epoch()
    strategy.evaluation_step("forward")(samples()[:5][0]).sum().backward()
    strategy.teardown()
    strategy.disconnect()
    assert gathered == [2] * 4  # a weight and a bias: of the head, and of each block
    frozen = {name for name, parameter in parameters.items() if parameter.grad is None}
    assert frozen == {"blocks.1.0.weight", "blocks.1.0.bias"}


class Uneven(pl.LightningModule):
    """Runs its parts as often, and in such an order, as the batch says: other than other ranks do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, times: int) -> Tensor:
        value = torch.ones(1, 2)
        for index in range(times):
            value = self.parts[(index * times) % 3](value)
        return self.factor * value.sum()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([self(int(times)) for times in batch])

    def on_predict_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch_idx)  # a hook may run the module, too


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("sharding_strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_ranks_may_run_whatever_they_like_to_evaluate(tmp_path: Path, count: int, sharding_strategy: str) -> None:
    numbers = [torch.tensor([4 * index + 1, index]) for index in range(count)]
    expected = trainer(tmp_path, "single", 1).predict(Uneven(), numbers)
    strategy = FSDPStrategy(sharding_strategy=sharding_strategy)
    predicted = trainer(tmp_path, strategy, 3).predict(Uneven(), numbers)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-6)


def scored(run: Any, rank: int) -> Tensor:
    inputs, targets = samples()[10 * rank : 10 * rank + 10]
    return cross_entropy(run(inputs), targets)


def seeded_blocks() -> Blocks:
    torch.manual_seed(0)
    module = Blocks()
    module.configure_model()
    return module


NORMS = (2.0, float("inf"))


def of_gradients(ranks: Ranks) -> tuple[list[Any], list[Tensor], str]:
    module = seeded_blocks()
    strategy = prepared(ranks, module)
    parameters = list(module.parameters())
    scored(strategy.evaluation_step("forward"), ranks.rank).backward()
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    first = [gradient.to_local().clone() for gradient in gradients]
    clipped = []
    for norm_type in NORMS:
        for gradient, held in zip(gradients, first, strict=True):
            gradient.to_local().copy_(held)
        norm = strategy.clip_gradients(parameters, 0.1, "norm", norm_type)
        clipped.append((norm, [gradient.full_tensor() for gradient in gradients]))
    strategy.clip_gradients(parameters, 0.001, "value")
    cut = [gradient.full_tensor() for gradient in gradients]
    gradients[0].to_local().fill_(torch.inf if ranks.rank else 0.0)
    with pytest.raises(RuntimeError) as error:
        strategy.clip_gradients(parameters, 0.1, "norm", error_if_nonfinite=True)
    return clipped, cut, str(error.value)


def test_gradients_are_clipped_as_in_one_process() -> None:
    expected = []
    for norm_type in NORMS:
        module = seeded_blocks()
        torch.stack([scored(module, rank) for rank in range(4)]).mean().backward()
        parameters = list(module.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, 0.1, norm_type)
        expected.append((norm, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]))
    nn.utils.clip_grad_value_(parameters, 0.001)
    cut = [parameter.grad for parameter in parameters]
    for found in run_ranks(4, of_gradients):  # one of which holds no part of a bias
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1], cut, rtol=0, atol=1e-6)
        assert found[2] == "the gradients' total norm, of order 2.0, is not finite: they cannot be clipped"


class Watching(Callback):
    """Notes the gradients before each step, whole; and saves in the middle of a window."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters()]
        wholes = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        pl_module.noted = [*getattr(pl_module, "noted", []), torch.cat([one.flatten() for one in wholes])]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.folder is not None and trainer.fit_loop.step.micro_batch == 2 and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "middle.ckpt")


@pytest.mark.parametrize("sync_each_batch", [True, False])
def test_accumulated_gradients_are_those_of_one_process(tmp_path: Path, sync_each_batch: bool) -> None:
    options = {"accumulate_grad_batches": 3, "callbacks": [Watching()], "max_epochs": 1}
    alone = fit(trainer(tmp_path, "single", 1, **options), seeded_blocks())
    strategy = FSDPStrategy(sync_each_batch=sync_each_batch)
    spread = fit(trainer(tmp_path, strategy, **options), seeded_blocks())
    assert len(alone.noted) == 2  # of three batches, and of the two that are left
    torch.testing.assert_close(spread.noted, alone.noted, rtol=0, atol=1e-6)
    assert_same(spread.state_dict(), alone.state_dict(), 1e-6)


class CutsShort(Blocks):
    """Leaves its first epoch in the middle of a window."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 2 else None


def test_a_window_that_an_epoch_leaves_open_is_forgotten(tmp_path: Path) -> None:
    found = []
    for strategy, devices in (("single", 1), (FSDPStrategy(sync_each_batch=False), 2)):
        torch.manual_seed(0)
        made = trainer(tmp_path, strategy, devices, accumulate_grad_batches=3, callbacks=[Watching()])
        found.append(fit(made, CutsShort()))
    assert len(found[0].noted) == 2
    torch.testing.assert_close(found[1].noted, found[0].noted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_fit_goes_on_in_the_middle_of_a_window(tmp_path: Path, kind: Any) -> None:
    def made(strategy: Any, devices: int, *callbacks: Callback) -> pl.Trainer:
        return trainer(tmp_path, strategy, devices, accumulate_grad_batches=3, callbacks=list(callbacks))

    with pytest.raises(CheckpointError, match="in the middle of an accumulation"):
        fit(made(FSDPStrategy(sync_each_batch=False), 2, Watching(tmp_path)), seeded_blocks())
    whole = fit(made(FSDPStrategy(state_dict_type=kind), 2, Watching(tmp_path)), seeded_blocks()).state_dict()
    for strategy, devices in (("fsdp", 2), ("single", 1)):
        resumed = fit(made(strategy, devices), Blocks(), tmp_path / "middle.ckpt").state_dict()
        assert_same(resumed, whole, 0.0 if devices == 2 else 1e-6)


class ByHand(pl.LightningModule):
    """Two networks that are trained in turn; each is run again after the other's step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = cross_entropy(self.second(self.first(batch[0])), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]


def test_optimization_by_hand_is_that_of_one_process(tmp_path: Path) -> None:
    found = [fit(trainer(tmp_path, strategy, devices), ByHand()) for strategy, devices in (("single", 1), ("fsdp", 2))]
    assert_same(found[1].state_dict(), found[0].state_dict(), 1e-6)


class ShardsItself(Blocks):
    """Calls `fully_shard` itself."""

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        super().configure_model()
        assert self.blocks is not None
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.blocks[1], mesh=mesh)
        fully_shard(self.head, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.head(self.blocks_of(batch[0])), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def blocks_of(self, inputs: Tensor) -> Tensor:
        assert self.blocks is not None
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return inputs


class CountsUnits(Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.units = [name for name, part in pl_module.named_modules() if isinstance(part, FSDPModule)]


def test_a_module_may_shard_itself(tmp_path: Path) -> None:
    torch.manual_seed(5)
    alone = fit(trainer(tmp_path, "single", 1), Blocks())
    torch.manual_seed(5)
    strategy = ModelParallelStrategy(save_distributed_checkpoint=False)
    made = trainer(tmp_path, strategy, callbacks=[CountsUnits()])
    module = fit(made, ShardsItself())
    assert module.units == ["", "blocks.1", "head"]
    assert_same(module.state_dict(), alone.state_dict(), 1e-6)
    with pytest.raises(MisconfigurationException, match="tensor parallelism is not in lightlite"):
        ModelParallelStrategy(tensor_parallel_size=2)


def test_what_one_module_chose_is_nothing_to_another(tmp_path: Path) -> None:
    strategy = ModelParallelStrategy(save_distributed_checkpoint=False)
    first, second = ShardsItself(), Blocks()
    chosen, blocks = ["", "blocks.1", "head"], ["blocks.0", "blocks.1", "blocks.2"]
    for module, units in ((first, chosen), (second, blocks), (first, chosen)):
        fit(trainer(tmp_path, strategy, callbacks=[CountsUnits()], max_epochs=1), module)
        assert module.units == units


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_precision_is_that_of_ddp_or_nearly(tmp_path: Path, precision: Any) -> None:
    ddp, fsdp = (fit(trainer(tmp_path, name, precision=precision), seeded_blocks()) for name in ("ddp", "fsdp"))
    assert next(fsdp.parameters()).dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    for ours, theirs in zip(fsdp.losses, ddp.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)


def test_batch_normalization_over_all_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    def module() -> Blocks:
        torch.manual_seed(0)
        made = Blocks(normalizes=True)
        made.configure_model()
        return made

    alone = fit(trainer(tmp_path, "single", 1), module())
    spread = fit(trainer(tmp_path, sync_batchnorm=True), module())
    assert_same(spread.state_dict(), alone.state_dict(), 1e-5)
    assert type(spread.norm) is nn.BatchNorm1d


class Peeks(Blocks):
    def forward(self, inputs: Tensor) -> Tensor:
        assert self.blocks is not None
        return super().forward(inputs) + (inputs @ self.blocks[0][0].weight).sum()  # type: ignore[index]


def test_a_unit_has_to_be_called(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="sharded by itself, without calling that submodule"):
        fit(trainer(tmp_path), Peeks())


def test_parts_are_replicated_over_one_dimension_of_a_mesh(tmp_path: Path) -> None:
    alone = fit(trainer(tmp_path, "single", 1), seeded_blocks())
    strategy = FSDPStrategy(
        sharding_strategy="HYBRID_SHARD",
        device_mesh=(2, 2),
        activation_checkpointing_policy={nn.Sequential},
        cpu_offload=True,
    )
    spread = fit(trainer(tmp_path, strategy, 4), seeded_blocks())
    assert_same(spread.state_dict(), alone.state_dict(), 1e-6)
    with pytest.raises(
        MisconfigurationException, match=r"device_mesh=\(3, 2\).*whose product is the number of ranks, 2"
    ):
        fit(trainer(tmp_path, FSDPStrategy(device_mesh=(3, 2))), seeded_blocks())


class Backboned(Blocks):
    def configure_model(self) -> None:
        if self.blocks is None:
            super().configure_model()
            self.backbone = self.blocks

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.1)


CALLBACKS = {
    "ema": lambda: [EMAWeightAveraging(decay=0.5)],
    "swa": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    "finetuning": lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
    "rate": lambda: [LearningRateFinder(num_training_steps=4)],
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.filterwarnings("ignore:.*")
def test_callbacks_do_what_they_do_in_one_process(tmp_path: Path, name: str) -> None:
    def module() -> Blocks:
        torch.manual_seed(0)
        made = Backboned() if name == "finetuning" else Blocks()
        made.lr = 1e-2  # type: ignore[assignment]
        made.configure_model()
        return made

    found = []
    for strategy in ("ddp", "fsdp"):
        keeper = ModelCheckpoint(tmp_path / strategy, "{epoch}", save_top_k=-1)
        options = {"callbacks": [*CALLBACKS[name](), keeper], "enable_checkpointing": True, "max_epochs": 3}
        found.append(fit(trainer(tmp_path, strategy, **options), module()).state_dict())
        if name != "rate":
            for epoch in (1, 2):  # after the second, nothing is left to train
                path = tmp_path / strategy / f"epoch={epoch}.ckpt"
                resumed = fit(trainer(tmp_path, strategy, **options), module(), path)
                assert_same(resumed.state_dict(), found[-1])
    assert_same(found[1], found[0], 1e-6)


class Shown(ModelSummary):
    @staticmethod
    def summarize(summary_data: Any, total_parameters: int, *others: Any, **more: Any) -> None:
        Path("shown").write_text(str(total_parameters))


class WithExample(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.ones(2, 6)


def test_a_summary_counts_whole_parameters(tmp_path: Path) -> None:
    module = fit(trainer(tmp_path, callbacks=[Shown()], enable_model_summary=True, max_epochs=1), WithExample())
    assert Path("shown").read_text() == str(sum(parameter.numel() for parameter in module.parameters()))


class Fails(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise ValueError("enough")


def test_weights_are_lost_with_a_rank_and_that_is_said(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "last")
    module = seeded_blocks()
    with pytest.raises(ValueError, match="enough"):
        fit(trainer(tmp_path, callbacks=[Fails(), keeper], enable_checkpointing=True), module)
    with pytest.raises(MisconfigurationException, match="are lost: it ended by an error"):
        fit(trainer(tmp_path), module)
    resumed = fit(trainer(tmp_path), module, tmp_path / "last.ckpt")
    whole = fit(trainer(tmp_path), seeded_blocks())
    assert_same(resumed.state_dict(), whole.state_dict())


def loop(fabric: Fabric, folder: Path) -> dict[str, Any]:
    module = seeded_blocks()
    module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    data = fabric.setup_dataloaders(DataLoader(samples(), 12 // fabric.world_size))
    spread = [isinstance(parameter, DTensor) for parameter in module.parameters()]
    for inputs, targets in data:
        optimizer.zero_grad()
        fabric.backward(cross_entropy(module(inputs), targets))
        fabric.clip_gradients(module, optimizer, max_norm=0.5)
        optimizer.step()
        if not (folder / "one.ckpt").exists():
            fabric.save(folder / "one.ckpt", {"model": module, "optimizer": optimizer})
    uneven = fabric.setup_dataloaders(DataLoader(samples(3), 1), evaluation=True)
    with torch.no_grad(), fabric.strategy.evaluating():
        total = sum((cross_entropy(module(inputs), targets) for inputs, targets in uneven), torch.tensor(0.0))
    total = fabric.all_reduce(total, reduce_op="sum")
    fabric.load(folder / "one.ckpt", {"model": module, "optimizer": optimizer})
    return {"spread": all(spread), "total": float(total), "module": module}


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    found = {}
    for strategy, devices in (("single", 1), ("fsdp", 2)):
        fabric = Fabric(accelerator="cpu", strategy=strategy, devices=devices)
        folder = tmp_path / strategy
        folder.mkdir()
        found[strategy] = fabric.launch(loop, folder)
    assert (found["single"]["spread"], found["fsdp"]["spread"]) == (False, True)
    assert found["fsdp"]["total"] == pytest.approx(found["single"]["total"], abs=1e-5)
    assert_same(found["fsdp"]["module"].state_dict(), found["single"]["module"].state_dict(), 1e-6)
    files = [torch.load(tmp_path / strategy / "one.ckpt") for strategy in found]
    assert_same(files[1]["model"], files[0]["model"], 1e-6)
