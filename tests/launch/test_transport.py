from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import re
import socket
import sys
import threading
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import NotSendableError
from lightlite.launch import transport, unsendable
from lightlite.launch.helpers import HelperPool


def there_and_back(value: Any, **options: Any) -> Any:
    with transport.anonymous_file() as file:
        packed = transport.pack(value, file, **options)
        return transport.unpack(packed, transport.map_private(file))


def test_tied_parameters_and_shared_storages_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    base = torch.arange(6.0)
    copy, whole, part = there_and_back((model, base.view(2, 3), base[3:]))
    assert copy[0].weight is copy[1].weight
    assert isinstance(copy[0].weight, nn.Parameter)
    assert torch.equal(copy[0].weight, model[0].weight)
    whole += 1
    assert part.tolist() == [4.0, 5.0, 6.0]
    assert base.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0, 3),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.arange(12).view(3, 4).t(),
        torch.ones(1, 2).expand(3, 2),
        torch.eye(3).to_sparse(),
        torch.tensor([1 + 2j]).conj(),
        torch.ones(2, requires_grad=True),
    ],
    ids=["empty", "bfloat16", "transposed", "expanded", "sparse", "conjugated", "with gradient"],
)
@pytest.mark.parametrize("outputs", [False, True])
def test_a_tensor_of_any_kind_arrives_equal(tensor: torch.Tensor, outputs: bool) -> None:
    copy = there_and_back(tensor, outputs=outputs)
    assert (copy.dtype, copy.shape, copy.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert torch.equal(copy.to_dense(), tensor.to_dense())
    if tensor.layout == torch.strided:
        assert copy.stride() == tensor.stride()


def test_an_output_that_is_part_of_a_bigger_tensor_leaves_the_rest_behind() -> None:
    copy = there_and_back(torch.arange(1000.0).view(10, 100)[:, :2], outputs=True)
    assert copy[9].tolist() == [900.0, 901.0]
    assert copy.untyped_storage().nbytes() == 20 * 4


def test_arrays_generators_and_optimizers_arrive() -> None:
    array = np.arange(5.0)
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    array_copy, generator_copy, model_copy, optimizer_copy = there_and_back((array, generator, model, optimizer))
    array_copy[0] = 9
    assert array[0] == 0
    assert torch.equal(torch.rand(3, generator=generator_copy), torch.rand(3, generator=generator))
    assert optimizer_copy.param_groups[0]["params"][0] is model_copy.weight


def test_open_files_are_opened_again_where_they_were(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    with open(tmp_path / "in.txt") as reader, open(tmp_path / "out.txt", "w") as writer:
        reader.readline()
        writer.write("a")
        read_again, append = there_and_back((reader, writer))
        with read_again, append:
            assert read_again.read() == "two\n"
            append.write("b")
    assert (tmp_path / "out.txt").read_text() == "ab"


def test_a_memory_mapped_array_is_mapped_again(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "data", dtype=np.float32, mode="w+", shape=(1000, 3))
    mapped[5] = 7
    with transport.anonymous_file() as file:
        packed = transport.pack(mapped, file)
        assert packed.places == ()
        copy = transport.unpack(packed, transport.map_private(file))
    assert isinstance(copy, np.memmap)
    assert copy[5].tolist() == [7, 7, 7]


def test_a_view_of_a_memory_mapped_array_is_mapped_again_too(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "data", dtype=np.float32, mode="w+", shape=(100, 3))
    mapped[:] = np.arange(300).reshape(100, 3)
    views = [mapped[10:20], np.asarray(mapped)[::-2, 1], mapped.T]
    with transport.anonymous_file() as file:
        packed = transport.pack(views, file)
        assert packed.places == ()
        copies = transport.unpack(packed, transport.map_private(file))
    for view, copy in zip(views, copies, strict=True):
        assert (type(copy), copy.strides, copy.tolist()) == (type(view), view.strides, view.tolist())
    copies[0][0] = -1
    assert mapped[10].tolist() == [-1, -1, -1]


def test_locks_and_what_is_built_on_them_arrive_unlocked(tmp_path: Path) -> None:
    lock = threading.Lock()
    waiting: queue.Queue[int] = queue.Queue()
    waiting.put(3)
    handler = logging.FileHandler(tmp_path / "log")
    with lock, closing(handler):
        lock_copy, waiting_copy, event, handler_copy = there_and_back((lock, waiting, threading.Event(), handler))
    with closing(handler_copy):
        assert not lock_copy.locked()
        assert waiting_copy.get_nowait() == 3
        assert not event.is_set()
        handler_copy.emit(logging.makeLogRecord({"msg": "from there"}))
    assert (tmp_path / "log").read_text() == "from there\n"


def test_what_torch_itself_does_not_pickle_arrives() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    normed_copy, twice = there_and_back((normed, torch.compile(lambda x: x * 2, backend="eager")))
    assert torch.equal(normed_copy.weight, normed.weight)
    assert list(normed_copy.state_dict()) == list(normed.state_dict())
    with torch.no_grad():
        normed_copy.parametrizations.weight.original0.mul_(2)
    assert torch.equal(normed_copy.weight, normed.weight * 2)
    assert twice(torch.ones(1)).item() == 2


def test_a_tensor_that_was_computed_arrives_without_its_history() -> None:
    weight = torch.ones(2, requires_grad=True)
    copy = there_and_back(weight * 3)
    assert copy.is_leaf
    assert copy.tolist() == [3, 3]


def test_a_module_that_no_other_process_can_import_travels_by_value(tmp_path: Path) -> None:
    code = (
        "class Thing:\n    pass\nTABLE = {'a': 1}\ndef look(ranks):\n    return Thing, TABLE['a'] + ranks.world_size\n"
    )
    (tmp_path / "by_hand.py").write_text(code)
    spec = importlib.util.spec_from_file_location("by_hand", tmp_path / "by_hand.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["by_hand"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def work(ranks: Ranks, look: Any) -> Any:
        distributed.join(ranks, "gloo")
        return distributed.gather_objects(look(ranks)[1])

    pool = HelperPool(2)
    try:
        assert pool.run(work, module.look) == [3, 3]
        assert module not in cloudpickle.list_registry_pickle_by_value()
    finally:
        pool.close()
        del sys.modules["by_hand"]


def test_a_module_loaded_again_is_loaded_again_by_the_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "edited.py"
    source.write_text("def answer():\n    return 'first'\n")
    edited = importlib.import_module("edited")

    def work(ranks: Ranks, answer: Any) -> Any:
        distributed.join(ranks, "gloo")
        return distributed.gather_objects(answer())

    pool = HelperPool(2)
    assert pool.run(work, edited.answer) == ["first", "first"]
    source.write_text("def answer():\n    return 'second, longer'\n")
    importlib.reload(edited)
    assert pool.run(work, edited.answer) == ["second, longer"] * 2
    pool.close()
    del sys.modules["edited"]


def test_a_loader_is_sent_without_its_running_workers() -> None:
    loader = DataLoader(TensorDataset(torch.arange(4)), num_workers=1, persistent_workers=True)
    assert len(list(loader)) == 4
    copy = there_and_back(loader)
    assert copy._iterator is None
    assert loader._iterator is not None
    loader._iterator._shutdown_workers()


def test_results_leave_the_classes_that_are_there_alone() -> None:
    class Local:
        def method(self) -> int:
            return 1

    there_and_back(Local())
    method = Local.method
    copy = there_and_back(Local(), outputs=True)
    assert type(copy) is Local
    assert Local.method is method


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = torch.jit.script(nn.Linear(2, 2))


def test_what_cannot_be_sent_is_named() -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = iter(DataLoader(TensorDataset(torch.arange(4))))

    model = nn.Module()
    model.criterion = Criterion()

    def work(ranks: Ranks, model: nn.Module, options: dict[str, Any]) -> int:
        return 1

    refused_iterator = r"model\.criterion `x` of type \S*DataLoaderIter cannot .*keep the DataLoader itself"
    pool = HelperPool(2)
    with pytest.raises(NotSendableError, match=refused_iterator):
        pool.run(work, model, {})
    with pytest.raises(NotSendableError, match=r"options\['a'\] `1` of type generator cannot be sent.*keep a list"):
        pool.run(work, nn.Module(), {"a": [0, (i for i in "x")]})
    own = socket.socket()
    with closing(own), pytest.raises(NotSendableError, match=r"`own` of type socket\.socket"):
        pool.run(lambda ranks: own.fileno())
    with pytest.raises(NotSendableError, match=r"model `net` of type torch\.jit\S+ cannot be sent"):
        pool.run(work, Scripted(), {})
    assert pool.run(work, nn.Module(), {}) == 1
    pool.close()


def test_the_search_for_what_cannot_be_sent_ends_in_cycles() -> None:
    knot: dict[str, Any] = {"rows": (i for i in "x")}
    knot["self"] = knot
    assert (unsendable.explain({"knot": knot}) or "").startswith("knot `'rows'` of type generator")
    assert unsendable.explain({"fine": [1]}) is None


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of mappings")
def test_a_big_dataset_is_shared_by_three_helpers_and_written_to_in_private() -> None:
    megabytes = 100
    array = np.ones(megabytes * 2**20 // 8)
    tensor = torch.ones(megabytes * 2**18)

    def look(ranks: Ranks, array: np.ndarray[Any, Any], tensor: torch.Tensor) -> Any:
        distributed.join(ranks, "gloo")
        total = float(array.sum() + tensor.sum())
        distributed.barrier()  # a page that one process alone has touched yet counts as private
        mine = kilobytes() if ranks.rank else None
        distributed.barrier()
        array[0] = tensor[0] = ranks.rank
        distributed.barrier()
        return distributed.gather_objects((total, float(array[0]), float(tensor[0]), mine))

    def kilobytes() -> list[int]:
        blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        (block,) = [block for block in blocks if "memfd:lightlite" in block.partition("\n")[0]]
        assert block.split()[1] == "rw-p"
        return [int(re.search(rf"\n{key}:\s+(\d+)", block)[1]) for key in ("Size", "Pss", "Private_Dirty")]

    pool = HelperPool(4)
    results = pool.run(look, array, tensor)
    pool.close()
    assert [result[:3] for result in results] == [(array.size + tensor.numel(), rank, rank) for rank in range(4)]
    sizes, shares, dirty = zip(*(result[3] for result in results[1:]), strict=True)
    assert sizes == (2 * megabytes * 1024,) * 3
    assert dirty == (0, 0, 0)
    assert sum(shares) == pytest.approx(2 * megabytes * 1024, rel=0.01)
