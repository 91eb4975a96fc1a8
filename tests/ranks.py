"""`run_ranks(2, function)`: calls a function in real processes, each a rank of its own, and returns a list by rank."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from lightlite.distributed import Ranks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(ranks, *args)` in each of `world_size` new processes; what each returned, by rank.

    Everything is sent by value, so `function` may be a test's own, a lambda or a closure. The ranks can meet at
    `ranks.store`, but no process group is formed yet.

    Raises:
        RuntimeError: With the traceback of the first rank found to have failed, or when `timeout` seconds are over.
    """
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        work = cloudpickle.dumps((function, args))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").write_bytes(work)
        command = [sys.executable, __file__, name, str(world_size), str(store.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world_size)]
        try:
            _wait(processes, folder, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [cloudpickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]


def in_another_run(ranks: Ranks) -> Ranks:
    """The same place in a run that comes next: each has a store of its own, which knows no addresses of the last."""
    if ranks.store is None:  # whoever started the ranks says where they meet
        return ranks
    meeting, name = dist.TCPStore(*ranks.store, is_master=False), f"run {next(_runs)}"
    if ranks.rank == 0:
        _stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        meeting.set(name, str(_stores[-1].port))
    return replace(ranks, store=("127.0.0.1", int(meeting.get(name))))


_runs = itertools.count()
_stores: list[dist.TCPStore] = []


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                report = folder / f"failure{rank}"
                raise RuntimeError(f"rank {rank}: {report.read_text() if report.exists() else f'exit code {code}'}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {[rank for rank, code in enumerate(codes) if code is None]} are still running")
        time.sleep(0.02)


def _main(name: str, world_size: int, port: int, rank: int) -> None:
    torch.set_num_threads(1)
    folder = Path(name)
    try:
        function, args = cloudpickle.loads((folder / "work").read_bytes())
        warnings.simplefilter("error")
        result = function(Ranks(rank, rank, 0, world_size, world_size, ("127.0.0.1", port)), *args)
        (folder / f"result{rank}").write_bytes(cloudpickle.dumps(result))
    except BaseException:
        (folder / f"failure{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
