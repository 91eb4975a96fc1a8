"""Programs written for Lightning do the same under lightlite, and each framework goes on from the other's files.

They run in two processes, one for each framework, at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .compare import differences, read, unequal
from .runner import FRAMEWORKS, PROGRAMS, Worker, has_lightning

pytestmark = pytest.mark.skipif(not has_lightning(), reason="pytorch-lightning is not installed")

LIGHTNING, LIGHTLITE = FRAMEWORKS
ALONE = ((LIGHTNING, LIGHTNING), (LIGHTLITE, LIGHTLITE))
ACROSS = ((LIGHTNING, LIGHTLITE), (LIGHTLITE, LIGHTNING))
"""Who goes on from whose checkpoints."""

RESUMED_ANEW = {"callbacks", "ckpt_path", "events", "drawn"}
"""Free to differ after going on from a checkpoint: what its path was, what Lightning's ModelCheckpoint forgets when it
goes on in another folder, and what happened in hooks, as Lightning sometimes repeats the sanity check."""

KEEP_THE_BEST = {"hyperparameters"}
"""Programs whose files depend on what ModelCheckpoint forgets or not."""

LIGHTNING_LOSES_ITS_WAY = {"finetuning"}
"""Programs that Lightning, resumed from its own checkpoint, ends with other weights than uninterrupted."""

OWN = {
    "command_line": {"async_save"},
    "finetuning": {"trained"},
    "weight_averaging": {"scheduler_state", "initial_lr", "base_lrs", "last_epoch"},
}
"""Parts of states that differ and decide nothing: lightlite notes which parameters are trained, its SWALR counts from
where averaging began, and its ModelCheckpoint has an argument more."""


class Suite:
    """The programs' runs, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._workers = {framework: Worker(framework, root) for framework in FRAMEWORKS}
        self._done: set[str] = set()
        self._across: dict[str, dict[tuple[str, str, str], Path]] = {}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def run(self, name: str) -> dict[str, Path]:
        """The folders in which a program ran, by framework."""
        folders = {framework: self._root / framework / name for framework in FRAMEWORKS}
        if name not in self._done:
            self._at_once(name, [(framework, folder, {}) for framework, folder in folders.items()])
            self._done.add(name)
        return folders

    def across(self, name: str) -> dict[tuple[str, str, str], Path]:
        """The folders in which a program resumed or loaded a checkpoint, by ("resumed" or "loaded", who, whose)."""
        if name in self._across:
            return self._across[name]
        checkpoints = {framework: _middle(folder) for framework, folder in self.run(name).items()}
        places = {
            ("resumed", who, whose): self._root / f"{who}_from_{whose}" / name for who, whose in (*ALONE, *ACROSS)
        }
        places |= {("loaded", who, whose): self._root / f"{who}_of_{whose}" / name for who, whose in ACROSS}
        argument = {"resumed": "ckpt_path", "loaded": "model"}
        jobs = [(key[1], folder, {argument[key[0]]: checkpoints[key[2]]}) for key, folder in places.items()]
        self._at_once(name, jobs)
        self._across[name] = places
        return places

    def _at_once(self, name: str, jobs: list[tuple[str, Path, dict[str, Any]]]) -> None:
        for framework, folder, options in jobs:
            self._workers[framework].begin(name, folder, **options)
        troubles = [self._workers[framework].finish() for framework, _, _ in jobs]
        assert not any(troubles), "\n".join(troubles)


def _middle(folder: Path) -> Path:
    """A checkpoint from the middle of the first fit that the program did."""
    first = min(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime).parent
    found = sorted(first.glob("*.ckpt"))
    return found[(len(found) - 1) // 2]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    made = Suite(tmp_path_factory.mktemp("side_by_side"))
    yield made
    made.close()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_leaves_the_same_behind(suite: Suite, name: str) -> None:
    folders = suite.run(name)

    assert differences(folders[LIGHTNING], folders[LIGHTLITE], OWN.get(name, ())) == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_goes_on_from_the_others_checkpoint(suite: Suite, name: str) -> None:
    folders = suite.across(name)

    by_itself = folders["resumed", LIGHTNING, LIGHTNING]
    free = RESUMED_ANEW | OWN.get(name, set())
    assert differences(by_itself, folders["resumed", LIGHTNING, LIGHTLITE], free) == []
    of_lightning = folders["resumed", LIGHTLITE, LIGHTNING]
    if name in LIGHTNING_LOSES_ITS_WAY:
        assert unequal_weights(suite.run(name)[LIGHTNING], of_lightning) == []
    elif name in KEEP_THE_BEST:
        assert unequal_weights(by_itself, of_lightning) == []
    else:
        assert differences(by_itself, of_lightning, free) == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_resumed_program_ends_as_if_it_had_not_been_interrupted(suite: Suite, name: str) -> None:
    resumed = suite.across(name)["resumed", LIGHTLITE, LIGHTLITE]

    assert unequal_weights(suite.run(name)[LIGHTLITE], resumed) == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_model_is_made_from_the_others_checkpoint(suite: Suite, name: str) -> None:
    loaded = [suite.across(name)[("loaded", *pair)] / "loaded.pt" for pair in ACROSS]

    assert list(unequal(*(read(path, path.parent) for path in loaded))) == []


def unequal_weights(theirs: Path, ours: Path) -> list[str]:
    """Where two runs differ in the weights that their first fit ended with."""
    return list(unequal(_weights(theirs), _weights(ours), where="weights"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a program's first fit ended with."""
    results = torch.load(folder / "results.pt", weights_only=False)
    results = results if "weights" in results else next(iter(results.values()))
    weights: dict[str, torch.Tensor] = results["weights"]
    return weights
