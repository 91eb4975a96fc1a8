"""What only CUDA has: streams, graphs, a scaler that waits, NVML, several GPUs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightlite as pl
from lightlite import callbacks
from lightlite.plugins.cuda import CUDAAccelerator, find_usable_cuda_devices
from lightlite.profilers import PyTorchProfiler

from .nets import QUIET, Net, fit, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*fork:DeprecationWarning", "ignore:.*Synchronization debug mode:UserWarning"
)


class Constant(Dataset[Tensor]):
    """Sample i is a megabyte of the number i, so that a batch that was overwritten shows it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((2**18,), float(index))


class Slow(pl.LightningModule):
    """Lets the GPU wait before it reads a batch, while later ones are copied and memory is freed and taken."""

    def __init__(self, cycles: int, allocate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.cycles, self.allocate = cycles, allocate
        self.seen: list[Tensor] = []

    def read(self, batch: Tensor) -> None:
        torch.cuda._sleep(self.cycles)
        self.seen.append(torch.stack([batch.min(), batch.max()]))
        if self.allocate:
            torch.empty_like(batch).fill_(-1.0)
            del batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.read(batch)
        return self.weight * 0.0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.read(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quick_trainer(accelerator: Any = "cuda") -> pl.Trainer:
    settings: dict[str, Any] = {"devices": 1, "max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    return pl.Trainer(accelerator=accelerator, **settings, **QUIET)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("allocate", [False, True], ids=["slow", "slow, with memory reused"])
@pytest.mark.usefixtures("cuda")
def test_no_batch_is_read_before_it_has_arrived_or_overwritten_before_it_was_read(workers: int, allocate: bool) -> None:
    net = Slow(2_000_000, allocate)
    batches = DataLoader(Constant(200), batch_size=1, num_workers=workers)
    quick_trainer().fit(net, batches)
    expected = [[float(index)] * 2 for index in range(200)]
    assert torch.stack(net.seen).tolist() == expected
    net.seen = []
    pl.Trainer(accelerator="cuda", devices=1, **QUIET).validate(net, batches, verbose=False)
    assert torch.stack(net.seen).tolist() == expected


@pytest.mark.usefixtures("cuda")
def test_batches_that_workers_load_are_page_locked_and_moved_beside_the_computation() -> None:
    seen: list[bool] = []
    mover = CUDAAccelerator.background_mover

    class Looking(CUDAAccelerator):
        def background_mover(self, device: torch.device) -> Any:
            begin = mover(self, device)
            assert begin is not None

            def look(batch: Any) -> Any:
                seen.append(batch.is_pinned())
                return begin(batch)

            return look

    quick_trainer(Looking()).fit(Slow(0, False), DataLoader(Constant(4), batch_size=1, num_workers=1))
    assert seen == [True] * 4


class Unwaiting(Net):
    """Has PyTorch raise where a step waits for the GPU, from one batch to another between two log points."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            torch.cuda.set_sync_debug_mode("error")
        elif batch_idx == 7:
            torch.cuda.set_sync_debug_mode("default")
        return super().training_step(batch, batch_idx)


FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a progress bar": {"enable_progress_bar": True},
    "clipping": {"gradient_clip_val": 0.1},
    "accumulation": {"accumulate_grad_batches": 2},
    "bfloat16": {"precision": "bf16-mixed"},
    "averaged weights": {"callbacks": [callbacks.EMAWeightAveraging()]},
    "learning rates": {"callbacks": [callbacks.LearningRateMonitor("step")], "logger": True},
    "a checkpoint that is not due": {"callbacks": [callbacks.ModelCheckpoint(monitor="val_loss")]},
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.usefixtures("cuda")
def test_nothing_waits_for_the_gpu_between_two_log_points(feature: str, workers: int) -> None:
    settings = {**FEATURES[feature]}
    if "callbacks" in settings and "not due" in feature:
        settings["enable_checkpointing"] = True
    try:
        fit(Unwaiting(), "cuda", max_epochs=1, log_every_n_steps=8, workers=workers, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("cuda")
def test_a_graphed_module_trains_as_an_eager_one() -> None:
    class Graphed(Net):
        def on_fit_start(self) -> None:
            sample = torch.randn(32, 16, device=self.device)
            self.layers = torch.cuda.make_graphed_callables(self.layers, (sample,))  # type: ignore[assignment]

    settings: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    eager, graphed = Net(), Graphed()
    fit(eager, "cuda", **settings)
    fit(graphed, "cuda", **settings)
    # Warming up for the capture has moved the statistics of batch normalization, which training does not use.
    assert graphed.curve == pytest.approx(eager.curve, rel=1e-4)


@pytest.mark.usefixtures("cuda")
def test_a_whole_step_can_be_captured() -> None:
    class Captured(Net):
        automatic_optimization = False

        def on_fit_start(self) -> None:
            self.x = torch.randn(32, 16, device=self.device)
            self.y = torch.zeros(32, dtype=torch.int64, device=self.device)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.work()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.captured = self.work()

        def work(self) -> Tensor:
            self.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.layers(self.x), self.y)
            loss.backward()
            self.optimizers(use_pl_optimizer=False).step()
            return loss.detach()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.x.copy_(batch[0])
            self.y.copy_(batch[1])
            self.graph.replay()
            self.losses.append(self.captured.clone())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=3e-3, capturable=True)

    net = Captured()
    fit(net, "cuda", max_epochs=8, limit_val_batches=0, workers=1)
    assert net.curve[-1] < 0.8 * net.curve[0]


@pytest.mark.usefixtures("cuda")
def test_three_batches_at_most_are_on_the_gpu_at_a_time_and_nothing_is_left_there() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    net = Slow(0, False)
    quick_trainer().fit(net, DataLoader(Constant(160), batch_size=16, num_workers=1))
    net.seen = []
    batch = 16 * 2**20
    assert torch.cuda.max_memory_allocated() - before < 4 * batch
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.usefixtures("cuda")
def test_an_optimizers_state_leaves_the_gpu_with_the_module() -> None:
    trainer = fit(Net(), "cuda", max_epochs=1)
    states = trainer.optimizers[0].state.values()
    assert {value.device.type for state in states for value in state.values()} == {"cpu"}


@pytest.mark.usefixtures("cuda")
def test_ranges_are_made_for_the_makers_profiler() -> None:
    net = Net()
    fit(net, "cuda", max_epochs=1, profiler=PyTorchProfiler(emit_nvtx=True))
    assert len(net.losses) == 8


def test_the_gpu_tells_its_figures(cuda: torch.device) -> None:
    stats = CUDAAccelerator().get_device_stats(cuda)
    assert 0 < stats["memory_used_bytes"] <= stats["memory_total_bytes"]
    with contextlib.suppress(KeyError):  # not every GPU, and not to every user
        assert 0 <= stats["utilization_percent"] <= 100
        assert 0 < stats["temperature_celsius"] < 120
    assert stats["process_memory_peak_bytes"] >= stats["process_memory_bytes"]


FIND = """
import torch
from lightlite.accelerators import find_usable_cuda_devices
from lightlite.plugins import nvml
told = all(nvml.standing(index) is not None for index in range(torch.cuda.device_count()))
print(find_usable_cuda_devices(1), not told or not torch.cuda.is_initialized())
"""


@pytest.mark.usefixtures("cuda")
def test_the_freest_gpu_is_found_without_initialising_cuda_where_nvml_tells() -> None:
    done = subprocess.run([sys.executable, "-c", FIND], check=True, capture_output=True, text=True, timeout=120)
    found, uninitialised = done.stdout.rsplit(maxsplit=1)
    assert uninitialised == "True"
    assert int(found.strip().strip("[]")) < torch.cuda.device_count()
    assert len(find_usable_cuda_devices(1)) == 1


def test_two_gpus_train_as_one_with_batches_twice_as_large(two_gpus: int) -> None:
    alone, together = Net(), Net()
    for net in (alone, together):
        net.layers[1] = nn.Identity()  # each rank normalizes its own half of a batch
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, **QUIET}
    pl.seed_everything(7, verbose=False)
    pl.Trainer(accelerator="cuda", devices=1, **settings).fit(alone, loader(), loader())
    trainer = pl.Trainer(accelerator="cuda", devices=two_gpus, **settings)
    halves = DataLoader(loader().dataset, batch_size=16)
    trainer.fit(together, halves, loader())
    trainer._launcher.close()
    pairs = zip(alone.parameters(), together.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
