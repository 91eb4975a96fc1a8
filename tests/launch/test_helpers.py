from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import LaunchError
from lightlite.launch.helpers import HelperPool


def pids(ranks: Ranks) -> list[int]:
    distributed.join(ranks, "gloo")
    return distributed.gather_objects(os.getpid())


def run_script(folder: Path, text: str, *args: str) -> str:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    done = subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until_gone(numbers: list[int], seconds: float = 5) -> float:
    start = time.monotonic()
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in numbers):
        assert time.monotonic() - start < seconds, "still alive"
        time.sleep(0.02)
    return time.monotonic() - start


def test_every_rank_runs_the_function_and_the_second_run_is_warm() -> None:
    pool = HelperPool(2, threads_per_rank=1)
    first = pool.run(pids)
    start = time.monotonic()
    second = pool.run(pids)
    assert time.monotonic() - start < 0.5
    assert first == second
    assert first[0] == os.getpid() != first[1]
    pool.close()
    wait_until_gone(first[1:])
    assert pool.run(pids)[1] != first[1]
    pool.close()


def test_pools_of_one_shape_share_helpers_until_the_last_is_collected() -> None:
    pool = HelperPool(2)
    helper = pool.run(pids)[1]
    other = HelperPool(2)
    del pool
    gc.collect()
    assert other.run(pids)[1] == helper
    del other
    gc.collect()
    wait_until_gone([helper])


def test_the_place_of_each_rank_and_the_value_of_rank_zero_are_returned() -> None:
    def place(ranks: Ranks, offset: int) -> Any:
        distributed.join(ranks, "gloo")
        return offset, distributed.gather_objects((ranks.rank, ranks.local_rank, ranks.world_size, ranks.num_nodes))

    pool = HelperPool(3)
    assert pool.run(place, 7) == (7, [(0, 0, 3, 1), (1, 1, 3, 1), (2, 2, 3, 1)])
    assert not distributed.is_joined()
    pool.close()


def test_one_rank_is_the_calling_process_alone() -> None:
    marker = object()
    assert HelperPool(1).run(lambda ranks, value: (ranks, value), marker) == (Ranks(), marker)


def test_starting_a_pool_does_not_wait_for_it() -> None:
    start = time.monotonic()
    pool = HelperPool(2, threads_per_rank=2)
    assert time.monotonic() - start < 0.5
    pool.close()


def test_every_rank_computes_with_the_threads_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(ranks: Ranks) -> list[int]:
        distributed.join(ranks, "gloo")
        return distributed.gather_objects(torch.get_num_threads())

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    pool = HelperPool(2, threads_per_rank=2)
    assert pool.run(threads) == [2, 2]
    assert torch.get_num_threads() == before
    pool.close()


def test_a_pool_started_in_a_thread_outlives_the_thread() -> None:
    results: list[Any] = []

    def work() -> None:
        results.append(HelperPool(2))
        results.append(results[0].run(pids))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    pool, first = results
    time.sleep(0.2)
    assert pool.run(pids) == first
    pool.close()


def test_a_run_inside_of_a_run_is_refused() -> None:
    pool = HelperPool(2)
    with pytest.raises(LaunchError, match="inside of another"):
        pool.run(lambda ranks, again: again.run(pids), pool)
    pool.close()


def test_runs_from_two_threads_take_turns() -> None:
    results: dict[int, Any] = {}

    def work(size: int) -> None:
        pool = HelperPool(size)
        results[size] = [len(pool.run(pids)) for _ in range(3)]
        pool.close()

    threads = [threading.Thread(target=work, args=(size,)) for size in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {2: [2, 2, 2], 3: [3, 3, 3]}


def test_a_plain_script_needs_no_main_guard_and_runs_once(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("ANSWER = 42\n")
    output = run_script(
        tmp_path,
        """
        import sys, os
        print("body", sys.argv[1])
        import torch
        import beside
        from lightlite import distributed
        from lightlite.launch.helpers import HelperPool

        class Model(torch.nn.Module):
            scale = 2
            def forward(self, x):
                return x * self.scale * FACTOR

        FACTOR = 3

        def main():
            offset = 5
            def work(ranks, model):
                distributed.join(ranks, "gloo")
                import beside
                value = (model(torch.tensor(1)).item() + offset, beside.ANSWER, sys.argv[1], os.getcwd())
                return distributed.gather_objects(value)
            return work

        pool = HelperPool(2)
        os.chdir("/")
        print(pool.run(main(), Model()))
        Model.scale = 10
        print(pool.run(main(), Model())[1][0])
        """,
        "argument",
    )
    value = (11, 42, "argument", "/")
    assert output.splitlines() == ["body argument", str([value, value]), "35"]


def test_loader_workers_of_a_helper_return_classes_of_the_script(tmp_path: Path) -> None:
    output = run_script(
        tmp_path,
        """
        from dataclasses import dataclass
        from torch.utils.data import DataLoader
        from lightlite import distributed
        from lightlite.launch.helpers import HelperPool

        @dataclass
        class Batch:
            items: list

        def total(ranks, loader):
            distributed.join(ranks, "gloo")
            return distributed.gather_objects(sum(sum(batch.items) for batch in loader))

        loader = DataLoader(range(10), batch_size=5, num_workers=1, collate_fn=Batch, persistent_workers=True)
        pool = HelperPool(2)
        print(pool.run(total, loader))
        print(pool.run(total, loader))
        """,
    )
    assert output.split() == ["[45,", "45]"] * 2


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_a_helper_spawns_get_what_the_script_defines(tmp_path: Path, method: str) -> None:
    program = """
        import sys
        from dataclasses import dataclass
        from torch.utils.data import DataLoader, Dataset
        from lightlite import distributed
        from lightlite.launch.helpers import HelperPool

        STEP = 3

        @dataclass
        class Batch:
            items: list
            note: str

        class Steps(Dataset):
            def __init__(self, length):
                self.length = length
            def __len__(self):
                return self.length
            def __getitem__(self, index):
                return index * STEP

        def collate(items):
            return Batch(items, note)

        def set_note(worker):
            global note
            note = f"by {worker}"

        def work(ranks, loader):
            distributed.join(ranks, "gloo")
            batches = list(loader)
            assert all(type(batch) is Batch for batch in batches)
            return distributed.gather_objects([(batch.items, batch.note) for batch in batches])

        if __name__ == "__main__":
            options = dict(num_workers=1, multiprocessing_context=sys.argv[1], worker_init_fn=set_note)
            loader = DataLoader(Steps(4), batch_size=2, collate_fn=collate, **options)
            own, helpers = HelperPool(2).run(work, loader)
            print(own == helpers, own)
        """
    assert run_script(tmp_path, program, method) == "True [([0, 3], 'by 0'), ([6, 9], 'by 0')]\n"


def test_python_minus_c_works_and_exit_is_quick_and_leaves_nobody() -> None:
    program = (
        "import os\nfrom lightlite import distributed\nfrom lightlite.launch.helpers import HelperPool\n"
        "class Box:\n    pid = property(lambda self: os.getpid())\n"
        "def work(ranks, box):\n    distributed.join(ranks, 'gloo'); return distributed.gather_objects(box.pid)\n"
        "print(*HelperPool(2).run(work, Box()))\n"
        "import atexit, time; start = time.monotonic()\n"
        "import lightlite.launch.helpers as h; h._end_all(); print(time.monotonic() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    numbers, seconds = done.stdout.splitlines()
    assert float(seconds) < 0.5
    wait_until_gone([int(number) for number in numbers.split()], seconds=1)


@pytest.mark.skipif(sys.platform != "linux", reason="loader workers are forked on Linux")
def test_loader_workers_forked_right_after_a_collective_come_to_life() -> None:
    """A thread of gloo's may be in the interpreter at that moment, which CPython's fork does not expect."""

    def work(ranks: Ranks) -> None:
        distributed.join(ranks, "gloo")
        for turn in range(100):
            distributed.gather_objects(turn)
            distributed.barrier()
            assert len(list(DataLoader(range(4), num_workers=2, timeout=20))) == 4  # type: ignore[arg-type]

    pool = HelperPool(2)
    try:
        pool.run(work)
    finally:
        pool.close()


class Rows(pl.LightningModule):
    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


def test_a_run_leaves_the_environment_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    trainer = pl.Trainer(accelerator="cpu", devices=2, logger=False, default_root_dir=tmp_path)
    assert trainer.predict(Rows(), DataLoader(torch.arange(4.0))) is not None
    assert dict(os.environ) == before
