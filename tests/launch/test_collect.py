from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import NotSendableError
from lightlite.launch.collect import FileCollector
from lightlite.launch.helpers import HelperPool


@dataclasses.dataclass
class Output:
    name: str
    values: dict[str, Any]


def gather(ranks: Ranks, counts: list[int], as_machines: bool) -> list[Any]:
    distributed.join(ranks, "gloo")
    if as_machines:
        ranks = dataclasses.replace(ranks, local_rank=0, node_rank=ranks.rank, local_world_size=1)
    collector = FileCollector(ranks)
    for index in range(counts[ranks.rank]):
        scores = torch.arange(6.0).view(2, 3) + 100 * ranks.rank + index
        collector.put(Output(f"{ranks.rank}.{index}", {"scores": scores, "nothing": None, "nest": (1, [scores[0]])}))
    outputs = collector.collect()
    collector.close()
    for output in outputs:
        output.values["scores"] += 0.5
    everywhere = distributed.gather_objects([output.name for output in outputs])
    assert everywhere == [everywhere[0]] * ranks.world_size
    assert all(type(output) is Output for output in outputs)
    return outputs


@pytest.mark.parametrize("as_machines", [False, True], ids=["one machine", "three machines"])
def test_outputs_come_back_dealt_out_over_uneven_ranks(as_machines: bool, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    pool = HelperPool(3)
    outputs = pool.run(gather, [3, 2, 0], as_machines)
    assert [output.name for output in outputs] == ["0.0", "1.0", "0.1", "1.1", "0.2"]
    assert outputs[3].values["scores"].tolist() == [[101.5, 102.5, 103.5], [104.5, 105.5, 106.5]]
    assert outputs[3].values["nothing"] is None
    assert outputs[3].values["nest"][1][0].tolist() in ([101.0, 102.0, 103.0], [101.5, 102.5, 103.5])
    assert pool.run(gather, [0, 0, 0], as_machines) == []
    assert pool.run(gather, [0, 0, 1], as_machines)[0].name == "2.0"
    assert list(tmp_path.iterdir()) == []
    pool.close()


def test_local_classes_and_views_come_back() -> None:
    def work(ranks: Ranks) -> Any:
        class Local:
            value = 3

        distributed.join(ranks, "gloo")
        collector = FileCollector(ranks)
        collector.put((Local(), torch.zeros(1000, 1000)[:, 0]))
        return [(local.value, view.shape, view.untyped_storage().nbytes()) for local, view in collector.collect()]

    pool = HelperPool(2)
    assert pool.run(work) == [(3, (1000,), 4000)] * 2
    pool.close()


def test_what_cannot_be_put_is_named() -> None:
    def work(ranks: Ranks) -> None:
        distributed.join(ranks, "gloo")
        collector = FileCollector(ranks)
        try:
            if ranks.rank == 1:
                collector.put({"rows": (row for row in [1])})
            collector.collect()
        finally:
            collector.close()

    pool = HelperPool(2)
    with pytest.raises(NotSendableError, match="output 0 of rank 1 `'rows'` of type generator"):
        pool.run(work)
    pool.close()


def test_a_million_rows_cost_no_resident_memory_until_they_are_read() -> None:
    def work(ranks: Ranks) -> tuple[int, int, float]:
        distributed.join(ranks, "gloo")
        collector = FileCollector(ranks)
        before = psutil.Process().memory_info().rss
        for _ in range(500):
            collector.put(torch.full((1000, 16), float(ranks.rank)))
        outputs = collector.collect()
        return len(outputs), psutil.Process().memory_info().rss - before, float(outputs[999].sum())

    pool = HelperPool(2)
    count, added, last = pool.run(work)
    assert (count, last) == (1000, 16000.0)
    assert added < 15e6
    pool.close()


def test_one_rank_gets_its_own_objects_back() -> None:
    collector = FileCollector(Ranks())
    first = object()
    collector.put(first)
    assert collector.collect() == [first]
    collector.put(first)
    collector.close()
    assert collector.collect() == []


def test_closing_before_collecting_leaves_no_file_open() -> None:
    before = open_files()
    collector = FileCollector(Ranks(0, 0, 0, 2, 2))
    collector.put(torch.ones(1000))
    assert len(open_files()) == len(before) + 2
    collector.close()
    assert open_files() == before


def open_files() -> list[str]:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs Linux's list of open files")
    links = [os.readlink(link) for link in folder.iterdir() if link.is_symlink()]
    return sorted(link for link in links if link.endswith("(deleted)"))
