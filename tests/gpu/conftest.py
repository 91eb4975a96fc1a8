"""Tests of real GPUs; without one they are skipped, and say why. `./scripts/test-gpu` runs them, and needs one."""

from __future__ import annotations

import os

import pytest
import torch

from lightlite.plugins.cuda import CUDAAccelerator
from lightlite.plugins.mps import MPSAccelerator

REASONS = {kind.name: kind.unavailable_reason() for kind in (CUDAAccelerator, MPSAccelerator)}
INSTEAD = "LIGHTLITE_GPU_TESTS_ON"
"""`cpu` runs there what any device can, to try out the tests themselves where there is no GPU."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `gpu` runs once for each kind of GPU there is."""
    if "gpu" in metafunc.fixturenames:
        there = [name for name, reason in REASONS.items() if reason is None]
        instead = os.environ.get(INSTEAD)
        metafunc.parametrize("gpu", there or ([instead] if instead else ["none"]))


@pytest.fixture(autouse=True)
def _skipped_without(request: pytest.FixtureRequest) -> None:
    needed = [name for name in ("cuda", "two_gpus") if name in request.fixturenames]
    if "gpu" in request.fixturenames and request.getfixturevalue("gpu") == "none":
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in REASONS.items()))
    if needed and REASONS["cuda"] is not None:
        pytest.skip(f"cuda: {REASONS['cuda']}")


@pytest.fixture
def cuda() -> torch.device:
    """The first GPU, if it is one of CUDA's."""
    return torch.device("cuda", 0)


@pytest.fixture
def two_gpus() -> int:
    """Two, where there are so many."""
    count = CUDAAccelerator.auto_device_count()
    if count < 2:
        pytest.skip(f"needs two GPUs, and there is {count}")
    return 2
