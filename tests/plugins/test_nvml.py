"""NVML through `pynvml` itself, over a stand-in for NVIDIA's library that is compiled here."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightlite.accelerators import find_usable_cuda_devices
from lightlite.errors import MisconfigurationException
from lightlite.plugins import nvml

pynvml = pytest.importorskip("pynvml")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"),
    reason="the stand-in for libnvidia-ml.so.1 needs cc, and Linux; test_hardware.py has a double of pynvml",
)
SOURCE = Path(__file__).with_name("nvml_standin.c")
UUIDS = [f"{kind}-{digit * 8}-{digit * 4}-{digit * 4}-{digit * 4}-{digit * 12}" for kind, digit in
         (("GPU", "0"), ("GPU", "1"), ("GPU", "2"), ("MIG", "3"))]  # fmt: skip


def build(folder: Path, *options: str) -> Path:
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-w", *options, "-o", target, SOURCE], check=True)
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pynvml use the library at `path`, and nothing it remembers of another."""
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(path)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    forget()


def forget() -> None:
    nvml._handle.cache_clear()
    nvml._starts.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def initialise() -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", initialise)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    forget()


def test_each_gpu_tells_what_it_may(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(library, monkeypatch)
    figures = {"utilization_percent": 42, "memory_total_bytes": 1000, "temperature_celsius": 61, "power_watts": 250.5}
    assert nvml.device_figures(UUIDS[2]) == {**figures, "memory_used_bytes": 10}
    del figures["power_watts"]
    assert nvml.device_figures(UUIDS[0].removeprefix("GPU-")) == {**figures, "memory_used_bytes": 900}
    assert nvml.device_figures("44444444-4444-4444-4444-444444444444") == {}


def test_a_part_of_a_divided_gpu_has_figures_of_its_own(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(library, monkeypatch)
    figures = nvml.device_figures(UUIDS[3].removeprefix("MIG-"))
    assert figures["memory_used_bytes"] == 70
    assert "utilization_percent" not in figures


def test_the_freest_gpus_are_found_without_cuda_and_those_held_by_others_left_out(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(library, monkeypatch)
    assert find_usable_cuda_devices() == [2, 0]
    assert find_usable_cuda_devices(1) == [2]
    with pytest.raises(MisconfigurationException, match="only 2 of 3 GPUs can be used now"):
        find_usable_cuda_devices(3)


@pytest.mark.parametrize("order", [None, "FASTEST_FIRST"])
def test_unequal_gpus_are_not_taken_for_those_that_cuda_counts(
    library: Path, monkeypatch: pytest.MonkeyPatch, order: str | None
) -> None:
    load(library, monkeypatch)
    monkeypatch.setenv("STANDIN_NAME", "Another GPU")
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert nvml.standing(0) is None
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert nvml.standing(0) == nvml.Standing(900, False)


@pytest.mark.parametrize("code", [4, 9, 999], ids=["no permission", "driver not loaded", "unknown error"])
def test_a_library_that_does_not_start_tells_nothing(library: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    load(library, monkeypatch)
    monkeypatch.setenv("STANDIN_START", str(code))
    assert nvml.device_figures(UUIDS[0]) == {}
    assert nvml.standing(0) is None


def test_a_library_without_the_symbols_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(build(tmp_path, "-DBARE"), monkeypatch)
    assert nvml.device_figures(UUIDS[0]) == {}
    assert nvml.standing(0) is None


PROGRAM = """
import json, torch
from lightlite.accelerators import find_usable_cuda_devices
from lightlite.plugins import nvml
def initialise():
    raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init, torch.cuda.device_count = initialise, lambda: 2
print(json.dumps([nvml.device_figures("{uuid}"), nvml.standing(0), nvml.standing(1)]))
if nvml.standing(0):
    print(json.dumps(find_usable_cuda_devices()))
"""


def run(folder: Path) -> list[str]:
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": f"{UUIDS[0]},{UUIDS[2]}",
    }
    program = PROGRAM.replace("{uuid}", UUIDS[0])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout.splitlines()


def test_pynvml_loads_the_library_and_gpus_chosen_by_uuid_are_told_apart_by_torch(library: Path) -> None:
    told, usable = run(library.parent)
    figures, first, second = json.loads(told)
    assert figures["memory_used_bytes"] == 900
    assert (first, second[0]) == ([900, False], 10)
    assert json.loads(usable) == [1, 0]


def test_a_file_that_is_no_library_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    assert [json.loads(line) for line in run(tmp_path)] == [[{}, None, None]]
