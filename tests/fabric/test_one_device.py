"""A loop of one's own on one device: the numbers of the hand-written one, and what every call does or refuses."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

import lightlite as pl
from lightlite.errors import MisconfigurationException
from lightlite.fabric import Fabric, is_wrapped
from lightlite.fabric.loggers import CSVLogger, TensorBoardLogger
from lightlite.fabric.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.precision import MixedPrecision

from .loops import Net, by_fabric, by_hand, data, equal, one_device, weights


@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_are_those_of_the_hand_written_loop(accumulate: int) -> None:
    assert equal(by_fabric(one_device(), accumulate=accumulate), by_hand(accumulate=accumulate))


def test_clipping_by_norm_and_by_value_is_that_of_torch() -> None:
    by_norm = by_hand(clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1))
    by_value = by_hand(clip=lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01))
    assert equal(by_fabric(one_device(), clip={"max_norm": 0.1}), by_norm)
    assert equal(by_fabric(one_device(), clip={"clip_val": 0.01}), by_value)
    assert not equal(by_norm, by_value)


def test_bfloat16_autocast_is_that_of_torch() -> None:
    mixed = by_fabric(one_device(precision="bf16-mixed"))
    assert equal(mixed, by_hand(autocast=torch.bfloat16))
    assert not equal(mixed, by_hand())


def test_float16_is_scaled_and_clipped_unscaled_as_with_torchs_scaler() -> None:
    fabric = one_device(precision="16-mixed")
    ours = by_fabric(fabric, clip={"max_norm": 0.1})
    scaler = torch.amp.GradScaler("cpu")
    clip = lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1)  # noqa: E731
    assert equal(ours, by_hand(autocast=torch.float16, scaler=scaler, clip=clip))
    assert fabric.scaler is not None
    assert fabric.scaler.state_dict() == scaler.state_dict()


def test_double_precision_reaches_parameters_inputs_and_new_modules() -> None:
    fabric = one_device(precision="64-true")
    with fabric.init_module():
        inner = nn.Linear(4, 1)
    assert inner.weight.dtype == torch.float64
    seen: list[torch.dtype] = []
    inner.register_forward_hook(lambda module, args, output: seen.extend((args[0].dtype, output.dtype)))
    out = fabric.setup(inner)(torch.ones(2, 4))
    assert seen == [torch.float64, torch.float64]
    assert out.dtype == torch.float32
    with fabric.init_tensor():
        assert torch.ones(1).dtype == torch.float64
    assert torch.ones(1).dtype == torch.float32


def test_autocast_is_for_what_is_computed_outside_of_a_module() -> None:
    fabric, matrix = one_device(precision="bf16-mixed"), torch.ones(2, 2)
    with fabric.autocast():
        assert (matrix @ matrix).dtype == torch.bfloat16
    with one_device().autocast():
        assert (matrix @ matrix).dtype == torch.float32


def test_init_module_may_leave_weights_uninitialised() -> None:
    fabric = one_device()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with fabric.init_module(empty_init=True):
        nn.Linear(4, 4)
    assert torch.equal(before, torch.get_rng_state())
    with fabric.init_module():
        nn.Linear(4, 4)
    assert not torch.equal(before, torch.get_rng_state())


def test_a_wrapped_module_is_the_module_in_all_but_forward() -> None:
    fabric, net = one_device(), Net()
    model = fabric.setup_module(net)
    assert is_wrapped(model)
    assert isinstance(model, _FabricModule)
    assert not is_wrapped(net)
    assert model.module is net
    assert model.first is net.first
    assert model.state_dict().keys() == net.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in net.named_parameters()]
    model.note = "kept"
    assert net.note == "kept"  # type: ignore[comparison-overlap]
    model.eval()
    assert not net.training
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
        _ = model.nothing


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_a_wrapped_module_tells_where_it_is_and_in_which_format(precision: str) -> None:
    model = one_device(precision=precision).setup(Net())
    assert model.device == torch.device("cpu")
    assert model.dtype == model.first.weight.dtype
    assert one_device().setup(nn.ReLU()).device == torch.device("cpu")

    class Own(nn.Module):
        device = "its own"

    assert one_device().setup(Own()).device == "its own"


def test_a_copy_of_a_wrapped_module_has_weights_of_its_own() -> None:
    model = one_device().setup(Net())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.last.bias.fill_(7.0)
    x = torch.zeros(1, 4)
    assert not torch.equal(model(x), twin(x))
    assert twin(x).item() == twin.module(x).item()


def test_marked_methods_and_lightning_steps_run_in_the_chosen_precision() -> None:
    class Several(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.seen: list[torch.dtype] = []

        def forward(self, x: Tensor) -> Any:
            out = self.layer(x)
            self.seen.append(out.dtype)
            return out

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self(batch).sum()

        def other(self, x: Tensor) -> Any:
            return self(x).sum()

    model = one_device(precision="bf16-mixed").setup(Several())
    x = torch.ones(2, 4)
    model.other(x)
    model.mark_forward_method("other")
    assert model.other(x).dtype == torch.float32
    model.training_step(x, 0)
    assert model.seen == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_only_methods_can_be_marked() -> None:
    model = one_device().setup(Net())
    model.mark_forward_method(model.module.loss)
    with pytest.raises(TypeError, match="give a method of the module, or its name"):
        model.mark_forward_method(3)
    with pytest.raises(ValueError, match="leave it out"):
        model.mark_forward_method("forward")
    with pytest.raises(AttributeError, match="Net has no method of that name"):
        model.mark_forward_method("first")


def test_a_wrapped_optimizer_passes_for_the_optimizer_and_carries_schedulers() -> None:
    net = Net()
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    model, optimizer = one_device().setup(net, inner)
    assert isinstance(optimizer, torch.optim.SGD)
    assert type(optimizer) is _FabricOptimizer
    assert is_wrapped(optimizer)
    assert not is_wrapped(inner)
    assert optimizer.optimizer is inner
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.5
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert optimizer.state_dict() == inner.state_dict()


def test_an_optimizer_follows_parameters_that_a_device_replaces() -> None:
    class Replacing(CPUAccelerator):
        def move_module(self, module: nn.Module, device: torch.device) -> None:
            for part in module.modules():
                for name, parameter in list(part.named_parameters(recurse=False)):
                    setattr(part, name, nn.Parameter(parameter.detach().clone()))

    fabric = Fabric(accelerator=Replacing(), devices=1)
    assert equal(by_fabric(fabric, clip={"max_norm": 0.1}), by_fabric(one_device(), clip={"max_norm": 0.1}))


def test_batches_move_to_the_device_unless_they_are_to_stay() -> None:
    class Elsewhere(CPUAccelerator):
        def batch_mover(self, device: torch.device) -> Any:
            return lambda batch: [part + 100 for part in batch]

    fabric, loader = Fabric(accelerator=Elsewhere(), devices=1), DataLoader(range(4), batch_size=2)  # type: ignore[arg-type]
    assert [[int(part) for part in batch] for batch in fabric.setup_dataloaders(loader)] == [[100, 101], [102, 103]]
    stay = fabric.setup_dataloaders(loader, move_to_device=False)
    assert [batch.tolist() for batch in stay] == [[0, 1], [2, 3]]
    assert stay.device is None


@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizers_step_takes_a_closure_and_returns_its_loss(scaled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # so that nothing overflows, and no step is skipped
    fabric = one_device(plugins=MixedPrecision("16-mixed", scaler=scaler) if scaled else None)
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    before = weights(net)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        fabric.backward(loss)
        return loss

    assert optimizer.step(closure).item() > 0
    assert not equal(before, weights(net))


@pytest.mark.parametrize("clipped", [(), (0,), (1,), (0, 1)], ids=str)
def test_optimizers_that_share_a_scaler_divide_by_the_scale_of_the_backward_pass(clipped: tuple[int, ...]) -> None:
    """The scale grows after every second pass, between the step of the one and that of the other if not held back."""

    def train(fabric: Fabric | None, scaler: torch.amp.GradScaler) -> list[Tensor]:
        torch.manual_seed(0)
        inner = [nn.Linear(4, 4), nn.Linear(4, 1)]
        modules: list[Any] = list(inner)
        optimizers: list[Any] = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
        if fabric is not None:
            modules, optimizers = map(list, zip(*map(fabric.setup, modules, optimizers), strict=True))
        for x in torch.randn(4, 8, 4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = modules[1](modules[0](x))
            loss = out.float().square().mean()
            scaler.scale(loss).backward() if fabric is None else fabric.backward(loss)
            for index in clipped:
                if fabric is None:
                    scaler.unscale_(optimizers[index])
                    nn.utils.clip_grad_norm_(modules[index].parameters(), 0.01)
                else:
                    fabric.clip_gradients(modules[index], optimizers[index], max_norm=0.01)
            for optimizer in optimizers:
                optimizer.step() if fabric is not None else scaler.step(optimizer)
            if fabric is None:
                scaler.update()
        return [parameter.detach() for module in inner for parameter in module.parameters()]

    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    by_hand = train(None, scalers[0])
    ours = train(one_device(plugins=MixedPrecision("16-mixed", scaler=scalers[1])), scalers[1])
    assert all(torch.equal(one, other) for one, other in zip(by_hand, ours, strict=True))
    assert scalers[1].state_dict() == scalers[0].state_dict()
    assert scalers[1].get_scale() == 256.0


def test_a_scale_that_is_yet_to_be_chosen_is_chosen_before_it_is_saved(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    fabric, one, two = one_device(plugins=MixedPrecision("16-mixed", scaler=scaler)), Net(), Net()
    model, optimizer = fabric.setup(one, torch.optim.SGD(one.parameters(), lr=0.1))
    _other = fabric.setup(two, torch.optim.SGD(two.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(1, 4)).mean())
        optimizer.step()
    assert scaler.get_scale() == 128.0
    fabric.save(tmp_path / "state.ckpt", {"scaler": fabric.scaler})
    assert fabric.load(tmp_path / "state.ckpt")["scaler"]["scale"] == 256.0


def test_several_optimizers_and_a_scheduler_come_back_in_order() -> None:
    net = Net()
    first = torch.optim.SGD(net.first.parameters(), lr=1.0)
    last = torch.optim.Adam(net.last.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(first, 1)
    model, one, two, same = one_device().setup(net, first, last, scheduler=scheduler)
    assert (model.module, one.optimizer, two.optimizer, same) == (net, first, last, scheduler)
    one, two = one_device().setup_optimizers(first, last)
    assert (one.optimizer, two.optimizer) == (first, last)


def test_a_compiled_module_stays_compiled_and_keeps_its_names() -> None:
    net = Net()
    compiled = torch.compile(net, backend="eager")
    model = one_device().setup(compiled)
    assert model.module is net
    assert model._forward_module is compiled
    assert model.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(model(torch.ones(2, 4)), net(torch.ones(2, 4)))


def test_a_wrapped_loader_counts_epochs_for_samplers_and_is_the_loader_else() -> None:
    class ByEpoch(RandomSampler):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    fabric = one_device()
    loader = DataLoader(data(6), batch_size=4, sampler=ByEpoch(data(6)))
    wrapped = fabric.setup_dataloaders(loader)
    assert isinstance(wrapped, _FabricDataLoader)
    assert is_wrapped(wrapped)
    assert len(wrapped) == 2
    assert wrapped.dataset is loader.dataset
    assert wrapped.batch_size == 4
    assert [len(x) for x, _ in wrapped] == [4, 2]
    list(wrapped)
    wrapped.set_epoch(7)
    list(wrapped)
    assert ByEpoch.epochs == [0, 1, 7]
    first, second = fabric.setup_dataloaders(DataLoader(data(4)), iter([1, 2]))
    assert len(first) == 4
    with pytest.raises(TypeError, match="has no length"):
        len(second)


def test_callbacks_are_any_objects_and_get_the_keywords_that_they_take() -> None:
    calls: list[Any] = []

    class One:
        fixed = 3

        def on_epoch(self, epoch: int) -> None:
            calls.append(epoch)

        def on_after_setup(self, fabric: Fabric, module: nn.Module) -> None:
            calls.append(type(module.module))

        def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
            calls.append(type(optimizer))

    class Two:
        def on_epoch(self, **kwargs: Any) -> None:
            calls.append(kwargs)

    fabric, net = one_device(callbacks=[One(), Two()]), Net()
    _, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.step()
    fabric.call("on_epoch", epoch=3, loss=0.5)
    fabric.call("on_nothing")
    assert calls == [Net, torch.optim.SGD, 3, {"epoch": 3, "loss": 0.5}]
    with pytest.warns(UserWarning, match=r"One\.fixed is not called: it is no method but 3"):
        fabric.call("fixed")


def test_values_reach_the_loggers(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(root_dir=tmp_path, name="mine"))
    fabric.log("loss", torch.tensor(0.5, requires_grad=True), step=3)
    fabric.log_dict({"acc": 1, "loss": 0.25}, step=4)
    fabric.logger.save()
    written = (tmp_path / "mine" / "version_0" / "metrics.csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    assert [(row["step"], row["loss"], row["acc"]) for row in rows] == [("3", "0.5", ""), ("4", "0.25", "1")]
    with pytest.raises(MisconfigurationException, match="there is none"):
        _ = one_device().logger
    with pytest.raises(ValueError, match=r"fabric\.log\('loss', …\) was given a tensor of shape \(2,\); give a number"):
        fabric.log("loss", torch.ones(2))


def test_a_nest_of_values_reaches_a_logger_as_numbers(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path))
    fabric.log_dict({"parts": {"a": torch.tensor(1)}}, step=0)
    fabric.logger.save()
    assert "{'a': 1}" in (Path(fabric.logger.log_dir) / "metrics.csv").read_text()


def test_loggers_are_classes(tmp_path: Path) -> None:
    class Mine(CSVLogger):
        pass

    logger = pickle.loads(pickle.dumps(CSVLogger(tmp_path, name="mine")))
    assert isinstance(logger, CSVLogger)
    assert isinstance(logger, pl.loggers.CSVLogger)
    assert not isinstance(logger, TensorBoardLogger)
    assert isinstance(Mine(root_dir=tmp_path), CSVLogger)


def test_a_lightning_module_logs_and_is_called_as_a_callback(tmp_path: Path) -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.ended = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.layer(batch).mean()
            self.log("loss", loss)
            self.log("unseen", loss, logger=False)
            return loss

        def on_train_epoch_end(self) -> None:
            self.ended += 1

    fabric = one_device(loggers=CSVLogger(tmp_path))
    inner = Module()
    model, optimizer = fabric.setup(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
    fabric.backward(model.training_step(torch.ones(2, 4), 0))
    fabric.call("on_train_epoch_end")
    fabric.logger.save()
    assert inner.ended == 1
    assert inner.optimizers() is optimizer
    assert inner.logger is fabric.logger
    assert inner.fabric is fabric
    assert inner.device == fabric.device
    assert logged_lines(fabric)[0] == "loss,step"
    inner.log_dict({"a": 1, "b": torch.tensor(2.0)})
    fabric.logger.save()
    assert list(csv.DictReader(logged_lines(fabric)))[-1] == {"a": "1", "b": "2.0", "loss": "", "step": "1"}
    assert inner.all_gather({"a": 1, "b": torch.ones(2)})["b"].shape == (2,)
    inner.manual_backward(inner.layer(torch.ones(2, 4)).mean())  # for Trainer in manual optimization only
    with pytest.raises(ValueError, match=r"self\.log\('loss', 'low'\): .* of a Metric, log metric\.compute\(\)"):
        inner.log("loss", "low")
    with pytest.raises(AttributeError, match=r"trainer\.max_epochs: the module was set up by a Fabric"):
        _ = inner.trainer.max_epochs


def logged_lines(fabric: Fabric) -> list[str]:
    return (Path(fabric.logger.log_dir) / "metrics.csv").read_text().splitlines()


def test_alone_collective_calls_return_what_they_were_given() -> None:
    fabric = one_device()
    assert fabric.broadcast({"a": 1}) == {"a": 1}
    assert fabric.all_gather(torch.ones(2)).shape == (2,)
    assert fabric.all_reduce({"a": 2, "b": [torch.ones(1)]}, reduce_op="sum") == {"a": torch.tensor(2), "b": [1.0]}
    fabric.barrier()
    with fabric.rank_zero_first():
        pass
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank) == (1, 0, 0, 0)
    assert fabric.is_global_zero
    assert fabric.device == torch.device("cpu")


def test_a_subclass_runs_itself_and_launch_returns_what_the_function_returns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Mine(Fabric):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            self.print("here")
            return self.world_size, args, kwargs

    fabric = Mine(accelerator="cpu", devices=1)
    assert fabric.run(2, a=3) == (1, (2,), {"a": 3})
    assert capsys.readouterr().out == "here\n"
    assert fabric.launch(lambda fabric, more: (fabric is not None, more), "x") == (True, "x")


def test_seeding_includes_loader_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Fabric.seed_everything(3, verbose=False) == 3
    first = torch.rand(1)
    Fabric.seed_everything(3, verbose=False)
    assert torch.equal(first, torch.rand(1))
    assert pl.utilities.seed.seed_workers()


def test_what_is_set_up_already_is_refused() -> None:
    fabric, net = one_device(), Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(data()))
    with pytest.raises(ValueError, match=r"fabric\.setup was given a Net that is set up already"):
        fabric.setup(model)
    with pytest.raises(ValueError, match=r"fabric\.setup_module was given a Net that is set up already"):
        fabric.setup_module(model)
    with pytest.raises(ValueError, match=r"fabric\.setup_optimizers was given a SGD that is set up already"):
        fabric.setup_optimizers(optimizer)
    with pytest.raises(ValueError, match=r"fabric\.setup was given a SGD that is set up already"):
        fabric.setup(Net(), optimizer)
    with pytest.raises(ValueError, match="was given a loader that is set up already"):
        fabric.setup_dataloaders(loader)


def test_what_cannot_be_set_up_is_refused() -> None:
    fabric = one_device()
    with pytest.raises(TypeError, match=r"of type int; give a torch\.nn\.Module"):
        fabric.setup(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"as optimizer; give a torch\.optim\.Optimizer"):
        fabric.setup(Net(), "sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was given no optimizer"):
        fabric.setup_optimizers()
    with pytest.raises(ValueError, match="was given no loader"):
        fabric.setup_dataloaders()
    with pytest.raises(MisconfigurationException, match="is 3 of type int, which is no iterable of batches"):
        fabric.setup_dataloaders(3)


def test_an_optimizer_of_parameters_without_values_has_to_wait_for_the_module() -> None:
    with torch.device("meta"):
        net = Net()
    with pytest.raises(MisconfigurationException, match=r"set up the module first: model = fabric\.setup_module"):
        one_device().setup_optimizers(torch.optim.SGD(net.parameters(), lr=0.1))


def test_backward_refuses_what_is_no_loss() -> None:
    fabric = one_device()
    with pytest.raises(TypeError, match=r"fabric\.backward\(0\.5\) of type float; give the loss, a tensor"):
        fabric.backward(0.5)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="a tensor that requires no gradient"):
        fabric.backward(torch.ones(1))


def test_a_loss_that_needs_scaling_cannot_be_differentiated_past_fabric() -> None:
    fabric = one_device(precision="16-mixed")
    model = fabric.setup(Net())
    loss = model(torch.ones(2, 4)).sum()
    with pytest.raises(MisconfigurationException, match=r"call fabric\.backward\(loss\) instead"):
        loss.backward()
    one_device(precision="bf16-mixed").setup(Net())(torch.ones(2, 4)).sum().backward()


def test_clipping_wants_one_limit_and_finite_gradients() -> None:
    fabric, net = one_device(), Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for both in ({}, {"clip_val": 1.0, "max_norm": 1.0}):
        with pytest.raises(ValueError, match="give one of the two"):
            fabric.clip_gradients(model, optimizer, **both)  # type: ignore[arg-type]
    fabric.backward(model(torch.ones(1, 4)).sum() * float("inf"))
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=float("inf"), error_if_nonfinite=False)
    assert norm is not None
    assert not norm.isfinite()


def test_no_backward_sync_wants_a_module_that_was_set_up() -> None:
    with pytest.raises(TypeError, match="was given a Net that is not set up"):
        one_device().no_backward_sync(Net())  # type: ignore[arg-type]


def test_launch_wants_a_function_that_takes_the_fabric() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(TypeError, match="give a function"):
        fabric.launch(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"define it as .*nothing\(fabric, …\)"):
        fabric.launch(_nothing)
    with pytest.raises(MisconfigurationException, match=r"loggers='csv' holds 'csv' \(str\)"):
        Fabric(loggers="csv")  # type: ignore[arg-type]


def _nothing() -> None:
    """Takes no argument."""
