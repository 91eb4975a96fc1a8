"""Ranks spread over NUMA nodes: on trees like that of Linux, and for real, with this machine's cores as two nodes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightlite import Fabric, Trainer
from lightlite.demos.boring_classes import BoringModel, RandomDataset
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.devices import BINDING, share_of_nodes
from lightlite.utilities import affinity

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux binds processes to cores")


def nodes(folder: Path, *lists: str) -> Path:
    """A folder as /sys/devices/system/node is."""
    (folder / "possible").write_text("0-31")
    for number, text in enumerate(lists):
        (folder / f"node{number}").mkdir()
        (folder / f"node{number}" / "cpulist").write_text(f"{text}\n")
    return folder


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name in BINDING:
        monkeypatch.delenv(name, raising=False)


def shares(folder: Path, ranks: int) -> list[list[int] | None]:
    found = [share_of_nodes(rank, ranks, folder) for rank in range(ranks)]
    return [None if cores is None else sorted(cores) for cores in found]


@pytest.mark.usefixtures("sixteen_cores")
def test_ranks_share_nodes_or_nodes_are_shared_out(tmp_path: Path) -> None:
    even, odd = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    two = nodes(tmp_path, "0-3,8-11", "4-7,12-15")
    assert shares(two, 2) == [even, odd]
    assert shares(two, 4) == [even, even, odd, odd]


@pytest.mark.usefixtures("sixteen_cores")
def test_a_rank_gets_several_nodes_where_there_are_more_of_them(tmp_path: Path) -> None:
    assert shares(nodes(tmp_path, "0-3", "4-7", "8-11", "12-15"), 2) == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize(
    ("lists", "ranks"),
    [
        (("0-15",), 4),
        (("0-7", "8-15"), 1),
        (("0-7", "8-15"), 3),
        (("0-11", "12-15"), 2),
        (("0-7", "8-11"), 2),
        (("0-7", "8-x"), 2),
        ((), 2),
    ],
    ids=["one node", "one rank", "uneven ranks", "uneven nodes", "cores of no node", "not understood", "not told"],
)
@pytest.mark.usefixtures("sixteen_cores")
def test_nothing_is_bound_unless_all_ranks_are_equal(tmp_path: Path, lists: tuple[str, ...], ranks: int) -> None:
    assert shares(nodes(tmp_path, *lists), ranks) == [None] * ranks


@pytest.mark.usefixtures("sixteen_cores")
def test_a_node_without_cores_or_without_usable_ones_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = nodes(tmp_path, "0-7", "8-15", "", "16-31")
    assert shares(folder, 2) == [list(range(8)), list(range(8, 16))]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 8, 9})  # taskset, or a container
    assert shares(folder, 2) == [[2, 3], [8, 9]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3})
    assert shares(folder, 2) == [None, None]


@pytest.mark.parametrize("variable", BINDING)
@pytest.mark.usefixtures("sixteen_cores")
def test_what_the_user_has_bound_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "0-3")
    assert shares(nodes(tmp_path, "0-7", "8-15"), 2) == [None, None]


def test_this_machine_is_read_as_it_is() -> None:
    cores = share_of_nodes(0, 2)
    assert cores is None or cores < os.sched_getaffinity(0)


needs_two_cores = pytest.mark.skipif(
    len(affinity.cores()) < 2 or any(name in os.environ for name in BINDING), reason="needs two cores to choose from"
)


@needs_two_cores
def test_all_threads_keep_to_the_cores_until_that_is_undone() -> None:
    before, wait, found = affinity.cores(), threading.Event(), []

    def look() -> None:
        wait.wait()
        found.append(affinity.cores())

    thread = threading.Thread(target=look)
    thread.start()
    one = {min(before)}
    undo = affinity.keep_to(one)
    assert affinity.cores() == one
    wait.set()
    thread.join()
    undo()
    assert found == [one]
    assert affinity.cores() == before


class Cores(Dataset[Tensor]):
    """Samples that say on which core their worker may run."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(sorted(os.sched_getaffinity(0)))


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[CPUAccelerator]:
    """An accelerator for which two of this machine's cores are a node each; the caller keeps to the two."""

    class TwoNodes(CPUAccelerator):
        numa_nodes = tmp_path

    first, second = sorted(affinity.cores())[:2]
    nodes(tmp_path, str(first), str(second))
    undo = affinity.keep_to({first, second})
    yield TwoNodes()
    undo()


@needs_two_cores
def test_each_rank_and_its_loader_workers_run_on_its_node_and_afterwards_where_they_may(
    two_nodes: CPUAccelerator,
) -> None:
    class Where(BoringModel):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            return sorted(os.sched_getaffinity(0)), batch.flatten().tolist()

    before = affinity.cores()
    trainer = Trainer(accelerator=two_nodes, devices=2, logger=False, enable_progress_bar=False)
    loader = DataLoader(Cores(), batch_size=1, num_workers=1, multiprocessing_context="fork")
    found = trainer.predict(Where(), loader)
    trainer._launcher.close()
    first, second = ([core] for core in sorted(before))
    assert found == [(first, first), (second, second)] * 2
    assert affinity.cores() == before


@needs_two_cores
def test_fabric_binds_and_unbinds_too(two_nodes: CPUAccelerator) -> None:
    before = affinity.cores()
    fabric = Fabric(accelerator=two_nodes, devices=2)
    found = fabric.launch(lambda fabric: fabric.all_gather(torch.tensor(min(os.sched_getaffinity(0)))).tolist())
    assert found == sorted(before)
    assert affinity.cores() == before


def test_a_single_rank_is_left_where_it_is(two_nodes: CPUAccelerator) -> None:
    class Look(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert affinity.cores() == before
            return super().training_step(batch, batch_idx)

    before = affinity.cores()
    trainer = Trainer(accelerator=two_nodes, devices=1, fast_dev_run=True, enable_model_summary=False)
    trainer.fit(Look(), DataLoader(RandomDataset(32, 2)), DataLoader(RandomDataset(32, 2)))
