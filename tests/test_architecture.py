"""What each room may know, read from the sources; the order of layers is in pyproject.toml, for import-linter."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightlite as pl
from lightlite.plugins import ACCELERATORS, STRATEGIES

ROOT = Path(__file__).parents[1]
ROOMS = {"lightlite": ROOT / "lightlite", "lightlite.plugins": ROOT / "plugins", "lightlite.launch": ROOT / "launch"}


@cache
def modules(room: str) -> dict[str, Path]:
    """Source files of one room, by dotted module name."""
    found = {}
    for path in sorted(ROOMS[room].rglob("*.py")):
        parts = path.relative_to(ROOMS[room]).with_suffix("").parts
        found[".".join([room, *(part for part in parts if part != "__init__")])] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but docstrings and what only the type checker sees."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        yield child
        yield from running_nodes(child)


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; `from a import b` gives a.b."""
    for node in running_nodes(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def where(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def starts_with(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


DEVICES = sorted({*ACCELERATORS.plugins, *ACCELERATORS.left_out, "rocm", "xpu"} - {"cpu"})
"""Kinds of devices. The CPU is none here: every process has it, and what is on no other device is in its memory."""
LIBRARIES = ("nccl", "cudnn", "cublas", "nvml", "pynvml")
NAMES_OF_OTHERS = {
    "garbage_collection_cuda": "Lightning's name of a function that does it for any device",
    "tpu_cores": "an argument that Lightning's Trainer once had, and which is refused",
    "xla|(?<!ou)tpu": "names of Lightning's that are left out, with the reason",
    "cudnn_status_not_supported": "in torch's messages of too little memory",
    "NCCL_SOCKET_IFNAME": "where torch.distributed is told to listen on one machine's own interface only",
}


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of what is imported, of attributes, and of strings that are one name."""
    yield from ((line, name.rpartition(".")[2]) for line, name in imported_names(path))
    yield from ((line, name) for line, name in imported_names(path) if name.startswith("torch."))
    for node in running_nodes(tree(path)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.lineno, node.value


def test_core_never_names_a_device_type() -> None:
    device = re.compile(rf"(.*[^a-z])?({'|'.join([*DEVICES, *LIBRARIES])})([^a-z].*)?", re.IGNORECASE)
    found = [
        where(path, line, name)
        for path in modules("lightlite").values()
        for line, name in names_in(path)
        if device.fullmatch(name) and name not in NAMES_OF_OTHERS
    ]
    assert found == []


@pytest.mark.parametrize("room", ["lightlite", "lightlite.launch"])
def test_a_plugin_is_known_to_plugins_only(room: str) -> None:
    """So that one is added without a change elsewhere: by a file, and a line in a table of plugins/__init__.py."""
    declared = [*ACCELERATORS.plugins.items(), *STRATEGIES.plugins.items()]
    known = {name for name, _ in declared} - {"cpu"}
    for _, (location, _, _) in declared:
        known |= {location, location.partition(":")[0], location.partition(":")[2]}
    found = [
        where(path, line, name)
        for path in modules(room).values()
        for line, name in names_in(path)
        if name in known and name not in NAMES_OF_OTHERS
    ]
    assert found == []


def test_core_knows_torch_distributed_in_one_file_only() -> None:
    found = []
    for name, path in modules("lightlite").items():
        if name == "lightlite.distributed":
            continue
        found += [
            where(path, line, imported)
            for line, imported in imported_names(path)
            if starts_with(imported, ("torch.distributed",))
        ]
        found += [
            where(path, node.lineno, dotted(node))
            for node in running_nodes(tree(path))
            if dotted(node) == "torch.distributed"
        ]
    assert found == []


STARTS_PROCESSES = (
    "subprocess",
    "multiprocessing",
    "torch.multiprocessing",
    "concurrent.futures.ProcessPoolExecutor",
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "pty",
)
STARTS_A_PROCESS = re.compile(r"os\.(fork|forkpty|exec\w+|spawn\w+|posix_spawnp?|popen|system)")


@pytest.mark.parametrize("room", ["lightlite", "lightlite.plugins"])
def test_only_launch_starts_processes(room: str) -> None:
    found = []
    for path in modules(room).values():
        found += [
            where(path, line, imported)
            for line, imported in imported_names(path)
            if starts_with(imported, STARTS_PROCESSES) or STARTS_A_PROCESS.fullmatch(imported)
        ]
        found += [
            where(path, node.lineno, dotted(node))
            for node in running_nodes(tree(path))
            if STARTS_A_PROCESS.fullmatch(dotted(node)) or starts_with(dotted(node), STARTS_PROCESSES)
        ]
    assert found == []


ALLOWED = {
    "lightlite.plugins": (
        "lightlite.plugins",
        "lightlite.interfaces",
        "lightlite.distributed",
        "lightlite.errors",
        "lightlite.nest",
        "lightlite.registry",
        "lightlite.utilities.rank_zero",
    ),
    "lightlite.launch": (
        "lightlite.launch",
        "lightlite.interfaces",
        "lightlite.distributed",
        "lightlite.errors",
        "lightlite.registry",
    ),
}

USERS = ("lightlite.plugins.testing",)
"""Use what users use."""


@pytest.mark.parametrize("room", ALLOWED)
def test_plugins_and_launch_use_the_interfaces_and_no_more_of_the_core(room: str) -> None:
    found = [
        where(path, line, imported)
        for name, path in modules(room).items()
        for line, imported in imported_names(path)
        if not starts_with(name, USERS)
        and starts_with(imported, ("lightlite",))
        and not starts_with(imported, ALLOWED[room])
    ]
    assert found == []


def test_core_reaches_plugins_and_launch_through_the_registry_only() -> None:
    found = [
        where(path, line, imported)
        for path in modules("lightlite").values()
        for line, imported in imported_names(path)
        if starts_with(imported, ("lightlite.plugins", "lightlite.launch"))
    ]
    assert found == []


def test_launch_knows_functions_and_ranks_but_no_trainer() -> None:
    found = [
        where(path, number, line.strip())
        for path in modules("lightlite.launch").values()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\bTrainer\b", line)
    ]
    assert found == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = {name: path for room in ROOMS for name, path in modules(room).items()}
    graph = {}
    for name, path in known.items():
        targets = {
            imported if imported in known else imported.rpartition(".")[0] for _, imported in imported_names(path)
        }
        graph[name] = targets & known.keys() - {name}
    TopologicalSorter(graph).prepare()  # a cycle raises, and the message shows it


def test_top_level_holds_the_fixed_list() -> None:
    generated = re.compile(r"\..*|build|dist|.*\.egg-info|__pycache__|checkpoints|lightning_logs|logs")
    entries = {entry.name for entry in ROOT.iterdir() if not generated.fullmatch(entry.name)}
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert entries == files | {"lightlite", "plugins", "launch", "tests", "benchmarks", "scripts"}


PUBLIC = {
    "lightlite": """
        Callback Fabric LightningDataModule LightningModule Trainer __version__ seed_everything
    """,
    "lightlite.accelerators": """
        Accelerator AcceleratorRegistry CPUAccelerator CUDAAccelerator MPSAccelerator find_usable_cuda_devices
    """,
    "lightlite.callbacks": """
        BackboneFinetuning BaseFinetuning BasePredictionWriter BatchSizeFinder Callback Checkpoint
        DeviceStatsMonitor EMAWeightAveraging EarlyStopping GradientAccumulationScheduler LambdaCallback
        LearningRateFinder LearningRateMonitor ModelCheckpoint ModelSummary OnExceptionCheckpoint ProgressBar
        RichModelSummary RichProgressBar SpikeDetection StochasticWeightAveraging TQDMProgressBar
        ThroughputMonitor Timer WeightAveraging
    """,
    "lightlite.compat": """
        LIGHTNING_VERSION install
    """,
    "lightlite.loggers": """
        CSVLogger DummyLogger Logger MLFlowLogger TensorBoardLogger WandbLogger
    """,
    "lightlite.plugins": """
        AsyncCheckpointIO CheckpointIO DoublePrecision FullPrecision HalfPrecision MixedPrecision Precision
        TorchCheckpointIO TruePrecision
    """,
    "lightlite.profilers": """
        AdvancedProfiler PassThroughProfiler Profiler PyTorchProfiler SimpleProfiler
    """,
    "lightlite.strategies": """
        DDPStrategy FSDPStrategy ModelParallelStrategy SingleDeviceStrategy Strategy StrategyRegistry
    """,
    "lightlite.utilities": """
        AttributeDict CombinedLoader GradClipAlgorithmType LightningEnum MisconfigurationException Throughput
        ThroughputMonitor disable_possible_user_warnings find_shared_parameters grad_norm is_picklable
        is_shared_filesystem isolate_rng measure_flops move_data_to_device rank_zero_debug rank_zero_deprecation
        rank_zero_info rank_zero_only rank_zero_warn seed_everything set_shared_parameters suggested_max_num_workers
    """,
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_exactly_these(module: str) -> None:
    namespace = importlib.import_module(module)
    assert sorted(namespace.__all__) == sorted(PUBLIC[module].split())
    assert [name for name in namespace.__all__ if not hasattr(namespace, name)] == []


class Net(pl.LightningModule):
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.make_optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters(), lr=0.01)


def test_at_most_six_frames_in_five_files_lie_between_fit_and_the_optimizer() -> None:
    stacks: list[list[traceback.FrameSummary]] = []

    class WatchingSGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            stacks.append(list(traceback.extract_stack()))
            return super().step(closure)

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(WatchingSGD), [torch.ones(3, 4)] * 3)

    assert len(stacks) == 3
    package = Path(pl.__file__).parent
    for stack in stacks:
        frames = [
            f"{Path(frame.filename).relative_to(package)}:{frame.name}"
            for frame in stack
            if Path(frame.filename).is_relative_to(package)
        ]
        assert frames[0] == "trainer.py:fit"
        assert len(frames) <= 6, frames
        assert len({frame.partition(":")[0] for frame in frames}) <= 5, frames


HEAVY = (
    "tqdm",
    "yaml",
    "tensorboard",
    "mlflow",
    "wandb",
    "rich",
    "sklearn",
    "torch._dynamo",
    "torch.distributed.elastic",
    "cloudpickle",
    "psutil",
    "pynvml",
    "fsspec",
    "lightlite.plugins",
    "lightlite.launch",
)


def test_importing_lightlite_loads_nothing_heavy_that_torch_does_not_load() -> None:
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lightlite\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules and name not in before])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
