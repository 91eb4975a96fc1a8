from __future__ import annotations

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightlite.utilities.seed import capture_rng, isolate_rng, reset_seed, restore_rng, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_the_same_seed_gives_the_same_numbers_in_every_generator() -> None:
    assert seed_everything(11, verbose=False) == 11
    first = draw()
    seed_everything(11, verbose=False)
    assert draw() == first
    seed_everything(12, verbose=False)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_seed_is_handed_on_in_the_environment() -> None:
    seed_everything(7, workers=True, verbose=False)
    assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == ("7", "1")
    first = draw()
    assert seed_everything(workers=False, verbose=False) == 7
    assert (draw(), os.environ["PL_SEED_WORKERS"]) == (first, "0")
    assert reset_seed() == 7
    assert draw() == first


def test_without_any_seed_it_is_0_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert reset_seed() is None
    with pytest.warns(UserWarning, match="the seed is 0"):
        assert seed_everything(verbose=False) == 0


@pytest.mark.parametrize("seed", [-1, 2**32, "many"])
def test_a_seed_out_of_bounds_names_the_bounds(seed: int | str) -> None:
    with pytest.raises(ValueError, match=f"seed is .?{seed}.*0 to 4294967295"):
        seed_everything(seed, verbose=False)  # type: ignore[arg-type]


def test_a_bad_seed_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "x")
    with pytest.raises(ValueError, match="PL_GLOBAL_SEED is 'x'"):
        seed_everything(verbose=False)


def test_random_states_survive_a_file_that_holds_plain_data_only(tmp_path: Path) -> None:
    draw()
    torch.save(capture_rng(), tmp_path / "state")
    expected = draw()
    restore_rng(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_restoring_leaves_alone_what_the_state_does_not_name() -> None:
    state = capture_rng()
    python, numpy, from_torch = draw()
    restore_rng({"torch": state["torch"]})
    again = draw()
    assert again[2] == from_torch
    assert (again[0], again[1]) != (python, numpy)


def test_random_numbers_drawn_in_an_isolated_block_leave_no_trace() -> None:
    state = capture_rng()
    expected = draw()
    restore_rng(state)
    with isolate_rng():
        assert draw() == expected
    assert draw() == expected


def test_a_captured_state_is_small() -> None:
    file = io.BytesIO()
    torch.save(capture_rng(), file)
    assert file.tell() < 30_000
