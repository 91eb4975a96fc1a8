"""The small helpers that users import: gradients, memory, batches, shared parameters, enumerations, demos."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import quiet_trainer
from ranks import run_ranks
from torch import Tensor, nn

import lightlite as pl
from lightlite import utilities
from lightlite.demos.boring_classes import (
    BoringDataModule,
    BoringModel,
    DemoModel,
    ManualOptimBoringModel,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDataset,
    RandomIterableDatasetWithLen,
)
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.utilities import types
from lightlite.utilities.apply_func import move_data_to_device
from lightlite.utilities.compile import from_compiled, to_uncompiled
from lightlite.utilities.data import extract_batch_size, has_iterable_dataset, has_len, suggested_max_num_workers
from lightlite.utilities.distributed import is_shared_filesystem
from lightlite.utilities.enums import GradClipAlgorithmType, LightningEnum
from lightlite.utilities.exceptions import MisconfigurationException as WhereLightningHasIt
from lightlite.utilities.grads import grad_norm
from lightlite.utilities.memory import (
    garbage_collection_cuda,
    is_oom_error,
    is_out_of_cpu_memory,
    recursive_detach,
)
from lightlite.utilities.model_helpers import is_overridden
from lightlite.utilities.parameter_tying import find_shared_parameters, set_shared_parameters
from lightlite.utilities.rank_zero import LightningDeprecationWarning, rank_prefixed_message, rank_zero_deprecation
from lightlite.utilities.seed import pl_worker_init_function
from lightlite.utilities.warnings import PossibleUserWarning, disable_possible_user_warnings


def test_every_name_that_the_package_lists_is_there() -> None:
    assert all(hasattr(utilities, name) for name in utilities.__all__)


def with_gradients() -> nn.Module:
    module = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1))
    module[0].weight.grad = torch.tensor([[3.0], [4.0]])
    module[1].bias.grad = torch.tensor([-12.0])
    return module


@pytest.mark.parametrize(
    ("order", "name", "norms"), [(2, "2.0", (5, 12, 13)), ("1", "1.0", (7, 12, 19)), ("inf", "inf", (4, 12, 12))]
)
def test_norms_of_gradients_by_name_and_of_all_together(order: Any, name: str, norms: tuple[int, ...]) -> None:
    found = grad_norm(with_gradients(), order, group_separator=".")
    keys = [f"grad_{name}_norm.0.weight", f"grad_{name}_norm.1.bias", f"grad_{name}_norm_total"]
    assert {key: float(value) for key, value in found.items()} == dict(zip(keys, norms, strict=True))


def test_without_gradients_there_are_no_norms() -> None:
    assert grad_norm(nn.Linear(1, 1), 2) == {}
    with pytest.raises(ValueError, match="norm_type=0; give a number above 0, or 'inf'"):
        grad_norm(nn.Linear(1, 1), 0)


def allocator_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


def test_errors_for_lack_of_memory_are_known_on_any_device() -> None:
    assert is_oom_error(allocator_error())
    assert is_out_of_cpu_memory(allocator_error())
    assert is_oom_error(MemoryError())
    assert is_oom_error(torch.OutOfMemoryError("device out of memory"))
    assert is_oom_error(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert is_oom_error(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."))
    assert not is_oom_error(RuntimeError("shapes do not match"))
    assert not is_oom_error(ValueError("out of memory"))
    assert not is_out_of_cpu_memory(torch.OutOfMemoryError("device out of memory"))


def test_garbage_is_collected() -> None:
    import weakref

    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gone = weakref.ref(Cycle())
    garbage_collection_cuda()
    assert gone() is None


def test_nests_are_detached() -> None:
    value = torch.ones(2, requires_grad=True) * 2
    detached = recursive_detach({"a": [value, 1]}, to_cpu=True)
    assert not detached["a"][0].requires_grad
    assert detached["a"][1] == 1
    assert value.requires_grad


def test_data_moves_to_a_device_by_its_own_means() -> None:
    class Movable:
        def to(self, device: torch.device) -> str:
            return str(device)

    assert move_data_to_device({"a": (torch.ones(1), Movable())}, "meta")["a"][0].device.type == "meta"
    assert move_data_to_device([Movable()], "cpu") == ["cpu"]


@dataclasses.dataclass
class Record:
    label: str
    x: Tensor


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(3, 2), 3),
        (torch.tensor(1.0), 1),
        ({"name": "n", "x": [torch.ones(4)]}, 4),
        (Record("l", torch.ones(5, 1)), 5),
        (["a", "b"], 2),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor(batch: Any, size: int) -> None:
    assert extract_batch_size(batch) == size


def test_a_batch_without_tensors_has_no_size() -> None:
    with pytest.raises(MisconfigurationException, match="from a batch of type dict, in which there is no tensor"):
        extract_batch_size({"a": None})


def test_lengths_and_kinds_of_loaders_are_told() -> None:
    loaders = [
        torch.utils.data.DataLoader(dataset)
        for dataset in (RandomDataset(2, 3), RandomIterableDataset(2, 3), RandomIterableDatasetWithLen(2, 3))
    ]
    assert [has_len(loader) for loader in loaders] == [True, False, True]
    assert [has_iterable_dataset(loader) for loader in loaders] == [False, True, True]


def test_workers_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert suggested_max_num_workers(1) == max(1, cores - 1)
    assert suggested_max_num_workers(10**6) == 1
    with pytest.raises(MisconfigurationException, match="local_world_size=0; give the number of ranks here, >= 1"):
        suggested_max_num_workers(0)


def test_ranks_find_out_whether_they_share_a_folder(tmp_path: Path) -> None:
    def share(ranks: Ranks, folders: list[str]) -> bool:
        from lightlite.plugins.cpu import CPUAccelerator
        from lightlite.plugins.ddp import DDPStrategy

        strategy = DDPStrategy()
        strategy.connect(CPUAccelerator(), torch.device("cpu"), ranks)
        found = is_shared_filesystem(strategy, folders[ranks.rank], timeout=0.2)
        strategy.disconnect()
        return found

    assert run_ranks(2, share, [str(tmp_path)] * 2) == [True, True]
    assert list(tmp_path.iterdir()) == []


def test_shared_parameters_are_found_and_shared_again() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.Linear(2, 2)])})
    module["b"][0].weight = module["a"].weight
    shared = find_shared_parameters(module)
    assert shared == [["a.weight", "b.0.weight"]]
    module["b"][0].weight = nn.Parameter(torch.zeros(2, 2))
    assert find_shared_parameters(module) == []
    assert set_shared_parameters(module, shared) is module
    assert module["b"][0].weight is module["a"].weight


def test_enumerations_are_strings_of_any_case() -> None:
    assert GradClipAlgorithmType.NORM == "Norm"
    assert GradClipAlgorithmType("value") is GradClipAlgorithmType.VALUE
    assert (GradClipAlgorithmType.supported_types(), str(GradClipAlgorithmType.NORM)) == (["value", "norm"], "norm")
    assert [GradClipAlgorithmType.supported_type(name) for name in ("norm", "agc")] == [True, False]
    assert isinstance(GradClipAlgorithmType.NORM, LightningEnum)
    assert {GradClipAlgorithmType.NORM: 1}["norm"] == 1


def test_it_is_told_what_a_user_has_overridden() -> None:
    class Own(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    assert [is_overridden(name, Own()) for name in ("training_step", "test_step", "no_step")] == [True, False, False]
    assert is_overridden("setup", BoringDataModule())
    assert not is_overridden("setup", pl.Callback())
    assert not is_overridden("setup", None)
    assert is_overridden("__call__", nn.Linear(1, 1).forward, str)
    with pytest.raises(ValueError, match=r"is_overridden\('forward', Linear\): .* give parent="):
        is_overridden("forward", nn.Linear(1, 1))


def test_names_lie_where_lightning_has_them() -> None:
    from lightlite.optim import LRSchedulerConfig

    assert WhereLightningHasIt is MisconfigurationException
    assert types.LRSchedulerConfig is LRSchedulerConfig
    assert types.LRSchedulerConfig(None).interval == "epoch"
    assert isinstance(torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)]), 1), types.LRSchedulerTypeTuple)
    for name in ("STEP_OUTPUT", "TRAIN_DATALOADERS", "EVAL_DATALOADERS", "OptimizerLRScheduler", "LRSchedulerPLType"):
        assert hasattr(types, name)


def test_possible_user_warnings_can_be_switched_off(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    disable_possible_user_warnings()
    warnings.warn("perhaps", PossibleUserWarning, stacklevel=1)
    assert list(recwarn) == []


def test_deprecations_have_a_kind_of_their_own() -> None:
    with pytest.warns(LightningDeprecationWarning, match="old"):
        rank_zero_deprecation("old")
    assert (rank_prefixed_message("m", 1), rank_prefixed_message("m", None)) == ("[rank: 1] m", "m")


def test_workers_of_different_ranks_are_seeded_apart() -> None:
    import random

    import numpy

    drawn = []
    for worker, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        torch.manual_seed(5 + worker)  # as torch does, from one base seed
        pl_worker_init_function(worker, rank)
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert drawn[3] == drawn[0]
    assert all(len(set(numbers)) == 3 for numbers in zip(*drawn[:3], strict=True))


def test_a_compiled_module_gives_the_module_with_compiled_steps() -> None:
    module = BoringModel()
    compiled = torch.compile(module, backend="eager")
    inner = from_compiled(compiled)
    assert inner is module
    x = torch.ones(2, 32)
    expected = nn.functional.mse_loss(module.layer(x), torch.ones(2, 2))
    assert torch.allclose(inner.training_step(x, 0)["loss"], expected)
    assert "training_step" in module.__dict__
    assert "predict_step" not in module.__dict__, "what nobody wrote is left as it is"
    assert to_uncompiled(inner) is module
    assert "training_step" not in module.__dict__
    assert to_uncompiled(torch.compile(module, backend="eager")) is module
    with pytest.raises(ValueError, match="to_uncompiled was given BoringModel, which is not compiled"):
        to_uncompiled(module)
    with pytest.raises(ValueError, match=r"from_compiled was given BoringModel; give what torch.compile returned"):
        from_compiled(module)


@pytest.mark.parametrize("kind", [BoringModel, ManualOptimBoringModel])
def test_boring_models_run_through_every_stage(tmp_path: Path, kind: type[BoringModel]) -> None:
    module = kind()
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=30)
    before = module.step(torch.ones(1, 32)).item()
    trainer.fit(module, datamodule=BoringDataModule())
    assert trainer.global_step == 60
    assert module.step(torch.ones(1, 32)).item() != before
    assert trainer.validate(module, datamodule=BoringDataModule(), verbose=False) == [{}]
    assert trainer.test(module, verbose=False) == [{}]
    predictions = trainer.predict(module, datamodule=BoringDataModule())
    assert (len(predictions), predictions[0].shape) == (64, (1, 2))


def test_the_other_demos_are_what_their_names_say(tmp_path: Path) -> None:
    sample = RandomDictDataset(4, 3)[2]
    assert torch.equal(sample["b"], sample["a"] + 2)
    assert len(RandomDictDataset(4, 3)) == 3
    assert [sample.shape for sample in RandomIterableDataset(4, 2)] == [(4,), (4,)]
    assert len(RandomIterableDatasetWithLen(4, 2)) == 2
    model = DemoModel(out_dim=3, learning_rate=0.5)
    assert model(torch.ones(2, 32)).shape == (2, 3)
    assert model.configure_optimizers().param_groups[0]["lr"] == 0.5
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, torch.utils.data.DataLoader(RandomDataset(32, 4), batch_size=2))
    assert trainer.global_step == 2
