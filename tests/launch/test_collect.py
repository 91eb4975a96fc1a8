from __future__ import annotations

import collections
import dataclasses
import datetime
import errno
import multiprocessing.util
import os
import resource
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from predict_memory import measure

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
    multiprocessing.util.get_temp_dir()  # stays until this process ends, so let it lie elsewhere
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


class Pair(NamedTuple):
    first: int
    second: torch.Tensor


def outputs() -> dict[str, Any]:
    """One of everything that a predict_step may return."""
    grid = torch.arange(60.0).repeat(100, 1)
    with torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True)
        computed = leaf * 3
    return {
        "integers": torch.arange(3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "bfloat16": torch.arange(5).bfloat16(),
        "half": torch.arange(5).half(),
        "booleans": torch.tensor([True, False]),
        "conjugate": torch.complex(torch.ones(2), torch.arange(2.0)).conj(),
        "negative": torch.complex(torch.ones(2), torch.arange(2.0)).conj().imag,
        "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.ones(2), (2, 2), check_invariants=True),
        "with gradient": leaf,
        "computed": computed,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "column": grid[:, 1],
        "transposed": grid.T,
        "expanded": torch.ones(1).expand(1000, 10),
        "strided": grid.flip(1)[::2, ::3],
        "packed": torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.zeros(1)]),
        "array": np.arange(6).reshape(2, 3),
        "array's column": np.arange(6).reshape(2, 3)[:, 1],
        "array by columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "every second": np.arange(60).reshape(6, 10)[::2, ::2],
        "array of objects": np.array([{"a": 1}, None], dtype=object),
        "array of strings": np.array(["a", "bc"]),
        "numpy number": np.float32(2),
        "named tuple": Pair(1, torch.ones(1)),
        "record": Output("name", {"values": [torch.ones(1), None]}),
        "none": None,
        "text": "Grüße",
        "bytes": bytes(10),
        "set": {1, 2},
        "deque": collections.deque([torch.ones(1)], maxlen=3),
        "defaults": collections.defaultdict(list, a=[1]),
        "date": datetime.date(2020, 1, 1),
        "path": Path("somewhere"),
        "dtype": torch.float32,
    }


def plain(value: Any) -> Any:
    """What can be compared by `==`."""
    if isinstance(value, torch.Tensor):
        numbers = (value.to_dense() if value.is_sparse else value).detach().tolist()
        return type(value), value.dtype, value.shape, value.layout, value.requires_grad, numbers
    if isinstance(value, np.ndarray):
        return value.dtype, value.flags.writeable, value.tolist()
    if dataclasses.is_dataclass(value):
        return type(value), plain(vars(value))
    if isinstance(value, dict):
        return type(value), {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [plain(item) for item in value]
    return type(value), value


def test_any_output_comes_back_as_it_was() -> None:
    def work(ranks: Ranks) -> list[Any]:
        distributed.join(ranks, "gloo")
        collector = FileCollector(ranks)
        with torch.inference_mode(ranks.rank == 0), torch.no_grad():
            everything = outputs()
            for output in everything.values():
                collector.put(output)
        return collector.collect()

    pool = HelperPool(2)
    collected = pool.run(work)
    pool.close()
    for index, (name, expected) in enumerate(outputs().items()):
        assert plain(collected[2 * index + 1]) == plain(expected), name
        if not name.startswith(("with gradient", "computed")):
            assert plain(collected[2 * index]) == plain(expected), name
    strided = [output for output in collected if isinstance(output, torch.Tensor) and output.shape == (50, 20)]
    assert [output.untyped_storage().nbytes() for output in strided] == [4000, 4000]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_folder_is_named_with_what_to_do(rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> int:
        distributed.join(ranks, "gloo")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        collector = FileCollector(ranks)
        if ranks.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, before[1]))
        try:
            for _ in range(3):
                collector.put(torch.zeros(1_000_000))
            return len(collector.collect())
        finally:
            collector.close()
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    pool = HelperPool(2)
    folder = tempfile.gettempdir()
    message = rf"output 2 of rank {rank} cannot be kept in {folder}, where .* free and this rank has written 10.0 MB; "
    with pytest.raises(OSError, match=message + "let the environment variable TMPDIR name a folder") as caught:
        pool.run(work)
    assert caught.value.errno == errno.EFBIG
    pool.close()


def test_predictions_are_not_held_in_memory(tmp_path: Path) -> None:
    figures = measure(rows=200_000, columns=512, ranks=2, batch_size=1000, folder=tmp_path)
    assert figures["outputs"] > 400e6
    assert figures["peak"] < 100e6
